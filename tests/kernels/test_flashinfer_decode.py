"""The executor `flashinfer`: FlashInfer itself on a GPU; elsewhere a plain reader of the buffers that it would read."""

import importlib.util
import random

import pytest
import torch
from triton_cases import Batch, limits, make_batch

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.kernels.gpu.decode import flashinfer as flashinfer_decode
from spla_backend.kernels.gpu.decode.steps import DecodeSteps
from spla_backend.kernels.gpu.decode.tuning import Tuning
from spla_backend.kernels.gpu.layer import GpuLayer
from spla_backend.kernels.interface import Layer

GPU = torch.cuda.is_available()
FLASHINFER = importlib.util.find_spec("flashinfer") is not None
gpu = pytest.mark.gpu
needs_flashinfer = pytest.mark.skipif(not (GPU and FLASHINFER), reason="needs a GPU and FlashInfer")


def fresh() -> int:
    return random.randrange(1 << 30)


def plain_reader(sizes, indptr, indices, last_page_len, *, group, head_size, page_size, dtype, scale):
    """What `plan_flashinfer` returns, read token by token as FlashInfer's `paged_kv_t` does."""

    def attend(query, keys, values, out, lse):
        for request in range(len(query)):
            first, stop = int(indptr[request]), int(indptr[request + 1])
            length = (stop - first - 1) * page_size + int(last_page_len[request])
            assert 0 <= length <= (stop - first) * page_size
            if length == 0:
                out[request], lse[request] = 0, float("-inf")
                continue
            ids = indices[first : first + -(-length // page_size)].long()
            k, v = (x[ids, 0].flatten(0, 1)[:length].float() for x in (keys, values))  # [length, d]
            logits = query[request].float() @ k.T * scale
            out[request] = logits.softmax(-1) @ v
            lse[request] = logits.logsumexp(-1) * 1.4426950408889634  # to base 2

    return dict.fromkeys(sizes, attend), 0


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain reader in FlashInfer's place, for head sizes that are quick to interpret."""
    monkeypatch.setattr(flashinfer_decode, "plan_flashinfer", plain_reader)
    monkeypatch.setattr("spla_backend.kernels.gpu.checks.check_flashinfer", lambda head_size: None)


def small(params: SplaParameters, lengths: list[int], **arguments: object) -> Batch:
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_size": 32}
    batch = make_batch(params, lengths, device="cpu", seed=fresh(), executor="flashinfer", **{**shape, **arguments})
    assert batch.op.flashinfer is not None
    return batch


@pytest.mark.skipif(GPU, reason="FlashInfer itself is tested there")
@pytest.mark.parametrize("residual", ["regression", "linear", "none"])
@pytest.mark.parametrize("combine", ["shared_normalizer", "double_rmsnorm"])
def test_residual_and_combination(reader: None, residual: str, combine: str) -> None:
    weights = (torch.rand(4, 32) + 0.5, torch.rand(4, 32) + 0.5)
    batch = small(
        SplaParameters(16, 16, 5, residual=residual, combine=combine), [150, 97, 80, 0], norm_weights=weights,
        gain=torch.tensor([0.0, 0.5, 1.0, 2.0]),
    )  # fmt: skip
    batch.check(batch.decode(), 2e-3)


@pytest.mark.skipif(GPU, reason="FlashInfer itself is tested there")
def test_short_rows_and_padding(reader: None) -> None:
    """Rows with fewer pages than the budget, around every edge, and more rows than planned sizes."""
    batch = small(SplaParameters(16, 16, 5), [1, 15, 16, 17, 80, 81, 96, 97, 0, 0], head_size=48)
    batch.check(batch.decode(), 2e-3)


@pytest.mark.skipif(GPU, reason="FlashInfer itself is tested there")
@pytest.mark.parametrize("query_len", [3, [3, 1, 2, 3, 2, 0]], ids=["uniform", "fewer-drafts"])
def test_top_p_verification_and_splits(reader: None, query_len: int | list[int]) -> None:
    tuning = Tuning(2, 3, chunk=16, tile=32, mass_splits=2)
    batch = small(SplaParameters(16, 16, 8, top_p=0.7), [230, 97, 98, 40, 3, 0], query_len=query_len, tuning=tuning)
    batch.check(batch.decode(), 2e-3)


def test_refused_where_flashinfer_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(head_size: int, executor: str = "flashinfer") -> DecodeSteps:
        layer = GpuLayer(SplaParameters(16, 16, 5), Layer(2, 1, head_size, torch.float16, 1.0), "cpu")
        return DecodeSteps(layer, limits(1, 64), executor=executor)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="executor 'flashinfer' has no kernel for head_size 80, only"):
        make(80)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="executor 'flashinfer' needs the package flashinfer-python"):
        make(64)
    with pytest.raises(ValueError, match="executor 'cutlass' is neither spla nor flashinfer"):
        make(64, "cutlass")


