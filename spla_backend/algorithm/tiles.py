"""Prompt tokens that share a selection: neighbours at fixed positions, a tile (docs/design.md, 1).

Tile `i` is the positions `i * tile` to `(i + 1) * tile - 1`, whatever chunks a prompt comes in. `tile` divides the
page, so that all tokens of a tile have the same current page and the same complete pages, and all of this follows:

* What is ranked, blocks of complete pages, every token of the tile sees whole. A tile's score of a block is the log of
  the mean over its tokens of the score that their heads share (`selection.group_scores`, normalised for each token over
  what is ranked, as in decode); it ranks as the sum does. A token counts whatever its place in the tile. With a
  `tile_step` of `n` only every n-th token is scored, those whose position is one less than a multiple of it.
* Forced are the blocks that any token of the tile forces by itself: the first ones, every block of the current page up
  to the tile's last position, and before that page the last blocks of the tile's first token. How many more are chosen
  is reckoned at the tile's last position, whether that token is there already or not, and so is whether all is
  attended to. So up to `tile - 1` tokens of the budget lie ahead of a token of the tile and are nothing to it.
* What some tokens of a tile do not see lies in its current page, of which nothing is ranked and everything forced. In
  the exact part a token of position `p` attends to the positions up to `p` of the selected blocks: the only mask by
  token, and only in blocks of the current page from the tile's first position on.
* The rest, the blocks of complete pages that the tile did not select, is the same for all of its tokens, and so is the
  state from which the selected are subtracted: that of all complete pages of the tile, not of the chunk or of the
  tokens before. By token are only the reading of the difference and the masses of the rest's blocks, which are
  estimates from statistics that were scored anyway. No token of the current page is ever part of a tail.

A chunk that ends within a tile leaves the tile in two pieces, each of which selects by its own tokens' scores, by its
last token's where it has none of every n-th; forced blocks and numbers are those of the tile. A chunk that ends between
tiles changes nothing, where candidates are not shared by several tiles (below).

In two levels several tiles may share their candidates: those of a `candidate_tile`, which is a number of tokens that
divides the page, too. It chooses candidates as a tile of its size would, by all tokens that are scored for its tiles.
Then each of its tiles selects fine blocks among these by the scores of its own tokens, and whether all is attended to
is reckoned at the tile's last position. A chunk that ends within a candidate tile leaves it in two pieces, each of
which chooses candidates by its own tokens; one that ends between candidate tiles changes nothing.

With a tile and a candidate tile of one token this is selection by token.
"""

import torch
from torch.nn.functional import pad

from .attention import masked_attention
from .parameters import SplaParameters
from .residual import Reading, Residual


def check_tile(params: SplaParameters) -> None:
    """Raises:
    ValueError: A tile that does not fit page and selection block, or a step or candidate tile that does not fit it.
    """
    tile, block = params.tile, params.selection_block
    if params.page_size % tile or max(tile, block) % min(tile, block):
        raise ValueError(
            f"tile {tile} must divide page_size {params.page_size}, and one of tile and selection_block {block} must "
            "divide the other"
        )
    if tile % params.tile_step:
        raise ValueError(f"tile_step {params.tile_step} must divide tile {tile}")
    shared = params.candidate_tile
    if shared and not params.fine_block:
        raise ValueError(f"candidate_tile {shared} must be 0 where there is one level: it has no candidates")
    if shared and (shared % tile or params.page_size % shared):
        raise ValueError(
            f"candidate_tile {shared} must be a multiple of tile {tile} and divide page_size {params.page_size}"
        )


