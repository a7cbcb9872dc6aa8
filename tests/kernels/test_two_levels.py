"""Decode in two levels against the float64 reference, on fresh random rows and NaN-poisoned buffers; what is no
candidate, and what is not selected, is not read."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_triton_prefill import check as check_prefill
from triton_cases import Batch, draw_sinks, limits, make_batch, residual_of

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.reference import select_blocks, spla_token
from spla_backend.algorithm.sketch import FINE_SOURCES
from spla_backend.algorithm.two_level import coarse_parameters
from spla_backend.kernels.gpu.checks import check_options
from spla_backend.kernels.gpu.decode.fused import refusal
from spla_backend.kernels.gpu.decode.steps import DecodeSteps
from spla_backend.kernels.gpu.decode.tuning import Tuning

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SMALL = {"num_heads": 4, "num_kv_heads": 2, "head_size": 32, "device": DEVICE}
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
gpu = pytest.mark.gpu


def params(page: int = 32, block: int = 32, budget: int = 4, fine: int = 16, candidates: int = 3, **more):
    """`candidates` in budgets."""
    return SplaParameters(page, block, budget, fine_block=fine, least_candidates=candidates * budget, **more)


def edges(p: SplaParameters) -> list[int]:
    """Lengths on both sides of where rows are whole and of the candidates, and around pages and fine blocks."""
    whole, candidates = p.whole_tokens, p.candidate_blocks * p.selection_block
    beyond = (candidates // p.page_size + 3) * p.page_size
    return [whole, whole + 1, candidates, candidates + 1, beyond, beyond + 1, beyond + p.fine_block + 1, 1]


def fresh() -> int:
    return random.randrange(1 << 30)


# Small cases, interpreted where there is no GPU


@pytest.mark.parametrize(
    ("page", "block", "fine", "source"),
    [
        (32, 32, 16, "keys"),
        (64, 32, 16, "keys"),
        (64, 64, 16, "keys"),
        (32, 32, 32, "keys"),
        (48, 16, 16, "keys"),
        (64, 32, 16, "int4"),
        (32, 32, 32, "int4"),
        (48, 16, 16, "int4"),
    ],
    ids=str,
)
def test_lengths_around_every_edge_and_padding(page: int, block: int, fine: int, source: str) -> None:
    p = params(page, block, page // block + 2, fine, fine_source=source)
    batch = make_batch(p, [*edges(p), 0], seed=fresh(), chunk=0, **SMALL)
    batch.check(batch.decode(), 2e-3)


@pytest.mark.parametrize("selector", ["mean", "taylor2", "quest", "km2-rem"])
@pytest.mark.parametrize("statistics", ["auto", "fp8"])
def test_selectors(selector: str, statistics: str) -> None:
    p = params(selector=selector, residual=residual_of(selector), statistics_dtype=statistics)
    batch = make_batch(p, [p.budget_tokens * 3 + 7, 200], seed=fresh(), chunk=0, **SMALL)
    batch.check(batch.decode(), 2e-3)


@pytest.mark.parametrize("selector", ["mean", "rem"])
@pytest.mark.parametrize("statistics", ["auto", "fp8"])
def test_sketches_by_selector(selector: str, statistics: str) -> None:
    p = params(64, 32, 5, selector=selector, statistics_dtype=statistics, fine_source="int4")
    batch = make_batch(p, [p.budget_tokens * 3 + 7, 200], seed=fresh(), chunk=0, **SMALL)
    batch.check(batch.decode(), 2e-3)


@pytest.mark.parametrize("residual", ["regression", "linear", "none"])
@pytest.mark.parametrize("combine", ["shared_normalizer", "double_rmsnorm"])
def test_residual_and_combination(residual: str, combine: str) -> None:
    """Rows within the candidates, and beyond."""
    weights = (torch.rand(4, 32) + 0.5, torch.rand(4, 32) + 0.5)
    batch = make_batch(
        params(64, 32, residual=residual, combine=combine), [407, 197, 0], seed=fresh(), norm_weights=weights,
        gain=torch.tensor([0.0, 0.5, 1.0, 2.0]), chunk=0, **SMALL,
    )  # fmt: skip
    batch.check(batch.decode(), 2e-3)


@pytest.mark.parametrize("query_len", [3, [3, 2, 3, 1, 0]], ids=["uniform", "fewer-drafts"])
@pytest.mark.parametrize(("residual", "source"), [("regression", "keys"), ("none", "keys"), ("none", "int4")])
def test_verification_rows(residual: str, source: str, query_len: int | list[int]) -> None:
    """Of three tokens, of which the second is the first beyond an edge; or of fewer, where drafts are cut off."""
    p = params(budget=3, residual=residual, last_blocks=1, fine_source=source)
    lengths = [x + 2 for x in edges(p)[:6:2]]
    batch = make_batch(p, [*lengths, 3, 0], query_len=query_len, seed=fresh(), chunk=0, **SMALL)
    batch.check(batch.decode(), 2e-3)


@pytest.mark.parametrize("source", FINE_SOURCES)
@pytest.mark.parametrize("top_p", [None, 0.8])
def test_sinks(source: str, top_p: float | None) -> None:
    p = params(budget=5, top_p=top_p, fine_source=source)
    batch = make_batch(p, [*edges(p), 0], seed=fresh(), chunk=0, sinks=draw_sinks(4, fresh()), **SMALL)
    batch.check(batch.decode(), 2e-3)


@pytest.mark.parametrize("top_p", [0.3, 0.8])
def test_top_p_is_a_share_of_the_candidates_mass(top_p: float) -> None:
    batch = make_batch(params(budget=6, top_p=top_p), [500, 300], seed=fresh(), chunk=0, **SMALL)
    batch.check(batch.decode(), 2e-3)


@pytest.mark.parametrize("source", FINE_SOURCES)
@pytest.mark.parametrize("tile", [32, 256])
def test_splits_of_every_launch(source: str, tile: int) -> None:
    """By tiles of a block, and of so many that they end within one."""
    tuning = Tuning(3, 3, chunk=16, tile=16, mass_splits=2, fine_splits=3, fine_tile=tile)
    lengths = [450, 260, 129, 30, 0]
    batch = make_batch(params(fine_source=source), lengths, seed=fresh(), tuning=tuning, chunk=0, **SMALL)
    batch.check(batch.decode(), 2e-3)


@pytest.mark.parametrize("candidates", [3, 20])
def test_more_candidates(candidates: int) -> None:
    """As many as no row has, too."""
    batch = make_batch(params(budget=3, candidates=candidates), [420, 300, 97], seed=fresh(), chunk=0, **SMALL)
    batch.check(batch.decode(), 2e-3)


def test_selection_in_pieces() -> None:
    batch = make_batch(params(), [450, 200], seed=fresh(), chunk=0, **SMALL)
    sizes = batch.op.sizes
    batch.op.sizes = replace(sizes, width=16, fine_width=8)
    grouped = {"grouped": torch.empty(2, 2, sizes.max_units, device=DEVICE),
               "fine_grouped": torch.empty(2, 2, sizes.candidates * sizes.per_unit, device=DEVICE)}  # fmt: skip
    batch.op.scratch = {**batch.op.scratch, **grouped}
    batch.check(batch.decode(), 2e-3)


def test_ties_go_to_the_lower_block() -> None:
    """Of equal scores, on any CPU: products of such numbers need no rounding, whose kind is the BLAS's own."""
    batch = make_batch(params(selector="mean", candidates=2), [450], seed=fresh(), chunk=0, **SMALL)
    batch.keys[0][:] = batch.keys[0][:16].repeat(29, 1, 1)[:450].mul(8).round() / 8
    batch.query.mul_(8).round_().div_(8)
    batch.write(0, 0, 450)
    batch.decode()
    for head in range(2):
        assert batch.candidates(0, 0, head) == [0, 1, 2, 3, 4, 5, 13, 14]
        assert batch.selected(0, 0, head) == [0, 1, 2, 3, 4, 26, 27, 28]


