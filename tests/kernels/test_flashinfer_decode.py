"""The executor `flashinfer`: FlashInfer itself on a GPU; elsewhere a plain reader of the buffers that it would read."""

import importlib.util
import random

import pytest
import torch
from triton_cases import Batch, make_batch

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.kernels import flashinfer_decode
from spla_backend.kernels.triton_decode import TritonPagedSpla, Tuning, _Scratch

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
    monkeypatch.setattr(_Scratch, "_instances", {})
    monkeypatch.setattr(flashinfer_decode, "plan_flashinfer", plain_reader)
    monkeypatch.setattr("spla_backend.kernels.triton_decode.check_flashinfer", lambda head_size: None)


def small(params: SplaParameters, lengths: list[int], **arguments: object) -> Batch:
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_size": 32}
    batch = make_batch(params, lengths, device="cpu", seed=fresh(), executor="flashinfer", **{**shape, **arguments})
    assert batch.op._flashinfer is not None
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
def test_top_p_verification_and_splits(reader: None) -> None:
    tuning = Tuning(2, 3, chunk=16, tile=32, mass_parts=2)
    batch = small(SplaParameters(16, 16, 8, top_p=0.7), [230, 97, 98, 40, 3, 0], query_len=3, tuning=tuning)
    batch.check(batch.decode(), 2e-3)


def test_refused_where_flashinfer_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"num_heads": 2, "num_kv_heads": 1, "cache_dtype": torch.float16, "scale": 1.0, "max_num_rows": 1}

    def make(head_size: int, executor: str = "flashinfer") -> TritonPagedSpla:
        return TritonPagedSpla(
            SplaParameters(16, 16, 5), head_size=head_size, max_model_len=64, device="cpu", executor=executor, **shape
        )

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


# FlashInfer. Its kernels are compiled for each dtype and head size, half a minute each: few of them, on one worker.


def both(params: SplaParameters, lengths: list[int], **arguments: object) -> tuple[Batch, torch.Tensor]:
    """Both executors against the reference and each other; the batch of FlashInfer's and its output."""
    seed = fresh()
    shape = {"num_heads": 8, "num_kv_heads": 2, "head_size": 128, "dtype": torch.bfloat16, "chunk": 0}
    outputs = {}
    for executor in ("spla", "flashinfer"):
        batch = make_batch(params, lengths, device="cuda", seed=seed, executor=executor, **{**shape, **arguments})
        outputs[executor] = batch.decode()
        tolerance = 2e-3 if batch.query.dtype is torch.float16 else 1e-2
        longest = sorted(range(len(lengths)), key=lambda row: -lengths[row])[:12]
        batch.check(outputs[executor], tolerance, rows=longest)
        assert not bool(outputs[executor].isnan().any())
    ours, theirs = outputs["spla"].double(), outputs["flashinfer"].double()
    assert float((ours - theirs).norm() / ours.norm()) < tolerance
    return batch, outputs["flashinfer"]


@gpu
@needs_flashinfer
@pytest.mark.xdist_group("flashinfer")
@pytest.mark.parametrize("residual", ["regression", "linear", "none"])
@pytest.mark.parametrize("combine", ["shared_normalizer", "double_rmsnorm"])
@pytest.mark.parametrize("query_len", [1, 4])
def test_gpu_residual_and_combination(residual: str, combine: str, query_len: int) -> None:
    weights = (torch.rand(8, 128) + 0.5, torch.rand(8, 128) + 0.5)
    both(
        SplaParameters(64, 64, 8, residual=residual, combine=combine), [2300, 577, 578, 515, 70, 5, 0],
        query_len=query_len, norm_weights=weights,
    )  # fmt: skip


@gpu
@needs_flashinfer
@pytest.mark.xdist_group("flashinfer")
@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize(
    ("heads", "dtype"),
    [((3, 3, 128), torch.bfloat16), ((7, 1, 128), torch.bfloat16), ((16, 1, 128), torch.bfloat16),
     ((9, 3, 64), torch.float16)],
    ids=["g1-d128", "g7-d128", "g16-d128", "g3-d64-fp16"],
)  # fmt: skip
def test_gpu_shapes(heads: tuple[int, int, int], dtype: torch.dtype, page: int) -> None:
    num_heads, num_kv_heads, head_size = heads
    edge = 6 * page
    lengths = [edge * 4 + 5, edge - 1, edge, edge + 1, edge + page, edge + page + 1, 1, page, 0]
    both(
        SplaParameters(page, page, 6), lengths, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size,
        dtype=dtype,
    )  # fmt: skip


@gpu
@needs_flashinfer
@pytest.mark.xdist_group("flashinfer")
@pytest.mark.parametrize("rows", [1, 3, 9, 40, 256])
@pytest.mark.parametrize("top_p", [None, 0.9], ids=["top-k", "top-p"])
def test_gpu_batches_of_mixed_lengths(rows: int, top_p: float | None) -> None:
    lengths = [random.Random(i + rows).randrange(1, 3000) for i in range(rows)]
    both(SplaParameters(64, 64, 32, top_p=top_p), lengths, max_model_len=8192)


@gpu
@needs_flashinfer
@pytest.mark.xdist_group("flashinfer")
@pytest.mark.parametrize("query_len", [1, 4])
def test_gpu_graph_replay(query_len: int) -> None:
    """Captured on the shortest rows and replayed on long, short and padded ones, without a plan between."""
    batch, expected = both(
        SplaParameters(64, 64, 32), [5000, 900, 2049, 70], query_len=query_len, max_model_len=8192
    )  # fmt: skip
    lengths, output = batch.seq_lens.clone(), torch.full_like(batch.query, float("nan"))
    batch.seq_lens.fill_(query_len)

    def run() -> None:
        batch.op.decode(
            batch.query, batch.kv_cache, batch.kv_cache, batch.query_start_loc, batch.seq_lens, batch.block_table,
            batch.state_table, output, query_len,
        )  # fmt: skip

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
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
