"""The whole of a decode step against the float64 reference, on fresh random rows and NaN-poisoned buffers."""

import random
from dataclasses import replace

import pytest
import torch
from triton_cases import SELECTORS, draw_sinks, each_selector, limits, make_batch, residual_of

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.kernels.gpu.decode.fused import FusedDecode, refusal
from spla_backend.kernels.gpu.decode.steps import DecodeSteps
from spla_backend.kernels.gpu.decode.tuning import Tuning
from spla_backend.kernels.gpu.layer import GpuLayer
from spla_backend.kernels.interface import Layer

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SMALL = {"num_heads": 4, "num_kv_heads": 2, "head_size": 32, "device": DEVICE}
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
gpu = pytest.mark.gpu


def params(page: int = 16, budget: int = 5, **more) -> SplaParameters:
    return SplaParameters(page, page, budget, **more)


@pytest.fixture(autouse=True)
def only_triton(monkeypatch) -> None:
    """The fused launch has tests of its own, and takes its time to compile."""
    monkeypatch.setattr(FusedDecode, "pays", lambda self, num_rows: False)
    monkeypatch.setattr(FusedDecode, "prepare", lambda self, max_num_rows: None)


def fresh() -> int:
    return random.randrange(1 << 30)


# Small cases, interpreted where there is no GPU


@pytest.mark.parametrize("selector", SELECTORS)
def test_selectors(selector: str) -> None:
    batch = make_batch(params(selector=selector, residual=residual_of(selector)), [150, 81], seed=fresh(), **SMALL)
    batch.check(batch.decode(), 2e-3)


def test_lengths_around_page_and_budget_edges_and_padding() -> None:
    batch = make_batch(params(), [1, 15, 16, 17, 80, 81, 96, 97, 0], seed=fresh(), **SMALL)
    batch.check(batch.decode(), 2e-3)


def test_splits() -> None:
    tuning = Tuning(3, 3, chunk=16, tile=16)
    batch = make_batch(params(), [200, 90, 30, 0], seed=fresh(), tuning=tuning, **SMALL)
    batch.check(batch.decode(), 2e-3)


@pytest.mark.parametrize("residual", ["regression", "linear", "none"])
@pytest.mark.parametrize("combine", ["shared_normalizer", "double_rmsnorm"])
def test_residual_and_combination(residual: str, combine: str) -> None:
    weights = (torch.rand(4, 32) + 0.5, torch.rand(4, 32) + 0.5)
    batch = make_batch(
        params(residual=residual, combine=combine), [150, 97], seed=fresh(), norm_weights=weights,
        gain=torch.tensor([0.0, 0.5, 1.0, 2.0]), **SMALL,
    )  # fmt: skip
    batch.check(batch.decode(), 2e-3)


