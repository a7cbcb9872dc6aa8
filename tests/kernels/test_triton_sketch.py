"""Sketches of keys in pages, bit for bit what the algorithm makes of the page's own keys and mean."""

import pytest
import torch
from triton_cases import Batch, make_batch

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.sketch import sketch
from spla_backend.kernels.gpu import store

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def params(page: int = 32, block: int = 16, selector: str = "rem", statistics: str = "auto") -> SplaParameters:
    return SplaParameters(
        page, block, 4, selector=selector, statistics_dtype=statistics, fine_block=16, fine_source="int4",
        residual="none",
    )  # fmt: skip


@pytest.fixture(params=[512, 0], ids=["a-token", "32-tokens"])
def of_a_program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many tokens a program stores."""
    monkeypatch.setattr(store, "FEW_TOKENS", request.param)
    monkeypatch.setattr(store.Store, "launches", {})


def check(batch: Batch, num_pages: int) -> None:
    """The sketches of the first pages of row 0, of the keys that these hold, whatever they are."""
    layout, d = batch.layer.page_layout, batch.layer.head_size
    pages = batch.kv_cache[batch.block_table[0, :num_pages].long()].cpu()  # [pages, G, rows, 2 d]
    keys = pages[:, :, : layout.page_size, :d].float()
    mean = layout.statistics(pages)[..., :d].repeat_interleave(layout.selection_block, -2)  # [pages, G, tokens, d]
    for got, want in zip(layout.sketch(layout.area(pages)), sketch(keys, mean), strict=True):
        assert torch.equal(got, want)


def case(params: SplaParameters, length: int, head_size: int = 32, **more: object) -> Batch:
    return make_batch(
        params, [length], num_heads=2, num_kv_heads=2, head_size=head_size, seed=torch.seed() % 2**31, device=DEVICE,
        by_kernels=True, **more,
    )  # fmt: skip


@pytest.mark.usefixtures("of_a_program")
@pytest.mark.parametrize("chunk", [0, 1, 23], ids=["at-once", "one-by-one", "by-23"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_sketches(chunk: int, dtype: torch.dtype) -> None:
    check(case(params(), 70, chunk=chunk, dtype=dtype), 2)


@pytest.mark.parametrize("statistics", ["auto", "fp8"])
@pytest.mark.parametrize(
    ("head_size", "page", "block"), [(16, 16, 16), (48, 64, 64), (80, 48, 16), (128, 64, 32), (256, 128, 128)], ids=str
)
def test_shapes(head_size: int, page: int, block: int, statistics: str) -> None:
    check(case(params(page, block, "mean", statistics), page + 9, head_size, chunk=37), 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("statistics", ["auto", "fp8"])
def test_any_keys(dtype: torch.dtype, statistics: str) -> None:
    """Equal ones, of which nothing is left, ones at both ends of float16, and one that stands out."""
    batch = case(params(statistics=statistics), 96, dtype=dtype)
    keys = batch.keys[0]
    keys[:16] = keys[:1]
    keys[16:32] *= 2.0**-22
    keys[32:64] *= 15000.0 if dtype == torch.float16 else 1e6
    keys[70] *= 40.0
    batch.write(0, 0, 96)
    check(batch, 3)


def test_a_page_that_is_completed_again() -> None:
    """After a rejected draft, from its middle."""
    batch = case(params(), 40)
    batch.keys[0][20:] = torch.randn_like(batch.keys[0][20:])
    for position in range(20, 32):
        batch.write(0, position, position + 1)
    check(batch, 1)
