"""Attention over block tables without FlashAttention, for a CPU, where Triton's kernels are interpreted."""

import itertools

import torch

from spla_backend.kernels.gpu.layer import GpuLayer
from spla_backend.kernels.gpu.prefill.attend import address_unit, blocks_at


def attend_plainly(
    layer: GpuLayer,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    table: torch.Tensor,
    used: torch.Tensor,
    start_loc: torch.Tensor,
    tile: int,
    output: torch.Tensor,
) -> torch.Tensor:
    """As `attend_blocks` of `kernels/gpu/prefill/attend.py`."""
    block = layer.params.attended_block
    keys, values = (x[:, :, 0].float() for x in blocks_at(kv_cache, address_unit(kv_cache), block))
    lse = torch.full((layer.group, len(query)), float("nan"))
    starts = start_loc.tolist()
    for number, (first, stop) in enumerate(itertools.pairwise(starts)):
        if first == stop:
            continue
        seen = int(used[number])
        assert stop - first <= tile and 0 < seen <= table.shape[1] * block
        at = table[number, : -(-seen // block)].long()
        k, v = keys[at].flatten(0, 1)[:seen], values[at].flatten(0, 1)[:seen]
        logits = torch.einsum("thd,kd->htk", query[first:stop].float(), k) * layer.scale
        later = torch.arange(seen) > torch.arange(seen - (stop - first), seen)[:, None]
        logits.masked_fill_(later, float("-inf"))
        lse[:, first:stop] = logits.logsumexp(-1)
        output[first:stop] = torch.einsum("htk,kd->thd", logits.softmax(-1), v).to(output.dtype)
    return lse