@pytest.mark.parametrize("residual", ["regression", "linear", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sinks(residual: str, dtype: torch.dtype) -> None:
    """Of rows that attend to everything, of others, and of padding."""
    batch = make_batch(
        params(residual=residual), [150, 97, 81, 80, 17, 1, 0], seed=fresh(), sinks=draw_sinks(4, fresh(), dtype),
        gain=torch.tensor([0.0, 0.5, 1.0, 2.0]), **SMALL,
    )  # fmt: skip
    batch.check(batch.decode(), 2e-3)


def test_sinks_are_read_in_every_step() -> None:
    """They are the model's own parameter, which it may load again in place."""
    sinks = torch.nn.Parameter(torch.full((4,), float("nan"), device=DEVICE))
    batch = make_batch(params(), [150, 97], seed=fresh(), sinks=sinks, **SMALL)
    for _ in range(2):
        sinks.data.copy_(draw_sinks(4, fresh()))
        batch.check(batch.decode(), 2e-3)


@pytest.mark.parametrize("group", [3, 8, 16])
def test_sinks_of_groups(group: int) -> None:
    """Through splits, in verification rows, with top-p."""
    batch = make_batch(
        params(budget=7, top_p=0.8), [200, 98, 82, 19], query_len=[3, 2, 3, 1], seed=fresh(), num_heads=2 * group,
        num_kv_heads=2, head_size=64, device=DEVICE, tuning=Tuning(3, 3, chunk=16, tile=16),
        sinks=draw_sinks(2 * group, fresh()),
    )  # fmt: skip
    batch.check(batch.decode(), 2e-3)


@pytest.mark.parametrize("selector", SELECTORS)
def test_sinks_by_selector(selector: str) -> None:
    p = params(selector=selector, residual=residual_of(selector))
    batch = make_batch(p, [150, 81], seed=fresh(), sinks=draw_sinks(4, fresh()), **SMALL)
    batch.check(batch.decode(), 2e-3)


def test_sinks_under_double_rmsnorm_are_refused() -> None:
    with pytest.raises(ValueError, match="would undo learned attention sinks"):
        make_batch(params(combine="double_rmsnorm"), [20], sinks=draw_sinks(4, 0), **SMALL)


def test_the_fused_launch_leaves_sinks_to_the_others() -> None:
    shape = {"group": 8, "head_size": 64, "cache_dtype": torch.bfloat16}
    assert refusal(SplaParameters(64, 64, 32), **shape) is None
    assert refusal(SplaParameters(64, 64, 32), **shape, has_sinks=True) == "the layer has attention sinks"


def test_sinks_with_selection_in_pieces() -> None:
    batch = make_batch(params(), [500, 90], seed=fresh(), sinks=draw_sinks(4, fresh()), **SMALL)
    batch.op.sizes = replace(batch.op.sizes, width=16)
    batch.op.scratch = {**batch.op.scratch, "grouped": torch.empty(2, 2, batch.op.sizes.max_pages, device=DEVICE)}
    batch.check(batch.decode(), 2e-3)


@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.99])
def test_top_p(top_p: float) -> None:
    batch = make_batch(params(budget=8, top_p=top_p), [230], seed=fresh(), **SMALL)
    batch.check(batch.decode(), 2e-3)


def test_verification_rows() -> None:
    batch = make_batch(params(), [150, 97, 98, 82, 19, 3, 0], query_len=3, seed=fresh(), **SMALL)
    batch.check(batch.decode(), 2e-3)


@pytest.mark.parametrize("tuning", [None, Tuning(3, 3, chunk=16, tile=16)], ids=["chosen", "splits"])
def test_rows_of_fewer_drafts(tuning: Tuning | None) -> None:
    """Drafts that are cut off leave rows of fewer tokens, among them the beginning of a sequence and one whose drafts
    complete a page. Nothing is written behind the batch's tokens."""
    batch = make_batch(
        params(), [150, 98, 82, 97, 3, 81, 1], query_len=[4, 5, 3, 1, 3, 2, 1], seed=fresh(), tuning=tuning, **SMALL
    )
    batch.check(batch.decode(), 2e-3)


def test_ties_go_to_the_lower_page() -> None:
    batch = make_batch(params(), [200], seed=fresh(), **SMALL)
    batch.keys[0][:] = batch.keys[0][:16].repeat(13, 1, 1)[:200]
    batch.write(0, 0, 200)
    batch.decode()
    for head in range(2):
        assert batch.selected(0, 0, head) == [0, 1, 2, 11, 12]


def test_selection_in_pieces() -> None:
    """As where a long context and a large group do not fit into the registers of one program."""
    batch = make_batch(params(), [500, 90], seed=fresh(), **SMALL)
    batch.op.sizes = replace(batch.op.sizes, width=16)
    batch.op.scratch = {**batch.op.scratch, "grouped": torch.empty(2, 2, batch.op.sizes.max_pages, device=DEVICE)}
    batch.check(batch.decode(), 2e-3)


def test_more_splits_than_a_power_of_two() -> None:
    tuning = Tuning(2, 5, chunk=16, tile=16)
    batch = make_batch(params(), [260, 100, 20], seed=fresh(), tuning=tuning, **SMALL)
    batch.check(batch.decode(), 2e-3)


def test_budget_of_the_forced_pages_alone() -> None:
    batch = make_batch(params(budget=3), [100, 49], seed=fresh(), **SMALL)
    batch.check(batch.decode(), 2e-3)
    assert batch.selected(0, 0, 0) == [0, 5, 6]