def tile_ends(positions: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last position of the tile that each of `positions` is in, as int64 of their shape."""
    if tile == 1:
        return positions, positions
    first = positions // tile * tile
    return first, first + (tile - 1)


class Tiles:
    """The tiles that consecutive tokens are in.

    Args:
        positions: `[tokens]` int64, consecutive; the first and the last tile may be there in part.
        params: How many tokens a tile has, and how many of these its scores are of.
        voters: Indices of the tokens whose scores count, where smaller tiles in these say so; None goes by `params`.

    Attributes:
        ends: Last position of each tile `[tiles]` int64, though its token be missing.
        voters: Indices of the tokens whose scores count `[voters]` int64, ascending.
    """

    def __init__(self, positions: torch.Tensor, params: SplaParameters, voters: torch.Tensor | None = None) -> None:
        tile, device = params.tile, positions.device
        self.tile = tile
        if tile == 1:  # as they are, consecutive or not
            self.ends, self._around = positions, (0, 0)
            self.voters = self._of_token = self._of_voter = torch.arange(len(positions), device=device)
            return
        start, end = int(positions[0]), int(positions[-1]) + 1
        first, stop = start // tile, -(-end // tile)
        self.ends = torch.arange(first + 1, stop + 1, device=device) * tile - 1
        self._around = (start - first * tile, stop * tile - end)
        self._of_token = positions // tile - first  # [tokens]
        if voters is None:
            votes = (positions + 1) % params.tile_step == 0
            last = self.ends.clamp(max=end - 1) - start  # [tiles]
            votes[last] |= ~self.cut(votes, 0).any(1)
            voters = votes.nonzero()[:, 0]
        self.voters = voters
        self._of_voter = self._of_token[self.voters]

    def cut(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """`[..., tokens, ...]` as `[..., tiles, tile, ...]`, zeros for what is missing."""
        around = [0, 0] * (x.dim() - 1 - dim % x.dim()) + list(self._around)
        return pad(x, around).unflatten(dim, (-1, self.tile))

    def join(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """What `cut` made, `dim` that of the tiles, as it was."""
        before, after = self._around
        x = x.flatten(dim, dim + 1)
        return x.narrow(dim, before, x.shape[dim] - before - after)

    def share(self, grouped: torch.Tensor) -> torch.Tensor:
        """Scores of tiles `[tiles, ...]` from those of their voters `[voters, ...]`: the log of the mean exponential,
        so that the total mass of a row is that of a token's. -inf where all are, and nowhere else."""
        if self.tile == 1:
            return grouped
        counts = self._of_voter.bincount(minlength=len(self.ends))
        nth = torch.arange(len(self.voters), device=grouped.device) - (counts.cumsum(0) - counts)[self._of_voter]
        scores = grouped.new_full((len(self.ends), int(counts.max()), *grouped.shape[1:]), -torch.inf)
        scores[self._of_voter, nth] = grouped
        total = scores.logsumexp(1)
        mean = total - counts.view(-1, *[1] * (total.dim() - 1)).to(total.dtype).log()
        # What stands for a hopeless block remains above what stands for none.
        return mean.clamp_(min=torch.finfo(mean.dtype).min).masked_fill_(total == -torch.inf, -torch.inf)

    def by_token(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """`[..., tiles, ...]` as `[..., tokens, ...]`."""
        return x if self.tile == 1 else x.index_select(dim, self._of_token)

    def by_tile(self, x: torch.Tensor, tiles: "Tiles") -> torch.Tensor:
        """What each of these has `[len(self.ends), ...]` for each of the smaller `tiles` in them `[tiles, ...]`."""
        return x if tiles is self else x[tiles.ends // self.tile - self.ends[0] // self.tile]

    def by_voter(self, x: torch.Tensor) -> torch.Tensor:
        """`[tiles, ...]` as `[voters, ...]`."""
        return x if self.tile == 1 else x[self._of_voter]


def attend_selected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rest: torch.Tensor,
    positions: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor] | None,
    params: SplaParameters,
    residual: Residual | None,
) -> tuple[torch.Tensor, torch.Tensor, Reading | None]:
    """The exact part of tiles over keys and values gathered for each, and what its tokens read of the rest.

    Args:
        q: Scaled queries `[rows, group, queries, d]`.
        k: `[rows, tokens, d]`, up to the last position.
        v: As `k`.
        rest: Blocks of complete pages that each tile did not select `[rows, tiles, num_attended]` bool.
        positions: `[queries]` int64, consecutive.
        states: Sums over the complete pages before each page, from `prefix_states`; None without a residual.
        params: What to compute.
        residual: What stands for the rest, or None.

    Returns:
        Output `[rows, group, queries, d]`, its LSE `[rows, group, queries]`, and the reading of the rest, each part
        `[rows, group * queries, ...]`; None without a residual.
    """
    rows, group = q.shape[:2]
    size, seen = params.attended_block, k.shape[1]
    tiles = Tiles(positions, params)
    num_blocks = -(-seen // size)
    within = torch.arange(num_blocks, device=q.device) * size <= tiles.ends[:, None]  # [tiles, num_blocks]
    chosen = within & ~pad(rest, (0, num_blocks - rest.shape[-1]))  # [rows, tiles, num_blocks]
    most = int(chosen.sum(-1).max())
    order = chosen.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :most]
    token = (order[..., None] * size + torch.arange(size, device=q.device)).flatten(-2)  # [rows, tiles, most * size]
    real = chosen.gather(-1, order).repeat_interleave(size, -1) & (token < seen)
    token = token.clamp(max=seen - 1)
    row = torch.arange(rows, device=q.device)[:, None, None]
    keys, values = k[row, token], v[row, token]  # [rows, tiles, most * size, d]
    queries = tiles.cut(q, 2).transpose(1, 2)  # [rows, tiles, group, tile, d]
    queries = queries.flatten(2, 3)  # [rows, tiles, group * tile, d]
    logits = queries @ keys.mT
    position = tiles.cut(positions + 1, 0).repeat(1, group)[..., None]  # [tiles, group * tile, 1], from 1
    # Of tokens that are not there, with 0, nothing is wanted but that they be no NaN.
    visible = real[:, :, None] & ((token[:, :, None] < position) | (position == 0))

    def by_query(x: torch.Tensor) -> torch.Tensor:
        """`[rows, tiles, group * tile, ...]` as `[rows, group, queries, ...]`."""
        return tiles.join(x.unflatten(2, (group, params.tile)).transpose(1, 2), 2)

    if residual is None:
        exact, lse, _ = masked_attention(logits, values, visible)
        return by_query(exact), by_query(lse), None
    assert states is not None
    page = tiles.ends // params.page_size  # [tiles]
    complete = real & (token < (page * params.page_size)[:, None])  # [rows, tiles, most * size]
    weights = residual.token_weights(queries, keys, logits, complete[:, :, None])
    exact, lse, products = masked_attention(logits, values, visible, weights)
    selected = residual.reading(weights, products)
    everything = residual.read(queries, *(x[:, page] for x in states))
    reading = tuple(
        by_query((a - b).expand(-1, -1, queries.shape[2], -1)).flatten(1, 2)
        for a, b in zip(everything, selected, strict=True)
    )
    return by_query(exact), by_query(lse), reading


def prefix_states(
    k: torch.Tensor, v: torch.Tensor, page_size: int, residual: Residual
) -> tuple[torch.Tensor, torch.Tensor]:
    """States of the pages before each page: `S [rows, pages + 1, s_rows, d]` and `z [rows, pages + 1, z_size, 1]`.

    Args:
        k: `[rows, tokens, d]`.
        v: As `k`.
        page_size: Tokens a page; a last one that is not full counts for nothing.
        residual: What is summed.
    """
    whole = k.shape[1] // page_size * page_size
    pages = [x[:, :whole].unflatten(1, (-1, page_size)) for x in (k, v)]
    s, z = residual.block_contributions(*pages)
    return tuple(pad(x.cumsum(1), (0, 0) * (x.dim() - 2) + (1, 0)) for x in (s, z[..., None]))  # type: ignore[return-value]
