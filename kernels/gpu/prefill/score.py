"""Scores of selection blocks for the voters of candidate tiles, and what is left out of a tile's mass.

Plain reference: `reference.selection_score`, `share_in_group`, `mass_score`. Sources: SPLA (arXiv 2601.22379) and those
of `gpu/decode/score`.

`prompt_score_kernel` goes over the blocks twice, for the voters' normalisers and for the sum of their shares. Storing
scores would move 8 bytes a (voter, block, head); computing them again is `4 d` FLOP on the tensor cores.
`prompt_mass_kernel` goes over them for every token, after the selection, and leaves the selected ones out.

`q^2` is rounded to the cache dtype once, by 2^-9 at most in bf16: independent over `d` elements, a relative error of
about 2^-10 / sqrt(d) in the variance of `q . k`, less than what the rounding of the stored mean does to `q . mean`.
Statistics that are bytes have become float16 (`decode_statistics.py`), exactly, and so do the queries.

Floor: `4 d` FLOP a (row, block, head) and pass, twice that for `km2-rem`.
"""

import triton
import triton.language as tl

from ..selectors import largest_exponent, sum_over
from ..sinks import load_sinks
from ..statistics import LOG2E, Blocks, as_factor
from .tiles import in_registers, load_queries, load_tile, voters

NORMALISE = tl.constexpr(0)
SHARE = tl.constexpr(1)
MODES = {"normalise": 0, "share": 1}
SHIFT = tl.constexpr(100.0)


@triton.jit
def add_log2(a, b):
    """`log2(2^a + 2^b)`, one of them finite."""
    larger = tl.maximum(a, b)
    return larger + tl.log2(tl.exp2(a - larger) + tl.exp2(b - larger))


@triton.jit
def split_of(num_units, CHUNK: tl.constexpr):
    """The first of this program's units, and the end of them: whole chunks, which the third dimension shares."""
    per_split = tl.cdiv(tl.cdiv(num_units, tl.num_programs(2)), CHUNK) * CHUNK
    start = tl.program_id(2) * per_split
    return start, tl.minimum(start + per_split, num_units)


