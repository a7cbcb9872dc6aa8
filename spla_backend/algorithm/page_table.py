"""FlashInfer-compatible sparse page tables.

Every (sequence, kv head) is a request of its own over a cache seen as `[num_pages * kv_heads, 1, page_size, ...]`
with the heads of a page side by side: page `i` of head `g` has the id `i * kv_heads + g`. Where the blocks that are
attended to (selection blocks, or fine blocks in two levels) are smaller than pages, an id names a block:
`(i * kv_heads + g) * blocks + block`, with `blocks` of them a page.

Offsets and lengths depend on the sequences' lengths alone as long as the budget is a number of blocks, so that
`plan_page_table` makes them once a step, for all layers; `fill_page_table` writes the ids that a layer selected.
"""

from dataclasses import dataclass

import torch

from .parameters import SplaParameters


@dataclass(frozen=True)
class PageTablePlan:
    """What one query token a row needs whatever is selected."""

    kv_heads: int
    ids: torch.Tensor
    """`[rows, kv_heads, width]` int64, the id of every block of every row."""
    in_current_page: torch.Tensor
    """`[rows, kv_heads, width]` bool, blocks of the current page: without statistics yet, always attended to."""
    last_page_len: torch.Tensor
    """`[rows * kv_heads]` int32."""
    indptr: torch.Tensor | None
    """`[rows * kv_heads + 1]` int32; None where top-p lets the lists' lengths depend on the layer."""


@dataclass(frozen=True)
class SparsePageTable:
    """Page table of `num_requests = rows * kv_heads` pseudo-requests, in the format of FlashInfer's paged wrappers."""

    indptr: torch.Tensor
    """`[num_requests + 1]` int32, offsets into `indices`."""
    indices: torch.Tensor
    """`[indptr[-1]]` int32, ids in ascending logical order, the current block last."""
    last_page_len: torch.Tensor
    """`[num_requests]` int32, tokens visible in the last block, at least 1."""


def plan_page_table(
    block_table: torch.Tensor, positions: torch.Tensor, kv_heads: int, params: SplaParameters
) -> PageTablePlan:
    """Plan for one query token a row.

    Args:
        block_table: `[rows, >= pages]` int, the engine's page ids.
        positions: `[rows]` int64, position of each row's query token.
        kv_heads: Kv heads `G`.
        params: Page and block sizes.
    """
    size = params.attended_block
    per_page = params.page_size // size
    current = positions // size  # [rows]
    width = int(current.max()) + 1
    block = torch.arange(width, device=positions.device)
    in_current_page = (block >= (positions // params.page_size * per_page)[:, None]) & (block <= current[:, None])
    pages = block_table[:, : (width - 1) // per_page + 1].long()  # [rows, pages]
    head = torch.arange(kv_heads, device=positions.device)[:, None]
    ids = (pages[:, None, block // per_page] * kv_heads + head) * per_page + block % per_page
    last = (positions % size + 1).to(torch.int32).repeat_interleave(kv_heads)
    indptr = None
    if params.top_p is None:
        whole = positions < params.whole_tokens
        counts = torch.where(whole, current + 1, params.budget_tokens // size)
        indptr = _offsets(counts.repeat_interleave(kv_heads))
    return PageTablePlan(kv_heads, ids, in_current_page[:, None].repeat(1, kv_heads, 1), last, indptr)


def _offsets(counts: torch.Tensor) -> torch.Tensor:
    """`[n + 1]` int32 from `counts [n]`."""
    indptr = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(counts, 0, out=indptr[1:])
    return indptr


def fill_page_table(plan: PageTablePlan, selected: torch.Tensor) -> SparsePageTable:
    """The page table of a layer.

    Args:
        plan: The step's plan.
        selected: `[rows, kv_heads, num_blocks]` bool over the blocks of complete pages, `num_blocks <= width`.
    """
    wanted = plan.in_current_page.clone()  # [rows, kv_heads, width]
    wanted[..., : selected.shape[-1]] |= selected
    indptr = _offsets(wanted.sum(-1).flatten()) if plan.indptr is None else plan.indptr
    return SparsePageTable(indptr, plan.ids.masked_select(wanted).to(torch.int32), plan.last_page_len)


@dataclass(frozen=True)
class PaddedSlots:
    """How to read a table's lists as one rectangle, and which tokens there exist."""

    where: torch.Tensor
    """`[num_requests, slots]` int64 into `indices`."""
    visible: torch.Tensor
    """`[num_requests, slots, block]` bool."""
    complete: torch.Tensor
    """`[num_requests, slots]` bool, blocks of complete pages."""
    complete_tokens: torch.Tensor
    """`[num_requests, slots * block]` bool, tokens of complete pages."""
    even: bool
    """All lists are of one length: `indices` is the rectangle, and only tokens of the last slots do not exist."""


def pad_slots(indptr: torch.Tensor, last_page_len: torch.Tensor, num_current: torch.Tensor, block: int) -> PaddedSlots:
    """Padding of lists.

    Args:
        indptr: `[num_requests + 1]` int32.
        last_page_len: `[num_requests]` int32.
        num_current: `[num_requests]` int64, how many trailing entries of each list belong to the current page.
        block: Tokens a block.
    """
    counts = indptr.diff().long()[:, None]
    slot = torch.arange(int(counts.max()), device=indptr.device)
    where = (indptr[:-1, None] + slot).clamp(max=int(indptr[-1]) - 1).long()
    limit = torch.where(slot == counts - 1, last_page_len[:, None], block)
    visible = (slot < counts)[..., None] & (torch.arange(block, device=indptr.device) < limit[..., None])
    complete = slot < counts - num_current[:, None]
    even = bool((counts == slot.numel()).all())
    return PaddedSlots(where, visible, complete, complete.repeat_interleave(block, -1), even)