def test_scratch_of_layers_with_larger_budgets() -> None:
    """The rows of this layer's tables stand side by side at its beginning."""
    batch = make_batch(params(), [450, 260, 100], seed=fresh(), chunk=0, **SMALL)
    sizes = limits(3, 450)
    batch.op = DecodeSteps(batch.layer, replace(sizes, largest_budget=9))
    assert batch.op.scratch["candidates"].shape[-1] > batch.op.sizes.candidates
    batch.check(batch.decode(), 2e-3)


@pytest.mark.parametrize(
    ("heads", "page", "block", "fine", "source"),
    [
        ((7, 1, 80), 16, 16, 16, "keys"),
        ((16, 1, 64), 64, 64, 32, "keys"),
        ((2, 2, 16), 32, 32, 16, "keys"),
        ((4, 1, 256), 64, 64, 16, "keys"),
        ((7, 1, 80), 16, 16, 16, "int4"),
        ((32, 1, 96), 64, 64, 32, "int4"),
        ((2, 2, 16), 32, 32, 16, "int4"),
        ((4, 1, 256), 64, 64, 16, "int4"),
    ],
    ids=str,
)
def test_shapes(heads: tuple[int, int, int], page: int, block: int, fine: int, source: str) -> None:
    p = params(page, block, 4, fine, fine_source=source)
    batch = make_batch(
        p, [10 * page + 3, 6 * page], num_heads=heads[0], num_kv_heads=heads[1], head_size=heads[2], device=DEVICE,
        seed=fresh(), chunk=0, token_major=True,
    )  # fmt: skip
    batch.check(batch.decode(), 2e-3)


