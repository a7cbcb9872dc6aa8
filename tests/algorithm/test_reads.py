"""No unselected page is read during decode: their keys and values may be anything, NaN included."""

import pytest
import torch

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.kernels.cpu.attention import CpuAttention
from spla_backend.kernels.cpu.vectorised import VectorisedAttention
from spla_backend.kernels.interface import Layer, Step

HEADS, KV_HEADS, HEAD_SIZE, LENGTH = 6, 2, 64, 700


@pytest.mark.parametrize("implementation", [VectorisedAttention, CpuAttention])
@pytest.mark.parametrize("residual", ["regression", "linear", "none"])
@pytest.mark.parametrize(("page", "block"), [(64, 64), (64, 16), (16, 16)])
def test_decode_reads_selected_pages_only(
    page: int, block: int, residual: str, implementation: type[VectorisedAttention]
) -> None:
    torch.manual_seed(page + block)
    params = SplaParameters(page, block, 256 // block, residual=residual)
    layer = Layer(HEADS, KV_HEADS, HEAD_SIZE, torch.float32, HEAD_SIZE**-0.5)
    op = implementation(params, layer)
    num_pages = -(-LENGTH // page)
    kv_cache = torch.full((num_pages + 1, KV_HEADS, op.page_layout.rows, 2 * HEAD_SIZE), torch.nan)
    states = torch.full((op.state_layout.num_blocks + 1, *kv_cache.shape[1:]), torch.nan)
    table = torch.randperm(num_pages)[None].int() + 1
    state_table = torch.arange(1, op.state_layout.num_blocks + 1)[None].int()
    position = torch.arange(LENGTH)
    slots = table[0, position // page].long() * page + position % page
    key, value = torch.randn(2, LENGTH, KV_HEADS, HEAD_SIZE).unbind()
    query = 2 * torch.randn(LENGTH, HEADS, HEAD_SIZE)

    step = Step.of(torch.tensor([0, 1]), torch.tensor([LENGTH]), table)

    def decode() -> torch.Tensor:
        out = torch.full((1, HEADS, HEAD_SIZE), torch.nan)
        op.run(op.plan(step), query[-1:], kv_cache, states, state_table, out)
        return out

    op.update_cache(key, value, kv_cache, slots)
    expected = decode()  # folds the state: from here on it alone speaks for what is not selected
    assert expected.isfinite().all()

    plain = VectorisedAttention(params, layer)
    tile = plain.plan(step).decode[0].tile
    selected = plain.select(tile, plain.grouped(query[-1:], tile), kv_cache)[0][0, :, 0]  # [kv_heads, blocks]
    assert 0 < selected.sum() < selected.numel()
    assert op.tokens_read.tolist() == [[params.budget_tokens] * KV_HEADS]
    for head in range(KV_HEADS):
        for i in (~selected[head]).nonzero().flatten().tolist():
            start = i * block % page
            kv_cache[table[0, i * block // page], head, start : start + block] = torch.nan
    assert torch.equal(decode(), expected)
    # And the test would notice: one selected block poisoned reaches the output.
    i = int(selected[0].nonzero()[0])
    start = i * block % page
    kv_cache[table[0, i * block // page], 0, start : start + block] = torch.nan
    assert decode().isnan().any()
