"""Sketches of keys in pages, bit for bit what the algorithm makes of the page's own keys and mean."""

import pytest
import torch
from triton_cases import make_batch

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


def check(batch, num_pages: int) -> None:
    """The sketches of the first pages of row 0, of the keys that these hold, whatever they are."""
    layout, d = batch.layer.page_layout, batch.layer.head_size
    pages = batch.kv_cache[batch.block_table[0, :num_pages].long()].cpu()  # [pages, G, rows, 2 d]
    keys = pages[:, :, : layout.page_size, :d].float()
    mean = layout.statistics(pages)[..., :d].repeat_interleave(layout.selection_block, -2)  # [pages, G, tokens, d]
    for got, want in zip(layout.sketch(layout.area(pages)), sketch(keys, mean), strict=True):
        assert torch.equal(got, want)


@pytest.mark.usefixtures("of_a_program")
@pytest.mark.parametrize("chunk", [0, 1, 23], ids=["at-once", "one-by-one", "by-23"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_sketches(chunk: int, dtype: torch.dtype) -> None:
    batch = make_batch(
        params(), [70], num_heads=2, num_kv_heads=2, head_size=32, dtype=dtype, chunk=chunk,
        seed=torch.seed() % 2**31, device=DEVICE,
    )  # fmt: skip
    check(batch, 2)