def step_of_layers(layers: list[Batch], outputs: list[torch.Tensor]) -> Callable[[], None]:
    """A decode step as an engine makes it, one layer after the other: store the rows' last tokens, attend,
    with nothing in between that waits."""
    assert all(layer.op.scratch is layers[0].op.scratch for layer in layers)
    last = []
    for layer in layers:
        rows = [(row, length - 1) for row, length in enumerate(layer.lengths) if length]
        keys, values = (torch.stack([x[row][at] for row, at in rows]) for x in (layer.keys, layer.values))
        last.append((keys, values, torch.cat([layer.slots(row, at, at + 1) for row, at in rows]).to(keys.device)))

    def step() -> None:
        for layer, (keys, values, slots), output in zip(layers, last, outputs, strict=True):
            layer.store.update_cache(keys, values, layer.kv_cache, slots)
            layer.run(output)

    return step


def test_layers_share_scratch() -> None:
    """What other layers leave in it makes no difference."""
    lengths = [450, 128, 129, 257, 33, 0]
    layers = [make_batch(params(), lengths, seed=fresh(), chunk=0, **SMALL) for _ in range(3)]
    expected = [layer.decode() for layer in layers]
    outputs = [torch.full_like(layer.query, float("nan")) for layer in layers]
    step = step_of_layers(layers, outputs)
    for _ in range(2):
        step()
        for output, alone in zip(outputs, expected, strict=True):
            assert torch.equal(output, alone)


