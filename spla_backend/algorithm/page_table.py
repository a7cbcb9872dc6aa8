"""FlashInfer-compatible sparse page tables.

Every (sequence, kv head) is a request of its own over a cache seen as `[num_pages * kv_heads, 1, page_size, ...]`
with the heads of a page side by side: page `i` of head `g` has the id `i * kv_heads + g`. Where selection blocks
are smaller than pages, an id names a block: `(i * kv_heads + g) * blocks_per_page + block`.
"""

from dataclasses import dataclass

import torch

from .parameters import SplaParameters


@dataclass(frozen=True)
class SparsePageTable:
    """Page table of `num_requests = rows * kv_heads` pseudo-requests, in the format of FlashInfer's paged wrappers."""

    indptr: torch.Tensor
    """`[num_requests + 1]` int32, offsets into `indices`."""
    indices: torch.Tensor
    """`[indptr[-1]]` int32, ids in ascending logical order, the current block last."""
    last_page_len: torch.Tensor
    """`[num_requests]` int32, tokens visible in the last block, at least 1."""

    def padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids `[num_requests, longest]` int64 (0 where there is none) and which of them exist, bool."""
        counts = self.indptr.diff()
        slots = torch.arange(int(counts.max()), device=self.indptr.device)
        exists = slots < counts[:, None]
        where = (self.indptr[:-1, None] + slots).clamp(max=self.indices.shape[0] - 1)
        return torch.where(exists, self.indices[where], 0).long(), exists


def build_page_table(
    selected: torch.Tensor, block_table: torch.Tensor, positions: torch.Tensor, params: SplaParameters
) -> SparsePageTable:
    """Page table of one query token a row.

    Args:
        selected: `[rows, kv_heads, num_blocks]` bool over the blocks of complete pages.
        block_table: `[rows, >= pages]` int, the engine's page ids.
        positions: `[rows]` int64, position of each row's query token.
        params: Page and block sizes.
    """
    rows, kv_heads, num_blocks = selected.shape
    per_page = params.blocks_per_page
    current = positions // params.selection_block  # [rows]
    width = int(current.max()) + 1
    block = torch.arange(width, device=selected.device)
    # Blocks of the current page have no statistics yet and are always attended to.
    in_current_page = (block >= (positions // params.page_size * per_page)[:, None]) & (block <= current[:, None])
    wanted = in_current_page[:, None].repeat(1, kv_heads, 1)  # [rows, kv_heads, width]
    overlap = min(num_blocks, width)
    wanted[..., :overlap] |= selected[..., :overlap]
    pages = block_table[:, : (width - 1) // per_page + 1].long()  # [rows, pages]
    head = torch.arange(kv_heads, device=selected.device)[:, None]
    ids = (pages[:, None, block // per_page] * kv_heads + head) * per_page + block % per_page
    indptr = torch.zeros(rows * kv_heads + 1, dtype=torch.int32, device=selected.device)
    indptr[1:] = wanted.sum(-1).flatten().cumsum(0)
    last = (positions % params.selection_block + 1).to(torch.int32).repeat_interleave(kv_heads)
    return SparsePageTable(indptr, ids[wanted].to(torch.int32), last)
