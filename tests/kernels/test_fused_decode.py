"""The fused decode launch against the float64 reference: emulated on the CPU, and on a GPU."""

import gc
import random
import weakref

import pytest
import torch
from emulated import COMPILER, EmulatedDecode
from test_two_levels import check_poison, edges
from test_two_levels import params as two_level_params
from triton_cases import make_batch, residual_of

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.kernels.gpu.decode import fused
from spla_backend.kernels.gpu.decode.fused import FusedDecode
from spla_backend.kernels.gpu.layer import GpuLayer
from spla_backend.kernels.interface import Layer

GPU = torch.cuda.is_available()
SELECTORS = [selector.name for selector in fused.SELECTORS]


def needs_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not GPU, reason="needs a GPU")(test))


emulated = pytest.mark.skipif(COMPILER is None, reason="needs g++ to emulate the kernel")


def fresh() -> int:
    return random.randrange(1 << 30)


scored = pytest.mark.parametrize("score_blocks", [0, 3], ids=["", "scored-ahead"])


def emulate(batch, blocks: int, score_blocks: int = 0) -> None:
    """Let the batch's op decode with the emulated kernel."""
    longest = batch.op.sizes.max_pages * batch.layer.params.page_size
    batch.op.fused = EmulatedDecode(
        batch.layer, longest, fixed_blocks=blocks, fixed_score_blocks=score_blocks, choosing_bytes=0
    )


@emulated
@pytest.mark.parametrize("fused", [False, True], ids=["launches", "fused"])
def test_a_layer_ends_with_its_engine(fused: bool) -> None:
    """Nothing of the process holds it, so that a second engine finds its memory free."""
    batch = make_batch(SplaParameters(16, 16, 5), [200], num_heads=4, num_kv_heads=2, head_size=64, seed=fresh())
    if fused:
        emulate(batch, 2)
    batch.decode()
    held = [weakref.ref(x) for x in (batch.layer, batch.op, batch.store, batch.op.fused) if x is not None]
    assert len(held) == 3 + fused
    del batch
    gc.collect()
    assert [x() for x in held] == [None] * len(held)


@emulated
@scored
@pytest.mark.parametrize(
    ("blocks", "lengths", "heads"), [(1, [16, 97], 2), (2, [1, 15, 17, 80, 81, 96, 300, 0], 1), (16, [331], 1)]
)
def test_lengths_around_page_and_budget_edges_and_padding(
    blocks: int, lengths: list[int], heads: int, score_blocks: int
) -> None:
    params = SplaParameters(16, 16, 5)
    batch = make_batch(params, lengths, num_heads=4 * heads, num_kv_heads=heads, head_size=64, seed=fresh())
    emulate(batch, blocks, score_blocks)
    batch.check(batch.decode(), 2e-3)
    again = batch.decode(steady=True)
    batch.check(again, 2e-3)


@emulated
@scored
@pytest.mark.parametrize("heads", [1, 2, 7], ids=lambda n: f"group{n}")
def test_groups(heads: int, score_blocks: int) -> None:
    batch = make_batch(
        SplaParameters(32, 32, 4), [331, 128], num_heads=heads, num_kv_heads=1, head_size=128, dtype=torch.bfloat16,
        seed=fresh(), gain=torch.rand(heads) * 2,
    )  # fmt: skip
    emulate(batch, 4, score_blocks)
    batch.check(batch.decode(), 1e-2)


@emulated
@scored
@pytest.mark.parametrize("selector", SELECTORS)
def test_selectors(selector: str, score_blocks: int) -> None:
    params = SplaParameters(16, 16, 5, selector=selector, residual=residual_of(selector))
    batch = make_batch(params, [250, 81], num_heads=4, num_kv_heads=1, head_size=64, seed=fresh())
    emulate(batch, 2, score_blocks)
    batch.check(batch.decode(), 2e-3)