@pytest.mark.parametrize(
    "case",
    [(64, 16, 9, "km2-rem"), (48, 16, 5, "rem"), (64, 32, 4, "taylor2"), (16, 16, 5, "km2-rem")],
    ids=["4-a-page", "3-a-page", "2-a-page", "1-a-page"],
)
def test_finer_blocks(case: tuple[int, int, int, str]) -> None:
    page, block, budget, selector = case
    edge = budget * block
    lengths = [4 * page + block + 7, edge, edge + 1, 3 * page, 3 * page + 1, page + 3, 0]
    fine = SplaParameters(page, block, budget, selector=selector)
    batch = make_batch(fine, lengths, seed=fresh(), chunk=0, **SMALL)
    batch.check(batch.decode(), 2e-3)


@pytest.mark.parametrize("residual", ["regression", "linear"])
def test_finer_blocks_in_verification_rows(residual: str) -> None:
    """Drafts may complete a page of which some blocks are then left out."""
    fine = SplaParameters(64, 16, 7, residual=residual, last_blocks=1)
    batch = make_batch(fine, [258, 257, 256, 130, 3, 0], query_len=3, seed=fresh(), chunk=0, **SMALL)
    batch.check(batch.decode(), 2e-3)


def test_drafts_that_complete_the_only_page() -> None:
    fine = SplaParameters(64, 16, 4, first_blocks=0, last_blocks=1)
    batch = make_batch(fine, [66], query_len=4, seed=fresh(), chunk=0, **SMALL)
    batch.check(batch.decode(), 2e-3)


@pytest.mark.parametrize("selector", ["mean", "quest"])
def test_finer_blocks_top_p_and_splits(selector: str) -> None:
    fine = SplaParameters(32, 16, 6, selector=selector, residual="none", top_p=0.8)
    batch = make_batch(fine, [330, 90], seed=fresh(), tuning=Tuning(3, 3, chunk=16, tile=32), **SMALL)
    batch.check(batch.decode(), 2e-3)


@pytest.mark.parametrize(
    ("selector", "heads", "page", "block"),
    each_selector(
        ((7, 1, 96), 48, 16),
        ((8, 2, 64), 64, 16),
        ((4, 4, 64), 16, 16),
        ((8, 2, 64), 32, 32),
        ((4, 1, 128), 64, 64),
        ((8, 2, 80), 32, 16),
        ((4, 2, 32), 128, 16),
        ((7, 1, 80), 16, 16),
    ),
    ids=str,
)
def test_statistics_in_fp8(selector: str, heads: tuple[int, int, int], page: int, block: int) -> None:
    budget = max(5, page // block + 2)
    fp8 = SplaParameters(
        page, block, budget, selector=selector, residual=residual_of(selector), statistics_dtype="fp8"
    )  # fmt: skip
    lengths = [max(budget * block, 3 * page) + page + 7, budget * block + 1, page, 0]
    batch = make_batch(
        fp8, lengths, num_heads=heads[0], num_kv_heads=heads[1], head_size=heads[2], device=DEVICE, seed=fresh(),
        chunk=0, tuning=Tuning(2, 2, chunk=16, tile=16),
    )  # fmt: skip
    batch.check(batch.decode(), 2e-3)


def test_statistics_in_fp8_in_verification_rows() -> None:
    fp8 = SplaParameters(64, 16, 7, selector="km2-rem", last_blocks=1, statistics_dtype="fp8")
    batch = make_batch(fp8, [258, 257, 130, 3, 0], query_len=3, seed=fresh(), chunk=0, **SMALL)
    batch.check(batch.decode(), 2e-3)


def test_state_is_kept_over_steps_and_rows_may_move() -> None:
    batch = make_batch(params(), [120, 100], seed=fresh(), **SMALL)
    first = batch.decode()
    again = batch.decode()
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    "case",
    [(7, 1, 80, 16), (16, 1, 64, 48), (2, 2, 16, 32), (8, 1, 32, 16)],
    ids=["group7-d80-page16", "group16-d64-page48", "group1-d16-page32", "group8-d32-page16"],
)
def test_shapes(case: tuple[int, int, int, int]) -> None:
    heads, kv_heads, head_size, page = case
    batch = make_batch(
        params(page), [page * 7 + 3], num_heads=heads, num_kv_heads=kv_heads, head_size=head_size, device=DEVICE,
        seed=fresh(), token_major=True,
    )  # fmt: skip
    batch.check(batch.decode(), 2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selection_block": 8}, "selection_block"),
        ({"selection_block": 16, "page_size": 24}, "page_size"),
        ({"selector": "mine"}, "selector"),
        ({"feature_map": "elu1", "residual": "linear"}, "feature_map"),
        ({"selector": "quest"}, "tail mass"),
        ({"budget_blocks": 2}, "forced"),
        ({"statistics_dtype": "fp4"}, "statistics_dtype"),
        ({"statistics_dtype": "fp8", "selector": "km2-rem", "page_size": 256, "selection_block": 256}, "255 keys"),
        ({"max_model_len": 1 << 20}, "65535"),
    ],
)
def test_refusals_name_the_cause(change: dict, message: str) -> None:
    values = {"page_size": 16, "selection_block": 16, "budget_blocks": 5} | change
    longest = values.pop("max_model_len", 64)
    with pytest.raises(ValueError, match=message):
        layer = GpuLayer(SplaParameters(**values), Layer(2, 1, 32, torch.float16, 1.0), "cpu")
        DecodeSteps(layer, limits(1, longest, 2))


