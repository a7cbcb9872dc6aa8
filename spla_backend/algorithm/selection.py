"""Selection: forced blocks, sharing in the GQA group, top-k and top-p (docs/design.md, 1)."""

import torch

from .parameters import SplaParameters
from .tiles import tile_ends


def forced_blocks(
    positions: torch.Tensor, complete: torch.Tensor, params: SplaParameters
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is settled before a score is known.

    Args:
        positions: `[rows, tokens]` int64; the tokens of a row share their complete pages. Any token of a tile stands
            for the tile.
        complete: `[rows, num_blocks]` bool, all blocks of complete pages.
        params: Parameters.

    Returns:
        Complete blocks that are selected anyway `[rows, tokens, num_blocks]` bool, how many further ones are to be
        chosen `[rows, tokens]` int64, and whether some block is left out `[rows, tokens]` bool.
    """
    block = torch.arange(complete.shape[-1], device=complete.device)
    first, last = (x // params.selection_block for x in tile_ends(positions, params.tile))  # [rows, tokens]
    forced = (block < params.first_blocks) | (block > first[..., None] - params.last_blocks)
    sparse = last + 1 > params.whole_blocks
    forced |= ~sparse[..., None]
    forced &= complete[:, None]
    in_current_page = last + 1 - complete.sum(-1, keepdim=True)
    num_blocks = torch.where(sparse, params.budget_blocks, last + 1)  # to attend to
    num_free = num_blocks - in_current_page - forced.sum(-1)
    return forced, num_free, sparse


def group_scores(
    scores: torch.Tensor, complete: torch.Tensor | None, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Scores of the heads of a group shared in the log domain.

    Args:
        scores: `[rows, kv_heads, tokens, group, num_blocks]` log masses.
        complete: Blocks that may be selected, bool: `[rows, num_blocks]`, those of complete pages, or `[rows, kv_heads,
            tokens, num_blocks]`; the others may hold anything, NaN included. None where all may.
        sinks: Logits of the heads' sinks, broadcastable to `[rows, kv_heads, tokens, group]`; None without sinks.

    Returns:
        `[rows, kv_heads, tokens, num_blocks]`: log of the sum over heads of each head's softmax over the complete
        blocks, and its sink where it has one; -inf where not complete, and nowhere else. A row without complete blocks
        is -inf throughout.
    """
    if complete is not None:
        complete = complete[:, None, None] if complete.dim() == 2 else complete
        scores = scores.masked_fill(~complete.unsqueeze(-2), -torch.inf)
    if sinks is None:
        scores = scores.log_softmax(-1)
    else:
        scores = scores - torch.logaddexp(scores.logsumexp(-1), sinks).unsqueeze(-1)
    grouped = torch.logsumexp(scores, -2)
    # A hopeless block still goes before one that is no candidate, so that as many are selected as were planned.
    grouped.clamp_(min=torch.finfo(grouped.dtype).min)
    return grouped if complete is None else grouped.masked_fill(~complete, -torch.inf)


def select_blocks(
    grouped: torch.Tensor,
    forced: torch.Tensor,
    num_free: torch.Tensor | int,
    top_p: float | None = None,
) -> torch.Tensor:
    """The selected blocks of complete pages.

    Args:
        grouped: `[rows, kv_heads, tokens, num_blocks]` from `group_scores`.
        forced: `[rows, tokens, num_blocks]` bool, complete blocks selected whatever their score.
        num_free: `[rows, tokens]` int, how many further blocks the budget allows: no more than there are. An int
            where it is the same for all.
        top_p: Share of the estimated mass of all blocks at which selection stops; what goes to sinks is none of it.

    Returns:
        `[rows, kv_heads, tokens, num_blocks]` bool.
    """
    forced = forced[:, None].expand(grouped.shape)
    if top_p is not None and top_p >= 1:
        top_p = None  # all of the mass takes all of the budget, whatever the rounding
    # A stable sort sends ties to the lower index, so that every path picks the same blocks.
    ranked, order = torch.sort(grouped.masked_fill(forced, -torch.inf), dim=-1, descending=True, stable=True)
    if isinstance(num_free, int):
        if top_p is None:
            return forced.clone().scatter_(-1, order[..., :num_free], True)
        num_free = torch.full(forced.shape[0:3:2], num_free, device=grouped.device)
    rank = torch.arange(grouped.shape[-1], device=grouped.device)
    keep = (rank < num_free[:, None, :, None]).expand(order.shape)
    if top_p is not None:
        forced_mass = grouped.masked_fill(~forced, -torch.inf).exp().sum(-1, keepdim=True)
        mass = ranked.exp()
        before = forced_mass + mass.cumsum(-1) - mass
        keep = keep & (before < top_p * grouped.exp().sum(-1, keepdim=True))
    return torch.zeros_like(forced).scatter(-1, order, keep) | forced
