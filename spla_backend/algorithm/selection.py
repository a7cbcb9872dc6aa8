"""Selection: forced blocks, sharing in the GQA group, top-k and top-p (docs/design.md, 1)."""

import torch


def group_scores(scores: torch.Tensor, complete: torch.Tensor) -> torch.Tensor:
    """Scores of the heads of a group shared in the log domain.

    Args:
        scores: `[rows, kv_heads, tokens, group, num_blocks]` log masses.
        complete: `[rows, num_blocks]` bool, blocks of complete pages; the others may hold anything, NaN included.

    Returns:
        `[rows, kv_heads, tokens, num_blocks]`: log of the sum over heads of each head's softmax; -inf where not
        complete. A row without complete blocks is -inf throughout.
    """
    scores = scores.masked_fill(~complete[:, None, None, None, :], -torch.inf)
    return torch.logsumexp(scores.log_softmax(-1), -2).masked_fill(~complete[:, None, None, :], -torch.inf)


def select_blocks(
    grouped: torch.Tensor,
    forced: torch.Tensor,
    num_free: torch.Tensor,
    group_size: int,
    top_p: float | None = None,
) -> torch.Tensor:
    """The selected blocks of complete pages.

    Args:
        grouped: `[rows, kv_heads, tokens, num_blocks]` from `group_scores`.
        forced: `[rows, tokens, num_blocks]` bool, complete blocks selected whatever their score.
        num_free: `[rows, tokens]` int, how many further blocks the budget allows.
        group_size: Query heads a kv head: the total mass of a row of `grouped`.
        top_p: Share of the estimated mass at which selection stops.

    Returns:
        `[rows, kv_heads, tokens, num_blocks]` bool.
    """
    forced = forced[:, None].expand(grouped.shape)
    # A stable sort sends ties to the lower index, so that every path picks the same blocks.
    ranked, order = torch.sort(grouped.masked_fill(forced, -torch.inf), dim=-1, descending=True, stable=True)
    rank = torch.arange(grouped.shape[-1], device=grouped.device)
    keep = (rank < num_free[:, None, :, None]) & (ranked > -torch.inf)
    if top_p is not None:
        forced_mass = grouped.masked_fill(~forced, -torch.inf).exp().sum(-1, keepdim=True)
        mass = ranked.exp()
        before = forced_mass + mass.cumsum(-1) - mass
        keep &= before < top_p * group_size
    return torch.zeros_like(forced).scatter(-1, order, keep) | forced