def candidates_of(batch: Batch, token: int, row: int, head: int) -> list[int]:
    """Of a row that is attended to whole all blocks; nobody need write down which they are."""
    p, length = batch.layer.params, batch.lengths[row]
    return list(range(length // p.selection_block)) if length <= p.whole_tokens else batch.candidates(token, row, head)


def poison(batch: Batch) -> tuple[int, int]:
    """NaN where no token of a row may read: values that are not selected, keys beyond the candidates; with a sketch
    keys that are not selected, and sketches beyond the candidates. How many fine blocks' values and how many selection
    blocks' keys or sketches there were. What drafts complete is folded, and left alone."""
    p, d = batch.layer.params, batch.layer.head_size
    values = keys = 0
    for row, length in enumerate(batch.lengths):
        covered = (length - batch.query_len) // p.page_size * p.page_size  # tokens that the state holds
        tokens = range(row * batch.query_len, (row + 1) * batch.query_len) if length else ()
        for head in range(batch.layer.num_kv_heads):
            for is_fine, size, chosen in [
                (True, p.fine_block, {i for t in tokens for i in batch.selected(t, row, head)}),
                (False, p.selection_block, {i for t in tokens for i in candidates_of(batch, t, row, head)}),
            ]:
                for i in set(range(covered // size)) - chosen:
                    page, rows = batch.kv_cache[int(batch.block_table[row, i * size // p.page_size]), head], i * size
                    rows = slice(rows % p.page_size, rows % p.page_size + size)
                    if is_fine:
                        page[rows, 0 if p.has_sketch else d :] = torch.nan
                    elif p.has_sketch:
                        codes, scales = batch.layer.page_layout.sketch(batch.layer.page_layout.area(page))
                        codes[rows], scales[rows] = 255, torch.nan
                    else:
                        page[rows, :d] = torch.nan
                    values, keys = values + is_fine, keys + (not is_fine)
    return values, keys


def check_poison(batch: Batch, tolerance: float) -> None:
    expected = batch.decode()  # folds the states: from here on they alone speak for what is not selected
    batch.check(expected, tolerance)
    values, keys = poison(batch)
    assert values > 0 and keys > 0
    assert torch.equal(batch.decode(), expected)
    row, size = 0, batch.layer.params.fine_block
    block = batch.selected(0, row, 0)[0]  # and the test would notice
    assert block == 0
    batch.kv_cache[int(batch.block_table[row, 0]), 0, size - 1] = torch.nan
    assert bool(batch.decode().isnan().any())


@pytest.mark.parametrize(
    ("residual", "query_len", "source"),
    [
        ("regression", 1, "keys"),
        ("regression", 3, "keys"),
        ("linear", 1, "keys"),
        ("none", 1, "keys"),
        ("regression", 1, "int4"),
        ("none", 3, "int4"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_nothing_else_is_read(residual: str, query_len: int, source: str) -> None:
    p = params(64, 32, residual=residual, fine_source=source)
    # Long enough that the candidates of several tokens together are not all blocks: 8 each, of 12 or 26.
    batch = make_batch(p, [387 if query_len == 1 else 835, 260, 0], query_len=query_len, seed=fresh(), chunk=0, **SMALL)
    check_poison(batch, 2e-3)


def test_candidates_are_those_of_one_level() -> None:
    p = params(candidates=2)
    batch = make_batch(p, [450], seed=fresh(), chunk=0, **SMALL)
    batch.decode()
    want = spla_token(
        batch.query[0].double().cpu() * batch.layer.scale, batch.keys[0].double().cpu(),
        batch.values[0].double().cpu(), p, statistics=batch.statistics(0, 449 // p.page_size),
    )  # fmt: skip
    differing = 0
    for head in range(2):
        expected = select_blocks(want.group_scores[head], 449, coarse_parameters(p))
        assert len(expected) == 8
        differing += batch.candidates(0, 0, head) != expected
    assert differing <= 1  # a near-tie


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fine_block": 8}, "fine_block_size 8 has no kernel, choose one of 16, 32, 64"),
        ({"page_size": 48, "selection_block": 48, "fine_block": 16}, "selection blocks of 48 tokens are not 1, 2, 4"),
        ({"executor": "flashinfer"}, "executor 'flashinfer' reads whole pages, no fine blocks of 16 tokens"),
        ({"fine_source": "int3"}, "fine_source 'int3' has no kernel, choose one of keys, int4"),
        ({"fine_source": "int4", "selector": "quest", "residual": "none"}, "no kernel with selector 'quest', whose"),
        ({"fine_source": "int4", "heads": 256}, "no kernel for 128 query heads a kv head of 128, only up to 32: set"),
        ({"least_candidates": 1 << 14}, "candidates of 1048576 tokens are more than 65535 fine blocks of 16"),
    ],
    ids=str,
)
def test_refusals_name_the_cause(change: dict, message: str) -> None:
    values = {"page_size": 64, "selection_block": 64, "budget_blocks": 32, "fine_block": 16} | change
    more = {"executor": values.pop("executor", "spla"), "num_heads": values.pop("heads", 8)}
    with pytest.raises(ValueError, match=message):
        check_options(
            SplaParameters(**values), num_kv_heads=2, head_size=128, cache_dtype=torch.bfloat16,
            max_query_len=1, max_model_len=8192, capability=(9, 0), **more,
        )  # fmt: skip


def test_prompts_rank_by_keys_beside_a_sketch() -> None:
    """On the same pages, whose statistics and stamps stand before and behind a sketch."""
    batch = make_batch(params(32, 16, 5, fine_source="int4"), [230], seed=fresh(), chunk=0, **SMALL)
    assert batch.layer.page_layout.has_sketch
    check_prefill(batch, [(140, 230)], 3e-3, sample=9)


def test_the_fused_launch_leaves_it_to_others() -> None:
    reason = refusal(params(64, 64, 32), group=4, head_size=128, cache_dtype=torch.bfloat16)
    assert reason == "the fine level reads keys"


def test_what_is_compiled_at_start_up() -> None:
    batch = make_batch(params(), [300, 200, 40], query_len=2, seed=fresh(), chunk=0, **SMALL)
    expected, op = batch.decode(), batch.op
    steps = op.different_steps()
    shapes = {(op.tuning(rows, query_len), query_len) for rows, query_len in steps}
    assert shapes == {(op.tuning(rows, query_len), query_len) for rows in (1, 2, 3) for query_len in (1, 2)}
    for num_rows, query_len in steps:
        op.decode_padding(num_rows, query_len)
    assert torch.equal(batch.decode(), expected)


# Real sizes


@gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    ("heads", "page", "block", "fine", "selector", "source"),
    [
        ((8, 2, 128), 64, 64, 16, "rem", "keys"),
        ((8, 2, 128), 64, 64, 32, "taylor2", "keys"),
        ((8, 2, 128), 64, 64, 64, "cumulant2", "keys"),
        ((8, 2, 128), 64, 32, 16, "mean", "keys"),
        ((8, 2, 128), 128, 128, 16, "km2-rem", "keys"),
        ((8, 2, 128), 48, 16, 16, "rem", "keys"),
        ((4, 4, 64), 16, 16, 16, "rem", "keys"),
        ((7, 1, 96), 64, 64, 16, "rem", "keys"),
        ((16, 1, 80), 64, 64, 16, "rem", "keys"),
        ((4, 1, 256), 64, 64, 16, "rem", "keys"),
        ((8, 2, 128), 64, 64, 32, "taylor2", "int4"),
        ((8, 2, 128), 128, 128, 64, "cumulant2", "int4"),
        ((8, 2, 128), 64, 32, 16, "mean", "int4"),
        ((8, 2, 128), 64, 64, 32, "mean", "int4"),
        ((8, 2, 32), 48, 16, 16, "rem", "int4"),
        ((4, 4, 64), 16, 16, 16, "rem", "int4"),
        ((7, 1, 96), 64, 64, 16, "rem", "int4"),
        ((16, 1, 80), 64, 64, 16, "rem", "int4"),
        ((16, 1, 256), 64, 64, 16, "rem", "int4"),
    ],
    ids=str,
)
def test_gpu_shapes(
    heads: tuple[int, int, int], page: int, block: int, fine: int, selector: str, source: str, dtype
) -> None:
    num_heads, num_kv_heads, head_size = heads
    p = params(page, block, 6 * page // block, fine, 3, selector=selector, fine_source=source)
    batch = make_batch(
        p, [*edges(p), 12 * p.budget_tokens + 5, 0], num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_size=head_size, dtype=dtype, device=DEVICE, seed=fresh(), chunk=0, gain=torch.rand(num_heads) * 2,
    )  # fmt: skip
    for _ in range(2):  # rebuilds the states, then finds them valid
        batch.check(batch.decode(), TOLERANCE[dtype])


@gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("source", FINE_SOURCES)
@pytest.mark.parametrize("statistics", ["auto", "fp8"])
@pytest.mark.parametrize("residual", ["regression", "linear", "none"])
@pytest.mark.parametrize("combine", ["shared_normalizer", "double_rmsnorm"])
@pytest.mark.parametrize("query_len", [1, 4])
def test_gpu_residuals_and_verification(
    residual: str, combine: str, query_len: int, statistics: str, source: str
) -> None:
    weights = (torch.rand(8, 128) + 0.5, torch.rand(8, 128) + 0.5)
    more = {"statistics_dtype": statistics, "fine_source": source}
    p = params(64, 64, 8, 16, 3, residual=residual, combine=combine, **more)
    batch = make_batch(
        p, [4000, 1538, 1537, 1300, 577, 515, 70, 5, 0], num_heads=8, num_kv_heads=2, head_size=128,
        dtype=torch.bfloat16, query_len=query_len, device=DEVICE, seed=fresh(), chunk=0, norm_weights=weights,
    )  # fmt: skip
    batch.check(batch.decode(), TOLERANCE[torch.bfloat16])


@gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize(("block", "tile", "splits"), [(64, 64, 3), (64, 128, 8), (64, 256, 1), (16, 128, 4)], ids=str)
def test_gpu_sketches_by_launches(block: int, tile: int, splits: int) -> None:
    """Where the fused launch would take the batch."""
    tuning = Tuning(4, 4, fine_splits=splits, fine_tile=tile)
    batch = make_batch(
        params(64, block, 512 // block, 16, 3, fine_source="int4"), [4000, 1600, 1537, 577, 5, 0], num_heads=8,
        num_kv_heads=2, head_size=128, dtype=torch.bfloat16, device=DEVICE, seed=fresh(), chunk=0, tuning=tuning,
    )  # fmt: skip
    check_poison(batch, TOLERANCE[torch.bfloat16])


@gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 8, 40, 256])
@pytest.mark.parametrize("top_p", [None, 0.9], ids=["top-k", "top-p"])
def test_gpu_batches_of_mixed_lengths(rows: int, top_p: float | None) -> None:
    seed = fresh()
    lengths = [random.Random(seed + i).randrange(1, 5000) for i in range(rows - rows // 4)] + [0] * (rows // 4)
    batch = make_batch(
        params(64, 64, 16, 16, 2, top_p=top_p), lengths, num_heads=8, num_kv_heads=2, head_size=128,
        dtype=torch.bfloat16, device=DEVICE, seed=seed, chunk=0, max_model_len=8192,
    )  # fmt: skip
    output = batch.decode()
    batch.check(output, TOLERANCE[torch.bfloat16], rows=random.Random(seed).sample(range(rows), min(rows, 6)))


@gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("candidates", [4, 64])
def test_gpu_long_context(candidates: int) -> None:
    """Candidates that are everything, too."""
    batch = make_batch(
        params(64, 64, 32, 16, candidates), [100000], num_heads=8, num_kv_heads=2, head_size=128,
        dtype=torch.bfloat16, device=DEVICE, seed=fresh(), chunk=0, max_model_len=131072,
    )  # fmt: skip
    batch.check(batch.decode(), TOLERANCE[torch.bfloat16])


@gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("query_len", [1, 4])
@pytest.mark.parametrize("source", FINE_SOURCES)
def test_gpu_nothing_else_is_read(query_len: int, source: str) -> None:
    batch = make_batch(
        params(64, 64, 8, 16, 2, fine_source=source), [3000, 1500, 900, 0], num_heads=8, num_kv_heads=2, head_size=128,
        dtype=torch.bfloat16, query_len=query_len, device=DEVICE, seed=fresh(), chunk=0,
    )  # fmt: skip
    check_poison(batch, TOLERANCE[torch.bfloat16])


@gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("query_len", [1, 4])
def test_gpu_graph_replay(query_len: int) -> None:
    """A graph captured on short rows replays on long ones: nothing but shapes is baked in."""
    batch = make_batch(
        params(64, 64, 8, 16, 3), [3500, 1600, 700], num_heads=8, num_kv_heads=2, head_size=128,
        dtype=torch.bfloat16, query_len=query_len, device=DEVICE, seed=fresh(), chunk=0, max_model_len=4096,
    )  # fmt: skip
    expected = batch.decode()
    output = torch.full_like(batch.query, float("nan"))
    graph = batch.capture(output)
    for _ in range(3):
        output.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, expected)


@gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("source", FINE_SOURCES)
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(
    "lengths", [[3500, 1600], [3079, 2128, 1079, 592, 591, 579, 144, 143, 142, 84] + [0] * 6], ids=len
)
def test_gpu_layers_one_after_another(lengths: list[int], graphs: bool, source: str) -> None:
    """Launches of layers that share scratch overlap as they may: the same bits, time and again, as of each alone."""
    layers = [
        make_batch(
            params(64, 64, 8, 16, 2, fine_source=source), lengths, num_heads=16, num_kv_heads=4, head_size=128,
            device=DEVICE, seed=fresh(), chunk=0, max_model_len=4096,
        )
        for _ in range(6)
    ]  # fmt: skip
    expected = []
    for layer in layers:
        expected.append(layer.decode())
        layer.check(expected[-1], TOLERANCE[torch.float16], rows=[0, 1])  # while the page table is this layer's
    outputs = [torch.empty_like(layer.query) for layer in layers]
    launched = step_of_layers(layers, outputs)  # stays, and with it the tokens that a graph stores
    step = launched
    if graphs:
        launched()  # compiled before it is captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launched()
        step = graph.replay
    differing = torch.zeros(len(layers), dtype=torch.int64, device=DEVICE)
    for _ in range(300):
        for output in outputs:
            output.fill_(float("nan"))
        step()
        for i, (output, alone) in enumerate(zip(outputs, expected, strict=True)):
            differing[i] += (output != alone).any()
    assert differing.tolist() == [0] * len(layers)
