"""Selection in two levels (docs/design.md, 1): statistics choose candidates, the keys of these choose among them.

Stages, in the order in which they run, each with all that it needs of the one before: coarse scores of selection blocks
-> candidates -> fine scores of the candidates' fine blocks -> selected fine blocks -> attention. The first two are
selection in one level (`selection.py`) with `coarse_parameters`; the fine level is here.
"""

from dataclasses import replace

import torch

from .parameters import SplaParameters
from .selection import forced_blocks, group_scores, select_blocks
from .tiles import Tiles, tile_ends

FINE_DTYPES = ("auto", "bf16", "fp8")


def coarse_parameters(params: SplaParameters) -> SplaParameters:
    """Selection in one level whose selected blocks are the candidates, and whose tiles those that share them."""
    return replace(
        params,
        fine_block=0,
        budget_blocks=params.candidate_blocks,
        top_p=None,
        tile=params.coarse_tile,
        candidate_tile=0,
    )


def forced_fine_blocks(
    positions: torch.Tensor, complete: torch.Tensor, params: SplaParameters
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is settled before a score is known: fine blocks of selection blocks that one level forces.

    Args:
        positions: `[rows, tokens]` int64; the tokens of a row share their complete pages. Any token of a tile stands
            for the tile.
        complete: `[rows, num_blocks]` bool, selection blocks of complete pages.
        params: Parameters of the two levels.

    Returns:
        Fine blocks of complete pages that are selected anyway `[rows, tokens, num_fine]` bool, and how many further
        ones are to be chosen `[rows, tokens]` int64: what is there of the current page counts by the fine block.
    """
    per_block = params.selection_block // params.fine_block
    forced, _, sparse = forced_blocks(positions, complete, params)
    forced = forced.repeat_interleave(per_block, -1)
    num_fine = tile_ends(positions, params.tile)[1] // params.fine_block + 1
    in_current_page = num_fine - per_block * complete.sum(-1, keepdim=True)
    budget = params.budget_tokens // params.fine_block
    return forced, torch.where(sparse, budget, num_fine) - in_current_page - forced.sum(-1)


def round_queries(q: torch.Tensor, params: SplaParameters) -> torch.Tensor:
    """Queries `[..., d]` as the fine level multiplies them.

    In fp8 (e4m3) a query is scaled by the power of two that brings its largest element between 224 and 448, so that
    scaling itself rounds nothing and can be taken back from the logits.
    """
    if params.fine_dtype != "fp8":
        return round_keys(q, params)
    # 448 = 0.875 * 2^9: with a largest element of m * 2^e, m in [.5, 1), 2^(9 - e) brings it to m * 2^9.
    mantissa, exponent = q.float().abs().amax(-1, keepdim=True).frexp()
    scale = torch.ldexp(torch.ones_like(mantissa), torch.where(mantissa > 0.875, 8, 9) - exponent)
    return (round_keys(q.float() * scale, params) / scale).to(q.dtype)


def round_keys(k: torch.Tensor, params: SplaParameters) -> torch.Tensor:
    """Keys `[..., d]` as the fine level multiplies them: in fp8 (e4m3) unscaled, what is beyond as the largest."""
    if params.fine_dtype == "auto":
        return k
    if params.fine_dtype == "bf16":
        return k.float().bfloat16().to(k.dtype)
    limit = torch.finfo(torch.float8_e4m3fn).max
    return k.float().clamp(-limit, limit).to(torch.float8_e4m3fn).to(k.dtype)


def fine_scores(logits: torch.Tensor, fine_block: int) -> torch.Tensor:
    """Log masses `[..., num_fine]` of whole fine blocks, from the logits of their tokens `[..., tokens]`."""
    num_fine = logits.shape[-1] // fine_block
    return logits[..., : num_fine * fine_block].unflatten(-1, (num_fine, fine_block)).logsumexp(-1)


def select_fine_blocks(
    scores: torch.Tensor,
    candidates: torch.Tensor,
    forced: torch.Tensor,
    num_free: torch.Tensor,
    top_p: float | None = None,
    sinks: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """The selected fine blocks of complete pages.

    Args:
        scores: `[rows, kv_heads, tokens, group, num_fine]` from `fine_scores`; what is no candidate may hold anything.
        candidates: `[rows, kv_heads, tokens, num_blocks]` bool, selection blocks of complete pages, forced ones among
            them.
        forced: From `forced_fine_blocks`.
        num_free: Likewise.
        top_p: Share of the candidates' mass at which selection stops.
        sinks: As in `group_scores`.
        tiles: Where tokens share a selection, the tiles whose voters the rows of `scores` are; all else has a row for
            each tile.

    Returns:
        `[rows, kv_heads, tokens, num_fine]` bool.
    """
    num_fine = scores.shape[-1]
    candidates = candidates.repeat_interleave(num_fine // max(candidates.shape[-1], 1), -1)
    if tiles is None:
        return select_blocks(group_scores(scores, candidates, sinks), forced, num_free, top_p)
    grouped = tiles.share(group_scores(scores, tiles.by_voter(candidates), sinks))
    return select_blocks(grouped, forced, num_free, top_p)
