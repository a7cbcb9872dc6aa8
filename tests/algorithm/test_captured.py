"""What runs on a CPU on queries, keys and values of a real model (tests/data), as `kernels/test_captured.py`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.reference import spla_token
from spla_backend.kernels.cpu.attention import CpuAttention
from spla_backend.kernels.cpu.vectorised import VectorisedAttention
from spla_backend.kernels.interface import Layer, Step

INPUTS = load_file(Path(__file__).parent.parent / "data" / "smollm2_qkv.safetensors")
HEADS, KV_HEADS, HEAD_SIZE = 9, 3, 64
KINDS = {
    "regression": {},
    "paper": {"selector": "taylor2", "residual": "linear", "combine": "double_rmsnorm"},
    "exact": {"residual": "none"},
    "top-p": {"top_p": 0.9},
    "two-levels": {"fine_block": 16, "fine_source": "int4"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", [VectorisedAttention, CpuAttention])
def test_on_a_cpu(implementation: type[VectorisedAttention], kind: str, dtype: torch.dtype) -> None:
    """All tokens: the last as a step of decode, those before it as a chunk of prefill."""
    params = SplaParameters(64, 32, 16, **KINDS[kind])
    op = implementation(params, Layer(HEADS, KV_HEADS, HEAD_SIZE, dtype, HEAD_SIZE**-0.5))
    keys, values, query = (x.to(dtype) for x in (INPUTS["k"], INPUTS["v"], INPUTS["q"][-64:]))
    length, page = len(keys), params.page_size
    num_pages, num_blocks = -(-length // page), op.state_layout.num_blocks
    kv_cache = torch.full((num_pages + num_blocks, KV_HEADS, op.page_layout.rows, 2 * HEAD_SIZE), torch.nan).to(dtype)
    table = torch.randperm(num_pages)[None].int()
    state_table = num_pages + torch.arange(num_blocks)[None].int()
    position = torch.arange(length)
    slots = table[0, position // page].long() * page + position % page
    output = torch.full_like(query, torch.nan)
    for start, stop in ((0, length - 64), (length - 64, length - 1), (length - 1, length)):
        op.update_cache(keys[start:stop], values[start:stop], kv_cache, slots[start:stop])
        if start:
            rows = slice(start - length + 64, stop - length + 64)
            step = Step.of(torch.tensor([0, stop - start]), torch.tensor([stop]), table)
            op.run(op.plan(step), query[rows], kv_cache, kv_cache, state_table, output[rows])
    complete = (length - 1) // page
    per_page = op.page_layout.blocks_per_page
    statistics = op.page_layout.statistics(kv_cache[table[0, :complete].long()])
    statistics = statistics.transpose(1, 2).flatten(0, 1).double()  # [blocks, G, width]
    for token in (0, 17, 40, 63):
        stop = length - 63 + token
        want = spla_token(
            query[token].double() * op.scale, keys[:stop].double(), values[:stop].double(), params,
            statistics=statistics[: (stop - 1) // page * per_page],
        ).output  # fmt: skip
        error = float((output[token].double() - want).norm() / want.norm())
        assert error < (1e-5 if dtype is torch.float32 else 1.5e-2), f"token {token}: relative error {error:.2e}"