def test_refused_on_other_layouts(reader: None) -> None:
    batch = small(SplaParameters(16, 16, 5), [20], token_major=True)
    with pytest.raises(ValueError, match="head-major pages"):
        batch.decode()


# FlashInfer, whose kernels are compiled for each dtype and head size, half a minute each: two of them here.


def check(params: SplaParameters, lengths: list[int], **arguments: object) -> tuple[Batch, torch.Tensor]:
    """A batch and its output, which agrees with the reference."""
    shape = {"num_heads": 8, "num_kv_heads": 2, "head_size": 128, "dtype": torch.bfloat16, "chunk": 0, "seed": fresh()}
    batch = make_batch(params, lengths, device="cuda", **{"executor": "flashinfer", **shape, **arguments})
    output = batch.decode()
    assert not bool(output.isnan().any())
    longest = sorted(range(len(lengths)), key=lambda row: -lengths[row])[:12]
    batch.check(output, 2e-3 if output.dtype is torch.float16 else 1e-2, rows=longest)
    return batch, output


@gpu
@needs_flashinfer
@pytest.mark.parametrize("residual", ["regression", "linear", "none"])
@pytest.mark.parametrize(
    ("combine", "query_len"), [("shared_normalizer", 1), ("double_rmsnorm", 1), ("shared_normalizer", 4)]
)
def test_gpu_residual_and_combination(residual: str, combine: str, query_len: int) -> None:
    weights = (torch.rand(8, 128) + 0.5, torch.rand(8, 128) + 0.5)
    check(
        SplaParameters(64, 64, 8, residual=residual, combine=combine), [2300, 577, 578, 515, 70, 5, 0],
        query_len=query_len, norm_weights=weights,
    )  # fmt: skip


@gpu
@needs_flashinfer
@pytest.mark.parametrize(
    ("heads", "page", "dtype"),
    [
        ((3, 3, 128), 64, torch.bfloat16),
        ((7, 1, 128), 32, torch.bfloat16),
        ((16, 1, 128), 128, torch.bfloat16),
        ((8, 1, 128), 16, torch.bfloat16),
        ((9, 3, 64), 64, torch.float16),
        ((12, 3, 64), 48, torch.float16),
    ],
    ids=["g1-d128-p64", "g7-d128-p32", "g16-d128-p128", "g8-d128-p16", "g3-d64-p64", "g4-d64-p48"],
)
def test_gpu_shapes(heads: tuple[int, int, int], page: int, dtype: torch.dtype) -> None:
    num_heads, num_kv_heads, head_size = heads
    edge = 6 * page
    lengths = [edge * 4 + 5, edge - 1, edge, edge + 1, edge + page, edge + page + 1, 1, page, 0]
    check(
        SplaParameters(page, page, 6), lengths, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size,
        dtype=dtype,
    )  # fmt: skip


@gpu
@needs_flashinfer
@pytest.mark.parametrize(("rows", "top_p"), [(1, None), (9, None), (40, None), (256, None), (40, 0.9)])
def test_gpu_executors_agree(rows: int, top_p: float | None) -> None:
    """On batches of mixed lengths, padded ones among them, where no page is at a tie."""
    lengths = [random.Random(i + rows).randrange(1, 3000) for i in range(rows - rows // 4)] + [0] * (rows // 4)
    seed, params = fresh(), SplaParameters(64, 64, 32, top_p=top_p)
    outputs, tables = [], []
    for executor in ("spla", "flashinfer"):
        batch, output = check(params, lengths, max_model_len=8192, seed=seed, executor=executor)
        outputs.append(output.double().unflatten(1, (2, 4)))  # [rows, G, H / G, d]
        tables.append([[batch.selected(row, row, head) for head in range(2)] for row in range(rows - rows // 4)])
    same = torch.tensor([[a == b for a, b in zip(*pair, strict=True)] for pair in zip(*tables, strict=True)])
    assert float(same.double().mean()) > 0.98
    ours, theirs = (x[: len(same)][same.to(x.device)] for x in outputs)
    assert float((ours - theirs).norm() / ours.norm()) < 6e-3


@gpu
@needs_flashinfer
@pytest.mark.parametrize("query_len", [1, 4])
def test_gpu_graph_replay(query_len: int) -> None:
    """Captured on the shortest rows and replayed on long, short and padded ones, without a plan between."""
    batch, expected = check(
        SplaParameters(64, 64, 32), [5000, 900, 2049, 70], query_len=query_len, max_model_len=8192
    )  # fmt: skip
    lengths, output = batch.seq_lens.clone(), torch.full_like(batch.query, float("nan"))
    graph = batch.capture(output)
    for _ in range(2):
        batch.seq_lens.copy_(lengths)
        batch.query_start_loc.copy_(torch.arange(5) * query_len)
        output.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, expected)
        batch.seq_lens[2:] = 0
        batch.query_start_loc[3:] = batch.query_start_loc[2]
        output.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output[: 2 * query_len], expected[: 2 * query_len])
        assert float(output[2 * query_len :].float().abs().sum()) == 0
