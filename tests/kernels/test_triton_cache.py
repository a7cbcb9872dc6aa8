"""Storing tokens, page statistics and stamps, against the reference on the stored keys."""

import pytest
import torch
import triton
import triton.language as tl
from triton_cases import make_batch

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.reference import complete_statistics
from spla_backend.algorithm.statistics_format import encode
from spla_backend.kernels.gpu import store
from spla_backend.kernels.gpu.selectors import gpu_selector, gpu_selector_names
from spla_backend.kernels.gpu.statistics import decode_e4m3, decode_e5m2

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STORES = sorted({gpu_selector(name).store: name for name in gpu_selector_names()}.values())
"""A selector for every way to make statistics."""
SHAPE = {"num_heads": 2, "num_kv_heads": 2, "head_size": 32, "device": DEVICE, "by_kernels": True}


def params(selector: str = "rem", page: int = 16, block: int = 16, **others: str) -> SplaParameters:
    return SplaParameters(page, block, 4, selector=selector, residual="none", **others)


@pytest.fixture(params=[512, 0], ids=["a-token", "32-tokens"])
def of_a_program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many tokens a program stores."""
    monkeypatch.setattr(store, "FEW_TOKENS", request.param)
    monkeypatch.setattr(store.Store, "launches", {})


@pytest.mark.usefixtures("of_a_program")
@pytest.mark.parametrize("chunk", [0, 1, 23], ids=["at-once", "one-by-one", "by-23"])
def test_tokens_and_statistics(chunk: int) -> None:
    batch = make_batch(params(), [50], chunk=chunk, **SHAPE)
    page = batch.layer.params.page_size
    stored = batch.kv_cache[batch.block_table[0].long(), :, :page].transpose(1, 2).flatten(0, 1)[:50]  # [L, G, 2 d]
    assert torch.equal(stored, torch.cat([batch.keys[0], batch.values[0]], -1))
    expected = complete_statistics(batch.keys[0].double().cpu(), batch.layer.params)  # [pages, G, width]
    torch.testing.assert_close(batch.statistics(0, 3), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("of_a_program")
@pytest.mark.parametrize("block", [16, 48])
@pytest.mark.parametrize("selector", STORES)
def test_statistics_of_finer_blocks(selector: str, block: int) -> None:
    batch = make_batch(params(selector, 48, block), [100], chunk=37, seed=torch.seed() % 2**31, **SHAPE)
    expected = complete_statistics(batch.keys[0].double().cpu(), batch.layer.params)  # [blocks, G, width]
    torch.testing.assert_close(batch.statistics(0, 2), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("of_a_program")
@pytest.mark.parametrize("selector", STORES)
def test_statistics_in_fp8(selector: str) -> None:
    """Rounded as torch rounds, ties in the kernels' float32 aside; saturated where a byte cannot hold them."""
    batch = make_batch(
        params(selector, 32, 16, statistics_dtype="fp8"), [70], chunk=37, seed=torch.seed() % 2**31, **SHAPE
    )
    batch.keys[0][:40] *= 2000.0  # means beyond 448, variances beyond 57344
    batch.keys[0][40:64] *= 1e-3  # in the subnormals
    batch.write(0, 0, 64)
    layout = batch.layer.page_layout
    exact = complete_statistics(batch.keys[0].double().cpu(), batch.layer.params)[:4]  # [blocks, G, width]
    assert layout.formats is not None and exact.abs().max() > 448
    expected = encode(exact.float(), layout.formats).int()
    stored = layout.stored(layout.area(batch.kv_cache[batch.block_table[0, :2].long()])).transpose(1, 2).flatten(0, 1)
    off = (stored.cpu().int() - expected).abs()
    # A sum in another order rounds to another byte now and then: of `mean` there are 256 bytes, and 1 in 500 is off.
    assert off.max() <= 1 and off.sum() <= 4 + 0.005 * off.numel()
    torch.testing.assert_close(batch.statistics(0, 2)[3:], exact[3:], rtol=0.126, atol=2e-3)


@triton.jit
def decode_kernel(bytes_ptr, e4m3_ptr, e5m2_ptr):
    index = tl.arange(0, 256)
    byte = tl.load(bytes_ptr + index)
    tl.store(e4m3_ptr + index, decode_e4m3(byte))
    tl.store(e5m2_ptr + index, decode_e5m2(byte))


