"""Which rows of a prompt's matrices are which token and head: tiles, candidate tiles and voters (algorithm/tiles.py).

A *candidate tile* is `C` positions, from a multiple of `C` on, of which a pass has some tokens; it holds `C / T` tiles
of `T` positions, some of which may have no token. `groups` describes candidate tiles, and tile `i` of candidate tile
`g` has the number `g * C / T + i`. In matrices of voters every `STEP`-th position has a place, a voter or not.
"""

import triton
import triton.language as tl


@triton.jit
def voters(position, num_tokens, place, C: tl.constexpr, T: tl.constexpr, STEP: tl.constexpr):
    """The token, counted from a candidate tile's first one, that votes at `place`, and whether any does.

    A tile votes by the tokens before a multiple of `STEP`; a piece of one that has none, by its last token, which takes
    the place of the one that would follow.
    """
    base = position // C * C
    own = base + place * STEP + STEP - 1
    tile = base + place * STEP // T * T
    first = tl.maximum(tile, position)
    last = tl.minimum(tile + T, position + num_tokens) - 1
    votes = (own >= first) & (own <= last)
    without = (last >= first) & ((last + 1) // STEP * STEP <= first)
    stands_in = without & ((last - base) // STEP == place)
    inside = place * STEP < C
    return tl.where(stands_in, last, own) - position, inside & (votes | stands_in)


@triton.jit
def tile_tokens(position, num_tokens, within, C: tl.constexpr, T: tl.constexpr):
    """Of tile `within` of a candidate tile: its first token, counted from the candidate tile's first one, how many it
    has (none: 0), and the position where the tile begins."""
    tile = position // C * C + within * T
    first = tl.maximum(tile, position)
    last = tl.minimum(tile + T, position + num_tokens)
    return first - position, tl.maximum(last - first, 0), tile


@triton.jit
def load_tile(groups_ptr, tile, C: tl.constexpr, T: tl.constexpr):
    """Of tile `tile`: its candidate tile, the candidate tile's first token in the batch, and `tile_tokens`."""
    group = tile // (C // T)
    first_token = tl.load(groups_ptr + group * 4 + 1)
    position = tl.load(groups_ptr + group * 4 + 3)
    num_tokens = tl.load(groups_ptr + group * 4 + 2)
    begin, tokens, base = tile_tokens(position, num_tokens, (tile % (C // T)).to(tl.int32), C, T)
    return group, first_token, begin, tokens, base


@triton.jit
def load_queries(
    query_ptr, head, first_token, token, member, exists, query_token_stride, query_head_stride,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Queries `[rows, DP]` of the rows' `token` and `member` of the group, 0 where there is none."""
    exists &= member < GROUP
    column = tl.arange(0, DP)
    row = query_ptr + (first_token + token).to(tl.int64) * query_token_stride
    row += (head * GROUP + member) * query_head_stride
    return tl.load(row[:, None] + column[None, :], mask=exists[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def in_registers(q, DP: tl.constexpr):
    """What comes out of a product stays in registers as the left side of the next ones, where a loaded matrix would be
    read from shared memory again for every chunk."""
    if DP <= 128:
        column = tl.arange(0, DP)
        identity = (column[:, None] == column[None, :]).to(q.dtype)
        q = tl.dot(q, identity).to(q.dtype)
    return q


@triton.jit
def forced_blocks(index, position, num_complete, BLOCK: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Which blocks of complete pages a tile that begins at `position` selects whatever their scores."""
    return (index < num_complete) & ((index < FIRST) | (index > position // BLOCK - LAST))