@emulated
@scored
@pytest.mark.parametrize("block", [16, 32])
def test_finer_blocks(block: int, score_blocks: int) -> None:
    params = SplaParameters(64, block, 160 // block)
    batch = make_batch(params, [331, 257, 160, 3], num_heads=4, num_kv_heads=2, head_size=64, seed=fresh(), chunk=0)
    emulate(batch, 2, score_blocks)
    batch.check(batch.decode(), 2e-3)


@emulated
@scored
@pytest.mark.parametrize(
    ("heads", "head_size", "block", "dtype", "selector"),
    [
        (3, 128, 64, torch.bfloat16, "rem"),
        (8, 64, 16, torch.float16, "rem"),
        (4, 64, 32, torch.bfloat16, "rem"),
        (4, 64, 32, torch.bfloat16, "quest"),
    ],
    ids=["g3-d128-bf16", "g8-d64-b16-fp16", "g4-d64-b32-bf16", "quest-g4-d64-b32-bf16"],
)
def test_statistics_in_fp8(
    heads: int, head_size: int, block: int, dtype: torch.dtype, selector: str, score_blocks: int
) -> None:
    params = SplaParameters(
        64, block, 256 // block, selector=selector, statistics_dtype="fp8", residual=residual_of(selector)
    )  # fmt: skip
    batch = make_batch(
        params, [64 * 36 + 5, 331, 3], num_heads=heads, num_kv_heads=1, head_size=head_size, dtype=dtype, seed=fresh(),
        chunk=0,
    )  # fmt: skip
    emulate(batch, 2, score_blocks)
    batch.check(batch.decode(), 2e-3 if dtype == torch.float16 else 1e-2)


@emulated
def test_ties_go_to_the_lower_page() -> None:
    batch = make_batch(SplaParameters(16, 16, 5), [200], num_heads=8, num_kv_heads=2, head_size=64, seed=fresh())
    batch.keys[0][:] = batch.keys[0][:16].repeat(13, 1, 1)[:200]
    batch.write(0, 0, 200)
    emulate(batch, 2)
    batch.decode()
    for head in range(2):
        assert batch.selected(0, 0, head) == [0, 1, 2, 11, 12]


@emulated
def test_many_units_about_the_threshold() -> None:
    """More of them than are ranked against each other: the bins are refined until few are left, or none but ties."""
    params = SplaParameters(16, 16, 9)
    batch = make_batch(params, [400, 331], num_heads=4, num_kv_heads=1, head_size=64, seed=fresh())
    batch.keys[0][48:240] = batch.keys[0][48:64].repeat(12, 1, 1)  # of the first row the pages 3 to 14 are alike
    batch.query[0] = batch.keys[0][48:64].mean(0) * 8
    batch.write(0, 0, 400)
    emulate(batch, 2)
    batch.op.fused.defines["MOST_MEMBERS"] = 2
    batch.check(batch.decode(), 2e-3)
    assert batch.selected(0, 0, 0) == [0, 3, 4, 5, 6, 7, 8, 23, 24]


def two_levels(page: int = 32, block: int = 32, budget: int = 4, candidates: int = 2, **more) -> SplaParameters:
    return two_level_params(page, block, budget, candidates=candidates, fine_source="int4", **more)


@emulated
@scored
@pytest.mark.parametrize(("page", "block", "budget", "blocks"), [(32, 32, 4, 2), (64, 16, 8, 1), (64, 64, 3, 4)])
def test_two_levels_around_every_edge(page: int, block: int, budget: int, blocks: int, score_blocks: int) -> None:
    params = two_levels(page, block, budget)
    batch = make_batch(params, [*edges(params), 0], num_heads=4, num_kv_heads=1, head_size=64, seed=fresh(), chunk=0)
    emulate(batch, blocks, score_blocks)
    for _ in range(2):
        batch.check(batch.decode(steady=True), 2e-3)


@emulated
@scored
@pytest.mark.parametrize(
    ("heads", "head_size", "dtype", "more"),
    [
        (1, 64, torch.float16, {"selector": "taylor2", "candidates": 3}),
        (3, 128, torch.bfloat16, {"statistics_dtype": "fp8", "budget": 5}),
        (8, 64, torch.float16, {"statistics_dtype": "fp8", "selector": "cumulant2"}),
        (7, 128, torch.bfloat16, {"residual": "none"}),
    ],
    ids=str,
)
def test_two_levels_of_every_group(
    heads: int, head_size: int, dtype: torch.dtype, more: dict, score_blocks: int
) -> None:
    batch = make_batch(
        two_levels(**more), [500, 330], num_heads=heads, num_kv_heads=1, head_size=head_size, dtype=dtype,
        seed=fresh(), chunk=0, gain=torch.rand(heads) * 2,
    )  # fmt: skip
    emulate(batch, 2, score_blocks)
    batch.check(batch.decode(), 2e-3 if dtype == torch.float16 else 1e-2)


@emulated
@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_two_levels_read_nothing_else() -> None:
    batch = make_batch(
        two_levels(64, 32), [387, 260, 250, 0], num_heads=4, num_kv_heads=2, head_size=64, seed=fresh(), chunk=0
    )  # fmt: skip
    emulate(batch, 2)
    check_poison(batch, 2e-3)


@emulated
def test_two_levels_ties_go_to_the_lower_block() -> None:
    batch = make_batch(two_levels(), [450], num_heads=4, num_kv_heads=2, head_size=64, seed=fresh(), chunk=0)
    batch.keys[0][:] = batch.keys[0][:16].repeat(29, 1, 1)[:450]
    batch.write(0, 0, 450)
    emulate(batch, 2)
    batch.decode()
    for head in range(2):
        assert batch.candidates(0, 0, head) == [0, 1, 2, 3, 4, 5, 13, 14]
        assert batch.selected(0, 0, head) == [0, 1, 2, 3, 4, 26, 27, 28]


def test_scores_are_made_ahead_for_few_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H200, of which 15 clusters of 8 blocks or 33 of 4 take hold at once."""
    monkeypatch.setattr(FusedDecode, "max_clusters", lambda self, blocks: {16: 7, 8: 15, 4: 33, 2: 66, 1: 132}[blocks])

    def blocks(num_rows: int, max_model_len: int = 524288, group: int = 4, **params) -> int:
        parameters = SplaParameters(64, params.pop("block", 64), 32, **params)
        layer = GpuLayer(parameters, Layer(8 * group, 8, 128, torch.bfloat16, 1.0), "cpu")
        return FusedDecode(layer, max_model_len).score_blocks(num_rows)

    assert [blocks(num_rows) for num_rows in (1, 2, 3, 8)] == [132, 66, 0, 0]
    assert blocks(1, statistics_dtype="fp8") == 132
    assert blocks(1, max_model_len=393216) == 132 and blocks(1, max_model_len=393215 - 64) == 0
    assert blocks(1, group=8) == 0 and blocks(1, block=16) == 0


# Real sizes


@needs_gpu
@pytest.mark.parametrize("statistics", ["auto", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    ("heads", "page"),
    [((4, 4, 64), 16), ((7, 1, 128), 32), ((8, 2, 128), 64), ((16, 2, 64), 64), ((16, 2, 128), 128), ((9, 3, 64), 128)],
    ids=["g1-d64-p16", "g7-d128-p32", "g4-d128-p64", "g8-d64-p64", "g8-d128-p128", "g3-d64-p128"],
)
def test_gpu_shapes(heads: tuple[int, int, int], page: int, dtype: torch.dtype, statistics: str) -> None:
    num_heads, num_kv_heads, head_size = heads
    edge = 6 * page
    lengths = [edge * 4 + 5, edge - 1, edge, edge + 1, edge + page, edge + page + 1, 1, page, 0]
    params = SplaParameters(page, page, 6, statistics_dtype=statistics)
    batch = make_batch(
        params, lengths, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, dtype=dtype,
        device="cuda", seed=fresh(), chunk=0, gain=torch.rand(num_heads) * 2,
    )  # fmt: skip
    for blocks, score_blocks in ((1, 0), (2, 5), (8, 0), (8, 40)):
        batch.op.fused.fixed_blocks, batch.op.fused.fixed_score_blocks = blocks, score_blocks
        for _ in range(2):  # rebuilds the states, then finds them valid
            output = batch.decode()
            batch.check(output, 2e-3 if dtype == torch.float16 else 1e-2)
            assert not bool(output.isnan().any())


@needs_gpu
@pytest.mark.parametrize("statistics", ["auto", "fp8"])
@pytest.mark.parametrize("selector", SELECTORS)
def test_gpu_selectors(selector: str, statistics: str) -> None:
    params = SplaParameters(
        64, 64, 8, selector=selector, residual=residual_of(selector),
        statistics_dtype=statistics,
    )  # fmt: skip
    batch = make_batch(
        params, [2300, 577, 70], num_heads=8, num_kv_heads=2, head_size=128, dtype=torch.bfloat16, device="cuda",
        seed=fresh(), chunk=0,
    )  # fmt: skip
    for score_blocks in (0, 3):
        batch.op.fused.fixed_score_blocks = score_blocks
        batch.check(batch.decode(), 1e-2)


@needs_gpu
@pytest.mark.parametrize("statistics", ["auto", "fp8"])
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("heads", [(8, 1, 64), (8, 2, 128)], ids=["g8-d64", "g4-d128"])
def test_gpu_finer_blocks(heads: tuple[int, int, int], block: int, statistics: str) -> None:
    num_heads, num_kv_heads, head_size = heads
    params = SplaParameters(64, block, 512 // block, statistics_dtype=statistics)
    batch = make_batch(
        params, [2300, 577, 513, 512, 511, 70, 0], num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_size=head_size, dtype=torch.bfloat16, device="cuda", seed=fresh(), chunk=0,
    )  # fmt: skip
    for blocks, score_blocks in ((1, 0), (2, 5), (8, 0), (8, 40)):
        batch.op.fused.fixed_blocks, batch.op.fused.fixed_score_blocks = blocks, score_blocks
        for _ in range(2):  # rebuilds the states, then finds them valid
            batch.check(batch.decode(), 1e-2)


@needs_gpu
@pytest.mark.parametrize("statistics", ["auto", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    ("heads", "page", "block", "selector"),
    [
        ((8, 2, 128), 64, 64, "rem"),
        ((16, 2, 64), 64, 32, "taylor2"),
        ((14, 2, 128), 128, 128, "cumulant2"),
        ((8, 1, 128), 64, 16, "rem"),
        ((4, 4, 64), 16, 16, "rem"),
    ],
    ids=str,
)
def test_gpu_two_levels(
    heads: tuple, page: int, block: int, selector: str, dtype: torch.dtype, statistics: str
) -> None:
    num_heads, num_kv_heads, head_size = heads
    params = two_levels(page, block, 6 * page // block, 3, selector=selector, statistics_dtype=statistics)
    batch = make_batch(
        params, [*edges(params), 12 * params.budget_tokens + 5, 0], num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_size=head_size, dtype=dtype, device="cuda", seed=fresh(), chunk=0, gain=torch.rand(num_heads) * 2,
    )  # fmt: skip
    for blocks, score_blocks in ((1, 0), (2, 5), (8, 0), (8, 40)):
        batch.op.fused.fixed_blocks, batch.op.fused.fixed_score_blocks = blocks, score_blocks
        for _ in range(2):  # rebuilds the states, then finds them valid
            batch.check(batch.decode(), 2e-3 if dtype == torch.float16 else 1e-2)


@needs_gpu
@pytest.mark.parametrize("length", [9000, 40000, 131072])
def test_gpu_two_levels_long_context(length: int) -> None:
    batch = make_batch(
        two_levels(64, 64, 32, 4, statistics_dtype="fp8"), [length], num_heads=4, num_kv_heads=1, head_size=128,
        dtype=torch.bfloat16, device="cuda", seed=fresh(), chunk=0,
    )  # fmt: skip
    for _ in range(2):
        batch.check(batch.decode(), 1e-2)
    check_poison(batch, 1e-2)


@needs_gpu
@pytest.mark.parametrize("statistics", ["auto", "fp8"])
@pytest.mark.parametrize("length", [40000, 131072, 524288 - 7])
def test_gpu_long_context(length: int, statistics: str) -> None:
    params = SplaParameters(64, 64, 32, statistics_dtype=statistics)
    batch = make_batch(
        params, [length], num_heads=4, num_kv_heads=1, head_size=128, dtype=torch.bfloat16,
        device="cuda", seed=fresh(), chunk=0,
    )  # fmt: skip
    for score_blocks in (0, 0, 132):  # rebuilds the state, then finds it valid
        batch.op.fused.fixed_score_blocks = score_blocks
        batch.check(batch.decode(), 1e-2)


@needs_gpu
@scored
@pytest.mark.parametrize("params", [SplaParameters(64, 64, 8), two_levels(64, 64, 4)], ids=["one-level", "two-levels"])
def test_gpu_graph_replay(params: SplaParameters, score_blocks: int) -> None:
    """A graph captured on short rows replays on long ones, bit for bit."""
    batch = make_batch(
        params, [1500, 900, 700], num_heads=8, num_kv_heads=2, head_size=128, dtype=torch.bfloat16,
        device="cuda", seed=fresh(), chunk=0, max_model_len=4096,
    )  # fmt: skip
    batch.op.fused.fixed_score_blocks = score_blocks
    expected = batch.decode()
    output = torch.full_like(batch.query, float("nan"))
    graph = batch.capture(output)
    batch.decode()
    for _ in range(3):
        output.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, expected)