def test_bytes_become_float16_exactly() -> None:
    stored = torch.arange(256, device=DEVICE).to(torch.uint8)
    e4m3, e5m2 = (torch.full((256,), float("nan"), dtype=torch.float16, device=DEVICE) for _ in range(2))
    decode_kernel[(1,)](stored, e4m3, e5m2)
    for got, dtype in ((e4m3, torch.float8_e4m3fn), (e5m2, torch.float8_e5m2)):
        want = stored.view(dtype).half()
        finite = want.isfinite()  # the others are never stored
        assert torch.equal(got[finite], want[finite])


def test_two_clusters_of_equal_keys() -> None:
    """All keys fall to the first cluster, and the other stays empty."""
    batch = make_batch(params("km2-rem"), [17], **SHAPE)
    batch.keys[0][:16] = batch.keys[0][:1]
    batch.write(0, 0, 16)
    expected = complete_statistics(batch.keys[0].double().cpu(), batch.layer.params)
    assert expected[0, 0, -2:].tolist() == [16, 0]
    torch.testing.assert_close(batch.statistics(0, 1), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("of_a_program")
def test_stamp_names_a_content() -> None:
    batch = make_batch(params(), [40, 33], **SHAPE)
    words = batch.kv_cache.view(torch.int32).flatten(2)[..., -4:]  # [pages, G, 4]
    complete = torch.cat([batch.block_table[0, :2], batch.block_table[1, :2]]).long()
    stamps = words[complete]
    assert torch.equal(stamps[..., :2], batch.store.salt.expand(4, 2, 2))
    assert torch.equal(stamps[..., 3], complete.to(torch.int32)[:, None].expand(4, 2))
    assert stamps[..., 2].unique().numel() == 8  # every completion has a number of its own
    batch.write(0, 15, 16)  # a rejected draft token completes its page again
    assert not torch.equal(batch.kv_cache.view(torch.int32).flatten(2)[complete[0], :, -4:], stamps[0])


def test_rejected_draft_is_forgotten() -> None:
    batch = make_batch(params(), [16], **SHAPE)
    batch.keys[0][10:] = torch.randn_like(batch.keys[0][10:])
    batch.write(0, 10, 13)
    batch.write(0, 13, 16)
    expected = complete_statistics(torch.cat([batch.keys[0], batch.keys[0][:1]]).double().cpu(), batch.layer.params)
    torch.testing.assert_close(batch.statistics(0, 1), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("of_a_program")
def test_padding_writes_nothing() -> None:
    batch = make_batch(params(), [20], **SHAPE)
    before = batch.kv_cache.view(torch.int16).clone()
    slots = torch.full((3,), -1, dtype=torch.int64, device=DEVICE)
    batch.store.update_cache(batch.keys[0][:3], batch.values[0][:3], batch.kv_cache, slots)
    assert torch.equal(batch.kv_cache.view(torch.int16), before)


def test_pages_of_several_sequences_in_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of two rows side by side, both of which complete a page, and padding between and behind them."""
    monkeypatch.setattr(store, "FEW_TOKENS", 0)
    monkeypatch.setattr(store.Store, "launches", {})
    batch = make_batch(params(), [16, 16], chunk=1, **SHAPE)
    stored = batch.kv_cache.clone()
    batch.kv_cache[..., batch.layer.params.page_size :, :] = float("nan")
    rows = [(0, slice(9, 16)), (1, slice(11, 16))]
    padding = torch.full((1,), -1)
    slots = torch.cat([x for row, part in rows for x in (batch.slots(row, part.start, part.stop), padding)]).to(DEVICE)
    filler = torch.full_like(batch.keys[0][:1], float("nan"))
    keys, values = (
        torch.cat([x for row, part in rows for x in (of_rows[row][part], filler)])
        for of_rows in (batch.keys, batch.values)
    )
    batch.store.update_cache(keys, values, batch.kv_cache, slots)
    for row in range(2):
        page = batch.block_table[row, 0].long()
        used = batch.layer.page_layout.statistics_bytes // batch.kv_cache.itemsize
        assert torch.equal(batch.kv_cache[page, :, :16], stored[page, :, :16])
        assert torch.equal(batch.kv_cache[page, :, 16:].flatten(1)[:, :used], stored[page, :, 16:].flatten(1)[:, :used])


def test_engines_of_one_seed_stamp_differently() -> None:
    salts = []
    for _ in range(2):
        torch.manual_seed(0)
        batch = make_batch(params(), [16], **SHAPE)
        salts.append(batch.kv_cache.view(torch.int32).flatten(2)[batch.block_table[0, 0].long(), :, -4:-2])
    assert not torch.equal(*salts)
