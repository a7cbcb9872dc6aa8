"""GPU kernels on queries, keys and values of a real model (tests/data): massive keys, a sink, values of all sizes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_flashinfer_decode import needs_flashinfer
from test_triton_prefill import check as check_prefill
from triton_cases import Batch, make_batch

from spla_backend.algorithm.parameters import SplaParameters

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
INPUTS = load_file(Path(__file__).parent.parent / "data" / "smollm2_qkv.safetensors")
HEADS, KV_HEADS, HEAD_SIZE = 9, 3, 64
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
KINDS = {
    "regression": {},
    "paper": {"selector": "taylor2", "residual": "linear", "combine": "double_rmsnorm"},
    "exact": {"residual": "none"},
    "top-p": {"top_p": 0.9},
}
IN_DECODE = {**KINDS, "two-levels": {"fine_block": 16, "least_candidates": 9}}
gpu = pytest.mark.gpu


def captured(length: int, queries: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values `[length, G, d]` and the last `queries` queries; a short cut keeps the sink and the end."""
    q, k, v = (INPUTS[name] for name in "qkv")
    head = min(32, length)
    return *(torch.cat([x[:head], x[len(x) - length + head :]]) for x in (k, v)), q[len(q) - queries :]


def make(
    kind: str, length: int, page: int, budget: int, queries: int, dtype: torch.dtype = torch.float16, **more: object
) -> Batch:
    return make_batch(
        SplaParameters(page, page, budget, **IN_DECODE[kind]), [length], num_heads=HEADS, num_kv_heads=KV_HEADS,
        head_size=HEAD_SIZE, dtype=dtype, query_len=queries, device=DEVICE, chunk=0,
        captured=[captured(length, queries)], **more,
    )  # fmt: skip


@pytest.mark.parametrize("kind", IN_DECODE)
def test_decode(kind: str) -> None:
    page, budget = (32, 3) if kind == "two-levels" else (16, 7)
    batch = make(kind, 333, page, budget, 1)
    batch.check(batch.decode(), TOLERANCE[torch.float16])


def test_verification() -> None:
    batch = make("regression", 333, 16, 7, 4)
    batch.check(batch.decode(), TOLERANCE[torch.float16])


@pytest.mark.parametrize("kind", ["regression", "paper", "exact"])
def test_prefill(kind: str) -> None:
    batch, queries = make(kind, 161, 16, 4, 1), 24
    check_prefill(batch, [(161 - queries, 161)], 6e-3, sample=5, captured=captured(161, queries)[2])


@gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("kind", IN_DECODE)
def test_gpu_decode(kind: str, dtype: torch.dtype) -> None:
    batch = make(kind, len(INPUTS["k"]), 64, 8, 4, dtype)
    batch.check(batch.decode(), TOLERANCE[dtype])


@gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_prefill(kind: str) -> None:
    length = len(INPUTS["k"])
    batch = make(kind, length, 32, 8, 1)
    check_prefill(batch, [(length - 64, length)], 6e-3, sample=7, captured=captured(length, 64)[2])


@gpu
@needs_flashinfer
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_flashinfer(kind: str) -> None:
    batch = make(kind, len(INPUTS["k"]), 64, 8, 4, executor="flashinfer")
    batch.check(batch.decode(), TOLERANCE[torch.float16])
