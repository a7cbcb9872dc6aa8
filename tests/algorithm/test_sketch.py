"""The sketch of keys in 4 bits: its definition over head sizes and sizes of numbers, and in a page."""

import math

import pytest
import torch
from torch import Tensor

from spla_backend.algorithm import reference as ref
from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.selectors import block_statistics
from spla_backend.algorithm.sketch import BYTES_PER_CHUNK, num_chunks, read_keys, sketch, unsketch
from spla_backend.kernels.cpu.vectorised import VectorisedAttention
from spla_backend.kernels.interface import Layer

HEAD_SIZES = [8, 64, 80, 128, 256]


def keys_of(kind: str, d: int) -> Tensor:
    """A block of 16 keys `[16, d]` float32."""
    keys = torch.randn(16, d, generator=torch.Generator().manual_seed(d)) + 1
    if kind == "zeros":
        return torch.zeros_like(keys)
    if kind == "equal":
        return keys[:1].repeat(16, 1)
    if kind == "mixed":  # chunks of zeros, and chunks of one element only
        keys[::2, :32] = 0
        keys[1::2] *= torch.rand(d, generator=torch.Generator().manual_seed(1)) < 1 / 32
    return keys * {"huge": 1e37, "large": 1e6, "small": 1e-6, "tiny": 1e-42}.get(kind, 1.0)


@pytest.mark.parametrize("kind", ["normal", "mixed", "zeros", "equal", "huge", "large", "small", "tiny"])
@pytest.mark.parametrize("d", HEAD_SIZES)
def test_is_the_definition(d: int, kind: str) -> None:
    """Bit for bit, in float32 and in float64: nothing is left to rounding."""
    keys = keys_of(kind, d)
    mean = (keys / 16).sum(0)
    codes, scales = sketch(keys, mean)
    assert codes.shape == (16, 16 * num_chunks(d)) and codes.dtype == torch.uint8
    assert scales.shape == (16, num_chunks(d)) and scales.dtype == torch.float16 and bool(scales.isfinite().all())
    want = ref.sketched_keys(keys.double(), mean.double())
    assert torch.equal(unsketch(codes, scales, mean.double()), want)
    assert all(torch.equal(a, b) for a, b in zip(sketch(keys.double(), mean.double()), (codes, scales), strict=True))
    if kind in ("normal", "mixed", "equal"):
        # Half a step, or a whole one beyond 7 steps, of what the scale's own rounding leaves of 8 steps.
        steps = scales.float().abs().repeat_interleave(32, -1)[:, :d]
        assert bool(((want.float() - keys).abs() <= steps * (1 + 8 * 2**-11) + 1e-6).all())
        inside = (keys - mean).abs() < 7.49 * steps
        assert bool(((want.float() - keys).abs()[inside] <= (0.5 * steps * (1 + 1e-5) + 1e-6)[inside]).all())
    if kind in ("zeros", "tiny"):
        assert not bool(scales.any()) and torch.equal(want.float(), mean.expand_as(keys))


def test_codes_in_their_order() -> None:
    """A sketch of numbers that it can hold: channel 0 in the lower half of byte 0, multiples of which -8 is one."""
    multiples = torch.arange(-8, 24).remainder(16).sub(8).float()  # 0 .. 7, -8 .. -1, 0 .. 7, -8 .. -1
    keys = torch.stack([multiples * 0.5, -0.25 * multiples])
    codes, scales = sketch(keys, torch.zeros(32))
    assert scales.tolist() == [[0.5], [-0.25]]
    want = [(int(multiples[i]) + 8) + 16 * (int(multiples[i + 1]) + 8) for i in range(0, 32, 2)]
    assert codes.tolist() == [want, want]
    assert torch.equal(unsketch(codes, scales, torch.zeros(32)), keys)
    # Of two elements as far from 0 the positive one becomes -8; the other one comes near.
    codes, scales = sketch(torch.tensor([[-1.0, 1.0] + [0.0] * 6]), torch.zeros(8))
    assert float(scales) == -0.125 and int(codes[0, 0]) == 15 + 16 * 0 and codes[0, 1:].eq(8 + 16 * 8).all()


def test_only_what_two_levels_read() -> None:
    keys = torch.randn(2, 3, 16, 80, generator=torch.Generator().manual_seed(0)).requires_grad_()
    params = SplaParameters(16, 16, 4, fine_block=8, fine_source="int4")
    statistics = block_statistics(keys, params)
    got = read_keys(keys, statistics, params)
    mean = statistics[..., :80]
    assert not got.requires_grad
    for i in range(2):
        for j in range(3):
            want = ref.sketched_keys(keys[i, j].double(), mean[i, j].double())
            torch.testing.assert_close(got[i, j], want.float(), rtol=0, atol=1e-6)
    for other in (SplaParameters(16, 16, 4, fine_source="int4"), SplaParameters(16, 16, 4, fine_block=8)):
        assert read_keys(keys, statistics, other) is keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("statistics", ["auto", "fp8"])
@pytest.mark.parametrize(("d", "page", "block", "selector"), [(80, 48, 16, "rem"), (64, 32, 32, "mean")])
def test_in_a_page(d: int, page: int, block: int, selector: str, statistics: str, dtype: torch.dtype) -> None:
    """Of the stored keys less the stored mean, and nothing besides is written: not even the rest of the area."""
    params = SplaParameters(
        page, block, 8, selector=selector, statistics_dtype=statistics, fine_block=8, fine_source="int4"
    )
    op = VectorisedAttention(params, Layer(2, 2, d, dtype, 1.0))
    layout = op.page_layout
    used = layout.statistics_bytes + page * num_chunks(d) * BYTES_PER_CHUNK + 16
    assert layout.statistics_rows == math.ceil(used / (2 * d * dtype.itemsize))
    cache = torch.full((3, 2, layout.rows, 2 * d), torch.nan, dtype=dtype)
    keys = (2 * torch.randn(page, 2, d, generator=torch.Generator().manual_seed(1)) + 3).to(dtype)
    slots = torch.arange(page, 2 * page)  # page 1
    op.update_cache(keys[:5], keys[:5], cache, slots[:5])
    assert cache[1, :, page:].isnan().all()
    op.update_cache(keys[5:], keys[5:], cache, slots[5:])
    assert cache[0].isnan().all() and cache[2].isnan().all()
    area = layout.area(cache[1])  # [kv_heads, elements]
    codes, scales = layout.sketch(area)
    assert codes.shape == (2, page, 16 * num_chunks(d)) and scales.shape == (2, page, num_chunks(d))
    mean = layout.statistics(cache[1])[..., :d].double()  # [kv_heads, blocks, d]
    sketched = layout.sketched_keys(area)
    for g in range(2):
        for i in range(page // block):
            tokens = slice(i * block, (i + 1) * block)
            want = ref.sketched_keys(keys[tokens, g].double(), mean[g, i])
            assert torch.equal(unsketch(codes[g, tokens], scales[g, tokens], mean[g, i]), want)
            torch.testing.assert_close(sketched[g, tokens], want.float())
    assert area.view(torch.int32)[:, -1].tolist() == [1, 1]  # the stamp ends with the page's id
