"""Reading of blocks by a kernel against the plain form in float64, and its gradients."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from spla_backend import training
from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.residual import make_residual
from spla_backend.algorithm.sequence import spla_attention
from spla_backend.kernels.training.read_blocks import SMALL_TILE, TILE, read_chosen_sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
READERS = {torch.float32: read_chosen_sums, torch.float64: None}
LINEAR = {"residual": "linear", "combine": "double_rmsnorm", "rms_norm_eps": 1.0}


def check(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert got.isfinite().all()
    assert float((got.double() - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("residual", ["regression", "linear"])
@pytest.mark.parametrize(
    ("d", "queries", "blocks", "tile"),
    [(64, 300, 5, TILE), (24, 128, 3, TILE), (128, 90, 2, TILE), (64, 300, 5, SMALL_TILE)],
)
def test_reads_as_the_plain_form(monkeypatch, residual, d, queries, blocks, tile):
    """Some tiles read nothing of a block, some queries nothing at all."""
    monkeypatch.setattr("spla_backend.kernels.training.read_blocks.TILE", tile)
    generator = torch.Generator().manual_seed(d)
    q, keys, values = (
        torch.randn(*shape, d, generator=generator) for shape in ((2, queries), (2, blocks, 16), (2, blocks, 16))
    )
    chosen = torch.rand(2, queries, blocks, generator=generator) < 0.6
    chosen[:, :130, 1:] = False
    chosen[:, 5] = False
    params = SplaParameters(16, 16, 4, residual=residual)
    results = []
    for dtype, reader in READERS.items():
        leaves = [x.detach().to(DEVICE, dtype).requires_grad_() for x in (q, keys, values)]
        reading = make_residual(params, d).read_blocks(*leaves, chosen.to(DEVICE), reader)
        weights = [torch.linspace(-1, 2, part.numel(), dtype=dtype, device=DEVICE).view_as(part) for part in reading]
        sum((part * weight).sum() for part, weight in zip(reading, weights, strict=True)).backward()
        results.append([*(part.detach() for part in reading), *(x.grad for x in leaves)])
    for got, expected in zip(*results, strict=True):
        check(got, expected, 1e-5)


@pytest.mark.parametrize("options", [{}, LINEAR, {**LINEAR, "combine": "shared_normalizer"}])
def test_attention_and_gradients(options):
    params = replace(SplaParameters(16, 16, 4, first_blocks=1, last_blocks=2), **options)
    generator = torch.Generator().manual_seed(1)
    heads, kv_heads, length, d = 6, 2, 200, 32
    shapes = [(2, heads, length, d), *[(2, kv_heads, length, d)] * 2, (heads,), (heads, d), (heads, d)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    results = []
    for dtype, reader in READERS.items():
        q, k, v, log_gain, *norms = (x.detach().to(DEVICE, dtype).requires_grad_() for x in inputs)
        output = spla_attention(q, k, v, params, log_gain=log_gain, norm_weights=tuple(norms), reader=reader)
        (output * torch.linspace(-1, 2, output.numel(), dtype=dtype, device=DEVICE).view_as(output)).sum().backward()
        results.append([output.detach(), *(x.grad for x in (q, k, v, log_gain, *norms) if x.grad is not None)])
    for got, expected in zip(*results, strict=True):
        check(got, expected, 1e-4)


def test_training_reads_by_the_kernel():
    def reader(d, device="cuda", dtype=torch.bfloat16, **options):
        with FakeTensorMode():
            return training.block_reader(
                SplaParameters(16, 16, 4, **options), torch.empty(1, d, dtype=dtype, device=device)
            )

    assert reader(64) is reader(128, residual="linear") is read_chosen_sums
    assert reader(256) is reader(64, "cpu") is reader(64, dtype=torch.float64) is reader(64, residual="none") is None