@triton.jit
def statistics_of_row(
    kv_ptr, decoded_ptr, group_place_ptr, group, head, head_stride, num_places,
    D: tl.constexpr, PAGE: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Where the statistics of a row's first unit are, decoded; or those in the first page of the cache."""
    area = kv_ptr + head * head_stride + PAGE * 2 * D
    if decoded_ptr is not None:
        row_place = head.to(tl.int64) * num_places + tl.load(group_place_ptr + group)
        area = decoded_ptr + row_place * STRIDE
    return area


@triton.jit
def statistics_of_units(area, page, unit, page_stride, last_page, PER_PAGE: tl.constexpr, STRIDE: tl.constexpr):
    """Where the statistics of the units `unit` are, from `statistics_of_row`; `page` is None where they are decoded."""
    if page is None:
        statistic = area + unit * STRIDE
    else:
        statistic = area + tl.minimum(tl.maximum(page, 0), last_page).to(tl.int64) * page_stride
        statistic += unit % PER_PAGE * STRIDE
    return statistic


@triton.jit(do_not_specialize=["block_table_stride", "last_page", "num_places"])
def prompt_score_kernel(
    query_ptr,  # [tokens, H, D]
    kv_ptr,
    block_table_ptr,
    groups_ptr,  # [groups, 4] int32: row, first token, tokens, position of the first token
    lse_ptr,  # [groups, G, num_norms, ROWS] float32: written by NORMALISE, log2 of the sum over a split's units
    shares_ptr,  # [groups, G, max_units] float32: written by SHARE: sums of the voters' shares, times 2^SHIFT
    sink_ptr,  # [H]; None without sinks, or where scores are no masses
    decoded_ptr,  # [G, num_places, STRIDE] float16: statistics that are bytes in pages, decoded; None: they are none
    group_place_ptr,  # [groups] int32: place of the first unit of a group's row in `decoded_ptr`
    query_token_stride,
    query_head_stride,
    page_stride,
    head_stride,
    block_table_stride,
    last_page,
    num_places,
    max_units,
    num_norms,  # splits of NORMALISE
    scale,
    MODE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    STRIDE: tl.constexpr,  # stored elements from the statistics of one unit to the next
    LOG2_UNIT: tl.constexpr,
    CHUNK: tl.constexpr,  # units at a time
    STAGES: tl.constexpr,
    SELECTOR: tl.constexpr,  # a GpuSelector
):
    """Grid (groups, G, splits)."""
    group = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = tl.load(groups_ptr + group * 4).to(tl.int64)
    first_token = tl.load(groups_ptr + group * 4 + 1)
    num_tokens = tl.load(groups_ptr + group * 4 + 2)
    position = tl.load(groups_ptr + group * 4 + 3)
    PER_PAGE: tl.constexpr = PAGE // UNIT
    num_units = position // PAGE * PER_PAGE  # of complete pages
    start, stop = split_of(num_units, CHUNK)
    m = tl.arange(0, ROWS)
    pair = group * tl.num_programs(1) + head
    own_lse = lse_ptr + pair * num_norms * ROWS + m
    if (MODE == NORMALISE) & (start >= stop):
        # No share of these units.
        tl.store(own_lse + tl.program_id(2) * ROWS, tl.full([ROWS], float("-inf"), dtype=tl.float32))
    if start < stop:
        column = tl.arange(0, DP)
        in_head = column < D
        member = m % GROUP_P
        token, votes = voters(position, num_tokens, m // GROUP_P, C, T, STEP)
        q = load_queries(
            query_ptr, head, first_token, token, member, votes, query_token_stride, query_head_stride, GROUP, D, DP
        )  # [ROWS, DP]
        q = in_registers(as_factor(q, kv_ptr, decoded_ptr is not None), DP)
        query = SELECTOR.prepare(q, scale, True, LOG2E)
        pages = block_table_ptr + row * block_table_stride
        area = statistics_of_row(
            kv_ptr, decoded_ptr, group_place_ptr, group, head, head_stride, num_places, D, PAGE, STRIDE
        )
        offset = tl.arange(0, CHUNK)
        unit = scale * LOG2E  # logits in powers of two, which is what the hardware raises
        top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([ROWS], dtype=tl.float32)
        if MODE == SHARE:
            # The shares themselves and not their log, which would cost more than the rest: times 2^SHIFT, so that only
            # units of less than 2^-220 of the mass are all alike.
            lse = tl.load(own_lse)  # finite: the first split has units
            for other in tl.range(1, num_norms, num_stages=1):
                lse = add_log2(lse, tl.load(own_lse + other * ROWS))
            if sink_ptr is not None:
                # Over UNIT, as the units' masses are.
                sink = load_sinks(sink_ptr, head * GROUP + member, member < GROUP) * LOG2E - LOG2_UNIT
                lse = add_log2(lse, sink)
            shift = tl.where(votes & (member < GROUP), lse - SHIFT, float("inf"))
        # Page ids are fetched a step ahead: a load that waits for another load is not pipelined well.
        page = None
        if decoded_ptr is None:
            page = tl.load(pages + tl.minimum(start + offset, num_units - 1) // PER_PAGE)
        for first in tl.range(start, stop, CHUNK, num_stages=STAGES):
            index = first + offset
            exists = index < stop
            known = tl.minimum(index, num_units - 1)
            statistic = statistics_of_units(area, page, known, page_stride, last_page, PER_PAGE, STRIDE)  # [CHUNK]
            if decoded_ptr is None:
                page = tl.load(pages + tl.minimum(index + CHUNK, num_units - 1) // PER_PAGE)
            rows = statistic[:, None] + column[None, :]
            # The mass of a unit is over that of a token.
            if MODE == SHARE:
                beyond = shift[:, None] * -1.0  # a sign of the multiply-add in the loop, where a difference is none
            else:
                beyond = tl.where(exists, 0.0, float("-inf"))[None, :]
            score, _mass, _product = SELECTOR.score(query, Blocks(
                statistic, rows, in_head[None, :], unit, beyond, D, DP, False, D != DP, True, UNIT, LOG2_UNIT, LOG2E
            ))  # fmt: skip
            if MODE == SHARE:
                shares = tl.sum(sum_over(score, 0.0), axis=0)  # [CHUNK]
                tl.store(shares_ptr + pair * max_units + index, shares, mask=exists)
            else:
                # Finite: a chunk has a unit that exists.
                new_top = tl.maximum(top, tl.max(largest_exponent(score), axis=1))  # [ROWS]
                total = total * tl.exp2(top - new_top) + tl.sum(sum_over(score, new_top[:, None]), axis=1)
                top = new_top
        if MODE == NORMALISE:
            tl.store(own_lse + tl.program_id(2) * ROWS, top + tl.log2(total))


@triton.jit(do_not_specialize=["block_table_stride", "last_page", "num_places"])
def prompt_mass_kernel(
    query_ptr,  # [tokens, H, D]
    kv_ptr,
    block_table_ptr,
    groups_ptr,  # [groups, 4] int32
    left_ptr,  # [tiles, G, max_units] float32: log2 of the share of a unit that a tile did not select
    mass_ptr,  # [tiles, G, splits, T * GROUP_P] float32: log2 of the mass of that, over UNIT
    decoded_ptr,
    group_place_ptr,
    query_token_stride,
    query_head_stride,
    page_stride,
    head_stride,
    block_table_stride,
    last_page,
    num_places,
    max_units,
    scale,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    TM: tl.constexpr,  # tokens a program
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    STRIDE: tl.constexpr,
    LOG2_UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    SELECTOR: tl.constexpr,
):
    """Grid (tiles * T / TM, G, splits)."""
    ROWS: tl.constexpr = TM * GROUP_P
    tile = (tl.program_id(0) // (T // TM)).to(tl.int64)
    part = tl.program_id(0) % (T // TM)
    head = tl.program_id(1)
    group, first_token, begin, num_tokens, base = load_tile(groups_ptr, tile, C, T)
    if part * TM >= num_tokens:
        return
    row = tl.load(groups_ptr + group * 4).to(tl.int64)
    PER_PAGE: tl.constexpr = PAGE // UNIT
    num_units = base // PAGE * PER_PAGE
    start, stop = split_of(num_units, CHUNK)
    m = tl.arange(0, ROWS)
    token = part * TM + m // GROUP_P
    member = m % GROUP_P
    column = tl.arange(0, DP)
    in_head = column < D
    q = load_queries(
        query_ptr, head, first_token + begin, token, member, token < num_tokens, query_token_stride, query_head_stride,
        GROUP, D, DP,
    )  # fmt: skip
    q = in_registers(as_factor(q, kv_ptr, decoded_ptr is not None), DP)
    query = SELECTOR.prepare(q, scale, True, LOG2E)
    pages = block_table_ptr + row * block_table_stride
    area = statistics_of_row(
        kv_ptr, decoded_ptr, group_place_ptr, group, head, head_stride, num_places, D, PAGE, STRIDE
    )
    left = left_ptr + (tile * tl.num_programs(1) + head) * max_units
    offset = tl.arange(0, CHUNK)
    # Not -inf: what a tile selected whole has no mass, and a chunk may have nothing else.
    top = tl.full([ROWS], -1e30, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    page = None
    if decoded_ptr is None:
        page = tl.load(pages + tl.minimum(start + offset, num_units - 1) // PER_PAGE)
    beyond = tl.load(left + start + offset, mask=start + offset < stop, other=float("-inf"))
    for first in tl.range(start, stop, CHUNK, num_stages=STAGES):
        index = first + offset
        of_chunk = beyond[None, :]
        known = tl.minimum(index, num_units - 1)
        statistic = statistics_of_units(area, page, known, page_stride, last_page, PER_PAGE, STRIDE)  # [CHUNK]
        if decoded_ptr is None:
            page = tl.load(pages + tl.minimum(index + CHUNK, num_units - 1) // PER_PAGE)
        beyond = tl.load(left + index + CHUNK, mask=index + CHUNK < stop, other=float("-inf"))
        rows = statistic[:, None] + column[None, :]
        _score, mass, _product = SELECTOR.score(query, Blocks(
            statistic, rows, in_head[None, :], scale * LOG2E, of_chunk, D, DP, False, D != DP, True, UNIT, LOG2_UNIT,
            LOG2E,
        ))  # fmt: skip
        new_top = tl.maximum(top, tl.max(largest_exponent(mass), axis=1))
        total = total * tl.exp2(top - new_top) + tl.sum(sum_over(mass, new_top[:, None]), axis=1)
        top = new_top
    pair = (tile * tl.num_programs(1) + head) * tl.num_programs(2) + tl.program_id(2)
    tl.store(mass_ptr + pair * (T * GROUP_P) + part * ROWS + m, top + tl.log2(total))