# Real sizes


@gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize(
    ("heads", "page", "block", "selector"),
    [
        ((8, 1, 64), 64, 32, "rem"),
        ((8, 2, 128), 64, 16, "rem"),
        ((8, 2, 128), 128, 16, "taylor2"),
        ((8, 2, 128), 96, 96, "rem"),
        ((8, 1, 64), 48, 16, "km2-rem"),
        ((8, 2, 128), 64, 16, "km2-rem"),
        ((8, 2, 128), 64, 64, "km2-rem"),
        ((4, 1, 256), 64, 16, "km2-rem"),
    ],
    ids=str,
)
def test_gpu_finer_blocks(heads: tuple[int, int, int], page: int, block: int, selector: str) -> None:
    num_heads, num_kv_heads, head_size = heads
    budget = 6 * page // block
    edge = budget * block
    batch = make_batch(
        SplaParameters(page, block, budget, selector=selector),
        [edge * 4 + 5, edge - 1, edge, edge + 1, edge + block, edge + page + 1, 1, page, 0], num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_size=head_size, dtype=torch.bfloat16, device=DEVICE, seed=fresh(), chunk=0,
        gain=torch.rand(num_heads) * 2,
    )  # fmt: skip
    for _ in range(2):  # rebuilds the states, then finds them valid
        batch.check(batch.decode(), TOLERANCE[torch.bfloat16])


@gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize(
    ("heads", "page", "block", "selector", "query_len"),
    [
        ((4, 4, 64), 16, 16, "mean", 1),
        ((8, 2, 80), 64, 32, "taylor2", 1),
        ((7, 1, 96), 48, 16, "cumulant2", 1),
        ((8, 2, 128), 64, 64, "rem", 1),
        ((8, 2, 128), 128, 16, "rem", 4),
        ((8, 2, 128), 64, 16, "quest", 1),
        ((8, 2, 128), 64, 16, "km2-rem", 1),
        ((8, 1, 64), 64, 64, "km2-rem", 4),
        ((4, 1, 256), 64, 16, "km2-rem", 1),
    ],
    ids=str,
)
def test_gpu_statistics_in_fp8(
    heads: tuple[int, int, int], page: int, block: int, selector: str, query_len: int
) -> None:
    num_heads, num_kv_heads, head_size = heads
    fp8 = SplaParameters(
        page, block, 6 * page // block, selector=selector, residual=residual_of(selector),
        statistics_dtype="fp8",
    )  # fmt: skip
    edge = 6 * page
    batch = make_batch(
        fp8, [edge * 4 + 5, edge * 3 + 1, edge + 1, edge + page + 1, page + 3, 0], num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_size=head_size, dtype=torch.bfloat16, query_len=query_len, device=DEVICE,
        seed=fresh(), chunk=0,
    )  # fmt: skip
    batch.check(batch.decode(), TOLERANCE[torch.bfloat16])


@gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize(("residual", "block"), [("regression", 16), ("linear", 16), ("regression", 64)])
def test_gpu_finer_blocks_in_verification_rows(residual: str, block: int) -> None:
    batch = make_batch(
        SplaParameters(64, block, 512 // block, residual=residual, selector="km2-rem"),
        [2306, 2305, 1000, 578, 577, 513, 70, 5, 0], num_heads=8, num_kv_heads=2, head_size=128, dtype=torch.bfloat16,
        query_len=4, device=DEVICE, seed=fresh(), chunk=0,
    )  # fmt: skip
    batch.check(batch.decode(), TOLERANCE[torch.bfloat16])


@gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("statistics", ["auto", "fp8"])
@pytest.mark.parametrize("selector", ["rem", "km2-rem"])
def test_gpu_finer_blocks_long_context(selector: str, statistics: str) -> None:
    fine = SplaParameters(64, 16, 64, selector=selector, statistics_dtype=statistics)
    batch = make_batch(
        fine, [40000], num_heads=8, num_kv_heads=2, head_size=128, dtype=torch.bfloat16, device=DEVICE, seed=fresh(),
        chunk=0, max_model_len=131072,
    )  # fmt: skip
    batch.check(batch.decode(), TOLERANCE[torch.bfloat16])


@gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize(
    "heads",
    [(4, 4, 64), (8, 2, 80), (7, 1, 96), (8, 1, 128), (16, 1, 128), (8, 2, 256)],
    ids=["g1-d64", "g4-d80", "g7-d96", "g8-d128", "g16-d128", "g4-d256"],
)
def test_gpu_shapes(heads: tuple[int, int, int], page: int, dtype: torch.dtype) -> None:
    num_heads, num_kv_heads, head_size = heads
    budget = 6
    edge = budget * page
    lengths = [edge * 4 + 5, edge - 1, edge, edge + 1, edge + page, edge + page + 1, 1, page, 0]
    batch = make_batch(
        params(page, budget), lengths, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size,
        dtype=dtype, device=DEVICE, seed=fresh(), chunk=0,
    )  # fmt: skip
    batch.check(batch.decode(), TOLERANCE[dtype])


@gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("residual", ["regression", "linear", "none"])
@pytest.mark.parametrize("combine", ["shared_normalizer", "double_rmsnorm"])
@pytest.mark.parametrize("query_len", [1, 4, [4, 3, 4, 1, 2, 4, 0]], ids=["1", "4", "fewer-drafts"])
def test_gpu_residuals_and_verification(residual: str, combine: str, query_len: int | list[int]) -> None:
    weights = (torch.rand(8, 128) + 0.5, torch.rand(8, 128) + 0.5)
    batch = make_batch(
        params(64, 8, residual=residual, combine=combine, selector="taylor2"), [2300, 577, 578, 515, 70, 5, 0],
        num_heads=8, num_kv_heads=2, head_size=128, dtype=torch.bfloat16, query_len=query_len, device=DEVICE,
        seed=fresh(), chunk=0, norm_weights=weights,
    )  # fmt: skip
    batch.check(batch.decode(), TOLERANCE[torch.bfloat16])


@gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 3, 8, 40, 256])
@pytest.mark.parametrize("top_p", [None, 0.9], ids=["top-k", "top-p"])
def test_gpu_batches_of_mixed_lengths(rows: int, top_p: float | None) -> None:
    seed = fresh()
    lengths = [random.Random(seed + i).randrange(1, 3000) for i in range(rows - rows // 4)] + [0] * (rows // 4)
    batch = make_batch(
        params(64, 16, top_p=top_p), lengths, num_heads=8, num_kv_heads=2, head_size=128, dtype=torch.bfloat16,
        device=DEVICE, seed=seed, chunk=0, max_model_len=8192,
    )  # fmt: skip
    output = batch.decode()
    batch.check(output, TOLERANCE[torch.bfloat16], rows=sorted(random.sample(range(rows), min(rows, 6))))
    assert not bool(output.isnan().any())


@gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("selector", ["rem", "km2-rem"])
def test_gpu_launch_shapes_of_long_rows_in_fp8(selector: str) -> None:
    seed, rows = fresh(), 64
    lengths = [random.Random(seed + i).randrange(1, 9000) for i in range(rows)]
    batch = make_batch(
        SplaParameters(64, 16, 32, selector=selector, statistics_dtype="fp8"), lengths, num_heads=8, num_kv_heads=2,
        head_size=128, dtype=torch.bfloat16, device=DEVICE, seed=seed, chunk=0, max_model_len=131072,
    )  # fmt: skip
    tuning = batch.op.tuning(rows, 1)
    assert tuning.chunk == (64 if selector == "km2-rem" else 128) and tuning.score_registers is None
    output = batch.decode()
    longest = max(range(rows), key=lengths.__getitem__)
    batch.check(output, TOLERANCE[torch.bfloat16], rows=[longest, *random.sample(range(rows), 4)])
    assert not bool(output.isnan().any())


@gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_gpu_edges_of_splits() -> None:
    """Lengths one token to either side of where a tile, a split of the attention or a split of the scoring begins."""
    chunk, splits, tile = 32, 4, 64
    edges = [tile, splits * tile, 2 * splits * tile, 16 * 64, chunk * 64, splits * chunk * 64]
    lengths = [edge + step for edge in edges for step in (-1, 0, 1, 64)]
    batch = make_batch(
        params(64, 16), lengths, num_heads=8, num_kv_heads=2, head_size=128, dtype=torch.bfloat16, device=DEVICE,
        seed=fresh(), chunk=0, tuning=Tuning(splits, splits, chunk=chunk, tile=tile),
    )  # fmt: skip
    batch.check(batch.decode(), TOLERANCE[torch.bfloat16])


@gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("length", [40000, 131072])
def test_gpu_long_context(length: int) -> None:
    batch = make_batch(
        params(64, 32), [length], num_heads=8, num_kv_heads=2, head_size=128, dtype=torch.bfloat16, device=DEVICE,
        seed=fresh(), chunk=0,
    )  # fmt: skip
    batch.check(batch.decode(), TOLERANCE[torch.bfloat16])


@gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("query_len", [1, 4])
def test_gpu_graph_replay(query_len: int) -> None:
    """A graph captured on short rows replays on long ones: nothing but shapes is baked in."""
    batch = make_batch(
        params(64, 8), [1500, 900, 700], num_heads=8, num_kv_heads=2, head_size=128, dtype=torch.bfloat16,
        query_len=query_len, device=DEVICE, seed=fresh(), chunk=0, max_model_len=4096,
    )  # fmt: skip
    expected = batch.decode()
    output = torch.full_like(batch.query, float("nan"))
    graph = batch.capture(output)
    for _ in range(3):
        output.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, expected)


@pytest.mark.parametrize("residual", ["regression", "none"])
def test_what_is_compiled_at_start_up(residual: str) -> None:
    """Every launch shape that a batch can take is among the steps of the warm-up, which change nothing."""
    params = SplaParameters(16, 16, 6, residual=residual)
    batch = make_batch(params, [200, 97, 40], num_heads=4, num_kv_heads=2, head_size=32, query_len=2)
    expected, op = batch.decode(), batch.op
    steps = op.different_steps()
    shapes = {(op.tuning(rows, query_len), query_len) for rows, query_len in steps}
    assert shapes == {(op.tuning(rows, query_len), query_len) for rows in (1, 2, 3) for query_len in (1, 2)}
    batch.store.store_padding()
    for num_rows, query_len in steps:
        op.decode_padding(num_rows, query_len)
    assert torch.equal(batch.decode(), expected)
    many = DecodeSteps(GpuLayer(params, Layer(32, 8, 128, torch.float16, 1.0), "cpu"), limits(256, 4096))
    assert 1 < len(many.different_steps()) < 12
