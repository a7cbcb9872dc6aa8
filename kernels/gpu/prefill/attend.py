"""Exact attention of tiles to the blocks that they selected, by FlashAttention.

A kernel of paged attention reads, for each sequence, the pages that a block table names. Here a sequence is a tile and
a kv head, and its pages are the blocks that the tile selected: the table names the place in the cache where each
begins, in units of `address` elements, and "page" `i` of the view that FlashAttention is given begins `i` such units
behind the cache. Pages of that view overlap, which nothing forbids: they are only read. The last pages of a table are
the tile's current page, so that the causal mask, which is aligned to the last token, is a tile's own.

Floor: `4 d` FLOP a (token, selected token, head).
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..layer import GpuLayer
from .tiles import load_queries


@triton.jit
def prompt_gather_kernel(
    query_ptr,  # [tokens, H, D]
    groups_ptr,  # [groups, 4] int32
    places_ptr,  # [groups] int32: place of a candidate tile's first token among those of the pass
    gathered_ptr,  # [G, num_tokens, GROUP, D]
    query_token_stride,
    query_head_stride,
    num_tokens,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    TM: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Grid (groups, G, C / TM)."""
    group = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    m = tl.arange(0, TM * GROUP_P)
    token = tl.program_id(2) * TM + m // GROUP_P
    member = m % GROUP_P
    column = tl.arange(0, DP)
    exists = token < tl.load(groups_ptr + group * 4 + 2)
    first_token = tl.load(groups_ptr + group * 4 + 1)
    q = load_queries(
        query_ptr, head, first_token, token, member, exists, query_token_stride, query_head_stride, GROUP, D, DP
    )
    place = head.to(tl.int64) * num_tokens + tl.load(places_ptr + group) + token
    out = gathered_ptr + (place * GROUP + member) * D
    mask = (exists & (member < GROUP))[:, None] & (column < D)[None, :]
    tl.store(out[:, None] + column[None, :], q.to(gathered_ptr.dtype.element_ty), mask=mask)


def address_unit(kv_cache: torch.Tensor) -> int:
    """Elements that divide the way from each block of the cache to any other.

    Raises:
        ValueError: A cache too large for block tables of 32 bits.
    """
    unit = math.gcd(kv_cache.shape[-1], kv_cache.stride(0), kv_cache.stride(1))
    if len(kv_cache) * kv_cache.stride(0) // unit >= 1 << 31:
        raise ValueError(
            f"a cache of {len(kv_cache)} pages, {kv_cache.stride(0)} elements apart, has more than 2^31 places of "
            f"{unit} elements, which is what the block tables of sparse prompts can name: set prefill_dense_below to "
            "the model's length, or let the engine have fewer pages"
        )
    return unit


def blocks_at(kv_cache: torch.Tensor, unit: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as pages of `block` tokens that begin at every multiple of `unit` elements, `[places, block, 1,
    d]`: nothing is copied, and what lies beyond the last page that exists is in no block table."""
    row = kv_cache.shape[-1]
    reach = (len(kv_cache) - 1) * kv_cache.stride(0) + (kv_cache.shape[1] - 1) * kv_cache.stride(1)
    reach += (kv_cache.shape[2] - block) * row  # where the last block may begin
    view = kv_cache.as_strided((reach // unit + 1, block, 1, row), (unit, row, row, 1))
    return view[..., : row // 2], view[..., row // 2 :]


@dataclass(frozen=True)
class Attend:
    """`attend_blocks` over what a pass selected, between its launches."""

    gathered: torch.Tensor  # [G * tokens, GROUP, D]
    table: torch.Tensor  # [G * tiles, SLOTS] int32
    used: torch.Tensor  # [G * tiles] int32
    exact: torch.Tensor  # [G * tokens, GROUP, D], written


def attend_blocks(
    layer: GpuLayer,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    table: torch.Tensor,
    used: torch.Tensor,
    start_loc: torch.Tensor,
    tile: int,
    output: torch.Tensor,
) -> torch.Tensor:
    """Attention of each tile and kv head to its own blocks.

    Args:
        layer: Whose pages.
        query: `[tiles' tokens of kv head 0, those of kv head 1, ..., group, d]`, gathered.
        kv_cache: `[num_pages, G, page_size + statistics_rows, 2 d]`.
        table: `[G * tiles, slots]` int32, where blocks begin in units of `address_unit`.
        used: `[G * tiles]` int32, tokens of these blocks up to the tile's last token.
        start_loc: `[G * tiles + 1]` int32, where each tile's tokens begin in `query`.
        tile: Tokens of a tile at most.
        output: As `query`, written.

    Returns:
        `[group, tokens of query]` float32, natural log of the sum of exponentials.
    """
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    block = layer.params.attended_block
    keys, values = blocks_at(kv_cache, address_unit(kv_cache), block)
    _, lse, *_ = flash_attn_varlen_func(
        q=query,
        k=keys,
        v=values,
        out=output,
        cu_seqlens_q=start_loc,
        max_seqlen_q=tile,
        seqused_k=used,
        max_seqlen_k=table.shape[1] * block,
        softmax_scale=layer.scale,
        causal=True,
        block_table=table,
        fa_version=get_flash_attn_version(head_size=layer.head_size),
        return_softmax_lse=True,
        num_splits=1,
    )
    return lse
