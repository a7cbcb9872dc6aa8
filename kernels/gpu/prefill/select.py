"""Block selection for the tokens of a prefill: scores, selection, and what the units left out weigh.

Plain reference: `reference.selection_score`, `share_in_group`, `select_blocks`, `mass_score`. Sources: SPLA (arXiv
2601.22379) and those of `gpu/decode/score`. A token chooses the units (selection blocks) that it would in decode.

A *tile* is up to `TQ` <= 32 query tokens of one unit of one row: they share their complete pages, their forced units
and the recurrent state. The `M = TQ * GROUP_P` rows of a tile's
matrices are its tokens' heads, in the order of `tile_rows`.

Scores are never stored for each head: `prefill_score_kernel` goes over the units twice, for the heads' normalisers and
the mass of all units, and for the group's shared scores. Storing them would move 8 bytes a (token, unit, head);
computing them again is `4 d` FLOP on the tensor cores. What the units left out weigh is the mass of all minus that of
the selected ones, which `prefill_list_kernel` gathers: the rest is added to the exact part's denominator, so that an
error counts relative to both, and both are at least what was subtracted.

`q^2` is rounded to the cache dtype once, by 2^-9 at most in bf16: independent over `d` elements, a relative error of
about 2^-10 / sqrt(d) in the variance of `q . k`, less than what the rounding of the stored mean does to `q . mean`.

Statistics that are bytes become float16, exactly, and so do the queries. Their means are too coarse for the mean logit
of what was left out: `prefill_list_kernel` takes it from the sum of keys in the recurrent state.

Floor: `2 * 4 d` FLOP a (token, unit of a complete page, head), twice that for `km2-rem`; 4 bytes written and read a
(token, unit of a complete page, kv head).
"""

import triton
import triton.language as tl

from ..decode.select import midpoint
from ..selectors import largest_exponent, sum_over
from ..sinks import load_sinks
from ..statistics import LOG2E, Blocks, as_factor

NORMALISE = tl.constexpr(0)
SHARE = tl.constexpr(1)
MODES = {"normalise": 0, "share": 1}
SHIFT = tl.constexpr(100.0)


@triton.jit
def tile_rows(M: tl.constexpr, GROUP_P: tl.constexpr):
    """Token and head of the group of a tile's rows: a thread holds rows `r` and `r + 8` of a product, so that bit 3
    of a row tells heads apart and a sum over the group needs few other threads."""
    m = tl.arange(0, M)
    if (GROUP_P == 1) | (GROUP_P > 16):
        token = m // GROUP_P
        member = m % GROUP_P
    else:
        token = m // 16 * (16 // GROUP_P) + m % 8 // (GROUP_P // 2)
        member = m // 8 % 2 * (GROUP_P // 2) + m % (GROUP_P // 2)
    return token, member


@triton.jit
def group_sum(x, M: tl.constexpr, GROUP_P: tl.constexpr, CHUNK: tl.constexpr):
    """`[TQ, CHUNK]` from `[M, CHUNK]` with rows as `tile_rows` has them."""
    if GROUP_P == 1:
        total = x
    elif GROUP_P > 16:
        total = tl.sum(tl.reshape(x, [M // GROUP_P, GROUP_P, CHUNK]), axis=1)
    else:
        HALF: tl.constexpr = GROUP_P // 2
        total = tl.sum(tl.reshape(x, [M // 16, 2, 8 // HALF, HALF, CHUNK]), axis=1)
        total = tl.reshape(tl.sum(total, axis=2), [M // GROUP_P, CHUNK])
    return total


@triton.jit
def tile_queries(
    query_ptr, head, first_token, num_tokens, token, member, query_token_stride, query_head_stride,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Queries `[M, DP]` of the rows `token`, `member` of a tile, 0 where there is none."""
    exists = (token < num_tokens) & (member < GROUP)
    column = tl.arange(0, DP)
    row = query_ptr + (first_token + token).to(tl.int64) * query_token_stride
    row += (head * GROUP + member) * query_head_stride
    return tl.load(row[:, None] + column[None, :], mask=exists[:, None] & (column < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["block_table_stride", "last_page", "first_head", "num_lists", "num_norms"])
def prefill_score_kernel(
    query_ptr,  # [tokens, H, D]
    kv_ptr,
    block_table_ptr,
    tiles_ptr,  # [tiles, 4] int32: row, first token, tokens, position of the first token
    lse_ptr,  # [tiles, heads, norms, M] float32: written by NORMALISE, log2 of the sum over a split's units
    sums_ptr,  # [tiles, heads, norms, 3, TQ * GROUP_P] float32: written by NORMALISE: a power of two, the mass of a
    # split's units over it, the sum of their products (not in FP8)
    grouped_ptr,  # [tiles, heads, TQ, max_units] float32: written by SHARE
    best_ptr,  # [tiles, heads, TQ, max_units / SUB] float32: written by SHARE, the largest of SUB neighbouring units
    totals_ptr,  # [lists] int32: cleared by NORMALISE, as are the counters
    counters_ptr,  # [2] int32
    sink_ptr,  # [H]; None without sinks, or where scores are no masses
    mass_ptr,  # [tiles, heads, TQ] float32: written by SHARE, sums of tokens' shared scores; None where they are known
    query_token_stride,
    query_head_stride,
    page_stride,
    head_stride,
    block_table_stride,
    last_page,
    max_units,
    first_head,  # kv head; scratch begins with it
    num_lists,
    num_norms,  # splits of NORMALISE
    scale,
    MODE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    TQ: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    STRIDE: tl.constexpr,  # stored elements from the statistics of one unit to the next
    FP8: tl.constexpr,  # statistics are bytes
    LOG2_UNIT: tl.constexpr,
    CHUNK: tl.constexpr,  # units at a time
    SUB: tl.constexpr,
    STAGES: tl.constexpr,
    SELECTOR: tl.constexpr,  # a GpuSelector
    MASS: tl.constexpr,  # whether the mass of all units is asked for
    OWN_MASS: tl.constexpr,  # and is another number than the score
    DEPENDENT: tl.constexpr,
):
    """Grid (heads, tiles, splits)."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    M: tl.constexpr = TQ * GROUP_P
    if MODE == NORMALISE:
        program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
        place = tl.arange(0, 256)
        for begin in tl.range(program * 256, num_lists, programs * 256, num_stages=1):
            tl.store(totals_ptr + begin + place, tl.zeros([256], dtype=tl.int32), mask=begin + place < num_lists)
        if program == 0:
            tl.store(counters_ptr, 0)
            tl.store(counters_ptr + 1, 0)
    head = first_head + tl.program_id(0)
    tile = tl.program_id(1).to(tl.int64)
    row = tl.load(tiles_ptr + tile * 4).to(tl.int64)
    first_token = tl.load(tiles_ptr + tile * 4 + 1)
    num_tokens = tl.load(tiles_ptr + tile * 4 + 2)
    PER_PAGE: tl.constexpr = PAGE // UNIT
    num_units = tl.load(tiles_ptr + tile * 4 + 3) // PAGE * PER_PAGE  # of complete pages
    per_split = tl.cdiv(tl.cdiv(num_units, tl.num_programs(2)), CHUNK) * CHUNK
    start = tl.program_id(2) * per_split
    stop = tl.minimum(start + per_split, num_units)
    m = tl.arange(0, M)
    token, member = tile_rows(M, GROUP_P)
    pair = tile * tl.num_programs(0) + tl.program_id(0)
    norm = pair * num_norms + tl.program_id(2)
    sums = sums_ptr + norm * 3 * M + token * GROUP_P + member
    if (MODE == NORMALISE) & (start >= stop):
        # No share of this tile's units.
        tl.store(lse_ptr + norm * M + m, tl.full([M], float("-inf"), dtype=tl.float32))
        if MASS:
            tl.store(sums, tl.full([M], float("-inf"), dtype=tl.float32))
            tl.store(sums + M, tl.zeros([M], dtype=tl.float32))
            tl.store(sums + 2 * M, tl.zeros([M], dtype=tl.float32))
    if start < stop:
        column = tl.arange(0, DP)
        in_head = column < D
        q = tile_queries(
            query_ptr, head, first_token, num_tokens, token, member, query_token_stride, query_head_stride, GROUP, D, DP
        )  # [M, DP]
        q = as_factor(q, kv_ptr, FP8)
        if DP <= 128:
            # What comes out of a product stays in registers as the left side of the next ones, where a loaded matrix
            # would be read from shared memory again for every chunk.
            identity = (column[:, None] == column[None, :]).to(q.dtype)
            q = tl.dot(q, identity).to(q.dtype)
        query = SELECTOR.prepare(q, scale, True, LOG2E)
        pages = block_table_ptr + row * block_table_stride
        area = kv_ptr + head * head_stride + PAGE * 2 * D
        offset = tl.arange(0, CHUNK)
        unit = scale * LOG2E  # logits in powers of two, which is what the hardware raises
        top = tl.full([M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([M], dtype=tl.float32)
        mass = tl.zeros([M], dtype=tl.float32)
        products = tl.zeros([M], dtype=tl.float32)
        if MODE == SHARE:
            # The group's shared score itself and not its log, which would cost more than the rest: times 2^SHIFT,
            # so that only units of less than 2^-220 of the mass are all alike.
            lse = tl.load(lse_ptr + pair * num_norms * M + m)  # finite: the first split has units
            for other in tl.range(1, num_norms, num_stages=1):
                more = tl.load(lse_ptr + (pair * num_norms + other) * M + m)
                larger = tl.maximum(lse, more)
                lse = larger + tl.log2(tl.exp2(lse - larger) + tl.exp2(more - larger))
            t = tl.arange(0, TQ)
            if sink_ptr is not None:
                # Over UNIT, as the units' masses are.
                sink = load_sinks(sink_ptr, head * GROUP + member, member < GROUP) * LOG2E - LOG2_UNIT
                larger = tl.maximum(lse, sink)
                of_units = lse
                lse = larger + tl.log2(tl.exp2(lse - larger) + tl.exp2(sink - larger))
                if (mass_ptr is not None) & (tl.program_id(2) == 0):
                    of_head = tl.where(member < GROUP, tl.exp2(of_units - lse + SHIFT), 0.0)
                    of_token = tl.reshape(group_sum(of_head[:, None], M, GROUP_P, 1), [TQ])
                    tl.store(mass_ptr + pair * TQ + t, of_token, mask=t < num_tokens)
            shift = tl.where(member < GROUP, lse - SHIFT, float("inf"))
            shared_row = grouped_ptr + (pair * TQ + t) * max_units  # [TQ]
            best_row = best_ptr + (pair * TQ + t) * (max_units // SUB)
        # Page ids are fetched a step ahead: a load that waits for another load is not pipelined well.
        page = tl.load(pages + tl.minimum(start + offset, num_units - 1) // PER_PAGE)
        for first in tl.range(start, stop, CHUNK, num_stages=STAGES):
            statistic = area + tl.minimum(tl.maximum(page, 0), last_page).to(tl.int64) * page_stride  # [CHUNK]
            page = tl.load(pages + tl.minimum(first + CHUNK + offset, num_units - 1) // PER_PAGE)
            index = first + offset
            exists = index < stop
            if FP8:
                statistic = statistic.to(tl.pointer_type(tl.uint8))
            if PER_PAGE > 1:
                statistic += tl.minimum(index, num_units - 1) % PER_PAGE * STRIDE
            rows = statistic[:, None] + column[None, :]
            # The mass of a unit is over that of a token.
            if MODE == SHARE:
                beyond = shift[:, None] * -1.0  # a sign of the multiply-add in the loop, where a difference is none
            else:
                beyond = tl.where(exists, 0.0, float("-inf"))[None, :]
            score, mass_score, product = SELECTOR.score(query, Blocks(
                statistic, rows, in_head[None, :], unit, beyond, D, DP, FP8, D != DP, True, UNIT, LOG2_UNIT, LOG2E
            ))  # fmt: skip
            if MODE == SHARE:
                share = sum_over(score, 0.0)
                share = group_sum(share, M, GROUP_P, CHUNK)  # [TQ, CHUNK]
                mask = (t < num_tokens)[:, None] & exists[None, :]
                tl.store(shared_row[:, None] + index[None, :], share, mask=mask)
                best = tl.max(tl.reshape(tl.where(exists[None, :], share, 0.0), [TQ, CHUNK // SUB, SUB]), axis=2)
                sub = first // SUB + tl.arange(0, CHUNK // SUB)
                mask = (t < num_tokens)[:, None] & (sub * SUB < stop)[None, :]
                tl.store(best_row[:, None] + sub[None, :], best, mask=mask)
            else:
                # Finite: a chunk has a unit that exists.
                new_top = tl.maximum(top, tl.max(largest_exponent(score), axis=1))  # [M]
                decay = tl.exp2(top - new_top)
                total = total * decay + tl.sum(sum_over(score, new_top[:, None]), axis=1)
                if OWN_MASS:
                    mass = mass * decay + tl.sum(sum_over(mass_score, new_top[:, None]), axis=1)
                if MASS and not FP8:
                    products += tl.sum(tl.where(exists[None, :], product, 0.0), axis=1)
                top = new_top
        if MODE == NORMALISE:
            tl.store(lse_ptr + norm * M + m, top + tl.log2(total))
            if MASS:
                if not OWN_MASS:
                    mass = total
                tl.store(sums, top)
                tl.store(sums + M, mass)
                if not FP8:
                    tl.store(sums + 2 * M, products)


@triton.jit
def _largest(key, exists, forced, index, beyond, most):
    """Which of the 2-dimensional int32 `key` >= 0 are the `most` largest: forced ones, then of ties the lower index."""
    num_forced = tl.sum(forced.to(tl.int32))
    key = tl.where(exists, key, -1)
    key = tl.where(forced, 2147483647, key)
    # Invariant: count(key >= low) >= most > count(key >= high), or the forced ones alone are as many, or all are fewer.
    low = tl.min(tl.where(exists, key, 2147483647))
    high = tl.max(tl.where(forced, -1, key)) + 1
    low = tl.where(num_forced >= most, high, low)
    count = tl.where(num_forced >= most, num_forced, tl.sum(exists.to(tl.int32)))
    span = high - low
    while (count > most) & (span > 1):
        # Two thresholds a step, their counts in the halves of one number.
        lower = low + tl.maximum(span // 3, 1)
        upper = low + tl.maximum(span - span // 3, 1)
        above = tl.sum(tl.where(key >= lower, 1, 0) + tl.where(key >= upper, 65536, 0))
        above_upper = (above >> 16) & 65535
        above_lower = above & 65535
        at_upper = above_upper >= most
        at_lower = above_lower >= most
        high = tl.where(at_upper, high, tl.where(at_lower, upper, lower))
        low = tl.where(at_upper, upper, tl.where(at_lower, lower, low))
        count = tl.where(at_upper, above_upper, tl.where(at_lower, above_lower, count))
        span = high - low
    selected = key >= low
    if (count > most) & (num_forced < most):
        # Ties at the threshold: the lower index goes first. Bisect for the last one that does.
        tied = key == low
        allowed = most - (count - tl.sum(tied.to(tl.int32)))
        bound = beyond * 0
        while beyond - bound > 1:
            middle = (bound + beyond) // 2
            fits = tl.sum((tied & (index < middle)).to(tl.int32)) <= allowed
            bound = tl.where(fits, middle, bound)
            beyond = tl.where(fits, beyond, middle)
        selected = (key > low) | (tied & (index < bound))
    return selected & exists, key


@triton.jit
def tile_units(position, PAGE: tl.constexpr, UNIT: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Of a tile at `position`: units of its complete pages, units of its current page, and how many of the former every
    token selects: the first, and so many before the current page as its units leave of the last."""
    num_complete = position // PAGE * (PAGE // UNIT)
    num_current = position // UNIT + 1 - num_complete
    return num_complete, num_current, FIRST + tl.maximum(LAST - num_current, 0)


@triton.jit
def _places(taken):
    """A place for each of the 2-dimensional `taken`, one after the other, and how many there are."""
    taken = taken.to(tl.int32)
    column = tl.sum(taken, axis=0)
    place = tl.cumsum(taken, axis=0) - 1 + (tl.cumsum(column, axis=0) - column)[None, :]
    return place, tl.sum(column, axis=0)


@triton.jit(do_not_specialize=["num_rows"])
def prefill_select_kernel(
    tiles_ptr,
    tile_run_ptr,  # [tiles] int32: run of a tile
    grouped_ptr,  # [tiles, heads, TQ, max_units] float32
    best_ptr,  # [tiles, heads, TQ, max_units / SUB] float32
    table_ptr,  # [tiles, heads, TQ, SLOTS] int32: units of complete pages that a token selected, places in the row: the
    # forced ones, then the others, unordered
    rank_ptr,  # [tiles, heads, TQ, SLOTS] int32: place of the token among those of the run that selected the unit
    count_ptr,  # [tiles, heads, TQ] int32
    totals_ptr,  # [runs, heads, max_units] int32, zero before: tokens that selected the unit and were not forced to
    mass_ptr,  # [tiles, heads, TQ] float32: the sum of a token's shared scores; None where every head's make 2^SHIFT
    max_units,
    num_rows,  # tokens a program
    TQ: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,  # units of complete pages a token selects at most: the budget without the current unit
    SLOTS_P: tl.constexpr,  # a power of two
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SUB: tl.constexpr,
    SUBS: tl.constexpr,  # a power of two, at least the SUB-sized parts of every tile's units
    LANES: tl.constexpr,
    TOP_P: tl.constexpr,  # 0 where there is none
    DEPENDENT: tl.constexpr,
):
    """Grid (heads, tiles, TQ / num_rows): every tile has more units in complete pages than it may select.

    Only so many parts of SUB neighbouring units can hold a selected unit: those with a forced unit, and of the others
    those with the largest best units. The lists of units get no order; attention computes every entry on its own.

    A token at a time: with one warp, nothing waits for other warps.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tile = tl.program_id(1).to(tl.int64)
    num_tokens = tl.load(tiles_ptr + tile * 4 + 2)
    position = tl.load(tiles_ptr + tile * 4 + 3)
    num_complete, num_current, num_forced = tile_units(position, PAGE, UNIT, FIRST, LAST)
    wanted = SLOTS + 1 - num_current
    pair = tile * tl.num_programs(0) + tl.program_id(0)
    run = tl.load(tile_run_ptr + tile).to(tl.int64)
    totals = totals_ptr + (run * tl.num_programs(0) + tl.program_id(0)) * max_units
    # The first dimension a thread has to itself: running sums along it need no other thread.
    part = tl.arange(0, SUBS // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    num_parts = (num_complete + SUB - 1) // SUB
    part_exists = part < num_parts
    part_forced = part * SUB < FIRST
    if LAST > 1:
        part_forced |= (num_forced > FIRST) & (part * SUB + SUB > num_complete - (num_forced - FIRST))
    slot = tl.arange(0, SLOTS_P)
    for step in tl.range(0, num_rows):
        token = tl.program_id(2) * num_rows + step
        if token < num_tokens:
            row = pair * TQ + token
            best = tl.load(best_ptr + row * (max_units // SUB) + part, mask=part_exists, other=0.0)
            # Not negative, so that its bits compare as it does.
            chosen, _ = _largest(
                best.to(tl.int32, bitcast=True), part_exists, part_exists & part_forced, part, num_parts, wanted
            )
            place, count = _places(chosen)
            tl.store(table_ptr + row * SLOTS + place, part, mask=chosen)
            tl.debug_barrier()
            of_slot = tl.load(table_ptr + row * SLOTS + slot, mask=slot < count, other=0)
            tl.debug_barrier()
            index = of_slot[:, None] * SUB + tl.arange(0, SUB)[None, :]  # [SLOTS_P, SUB]
            complete = (slot < count)[:, None] & (index < num_complete)
            forced = complete & ((index < FIRST) | (index >= num_complete - (num_forced - FIRST)))
            grouped = tl.load(grouped_ptr + row * max_units + index, mask=complete, other=0.0)
            selected, key = _largest(grouped.to(tl.int32, bitcast=True), complete, forced, index, num_complete, wanted)

            if TOP_P > 0:
                # As in `gpu/decode/select`: bisect for the least key with too little mass above it. Every head's shares
                # of all units make 1, but for what goes to its sink.
                if mass_ptr is None:
                    enough = TOP_P * GROUP * tl.exp2(SHIFT)
                else:
                    enough = TOP_P * tl.load(mass_ptr + row)
                chosen = tl.where(selected, grouped, 0.0)
                low_key = tl.min(tl.where(selected, key, 2147483647)) - 1
                high_key = tl.full([], 2147483647, dtype=tl.int32)
                middle = midpoint(low_key, high_key)
                while middle != low_key:
                    short = tl.sum(tl.where(key > middle, chosen, 0.0)) < enough
                    high_key = tl.where(short, middle, high_key)
                    low_key = tl.where(short, low_key, middle)
                    middle = midpoint(low_key, high_key)
                # Of its ties the lower unit goes first, while the mass before it is too little.
                tied = selected & (key == high_key)
                above_mass = tl.sum(tl.where(key > high_key, chosen, 0.0))
                bound = num_complete * 0
                beyond = num_complete
                while beyond - bound > 1:
                    middle = (bound + beyond) // 2
                    short = above_mass + tl.sum(tl.where(tied & (index < middle), chosen, 0.0)) < enough
                    bound = tl.where(short, middle, bound)
                    beyond = tl.where(short, beyond, middle)
                selected &= forced | (key > high_key) | (tied & (index <= bound))

            free = selected & (forced == 0)
            place, count = _places(free)
            of_forced = tl.where(index < FIRST, index, num_forced + index - num_complete)
            place = tl.where(free, num_forced + place, of_forced)
            tl.store(table_ptr + row * SLOTS + place, index, mask=selected)
            tl.store(count_ptr + row, num_forced + count)
            rank = tl.atomic_add(totals + index, 1, mask=free, sem="relaxed")
            tl.store(rank_ptr + row * SLOTS + place, rank, mask=free)


@triton.jit(do_not_specialize=["block_table_stride"])
def prefill_work_kernel(
    block_table_ptr,
    runs_ptr,  # [runs, 3] int32: first tile, tiles, row, of a row's share of this pass
    totals_ptr,  # [runs, heads, max_units] int32: tokens of a unit's list
    first_ptr,  # [runs, heads, max_units] int32: the first step of a unit's list
    counters_ptr,  # [2] int32, zero before: work items, steps
    work_ptr,  # [items, 4] int32: page * PER_PAGE + unit of the page, head of the pass, first step, steps
    list_ptr,  # [steps, TM, 2] int32
    block_table_stride,
    max_units,
    PER_PAGE: tl.constexpr,
    TM: tl.constexpr,  # tokens of a step
    SPAN: tl.constexpr,  # steps of a work item
    WIDTH: tl.constexpr,  # units a program
    DEPENDENT: tl.constexpr,
):
    """Grid (unit groups, heads, runs): cut lists into steps and these into work items; the unused end of a unit's last
    step becomes -1. Where programs find place for theirs depends on which comes first; what comes out of an entry does
    not depend on its place."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    index = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    exists = index < max_units
    head = tl.program_id(1)
    run = tl.program_id(2).to(tl.int64)
    row = tl.load(runs_ptr + run * 3 + 2).to(tl.int64)
    where = (run * tl.num_programs(1) + head) * max_units + index
    total = tl.load(totals_ptr + where, mask=exists, other=0)
    steps = (total + TM - 1) // TM
    items = (steps + SPAN - 1) // SPAN
    first_item = tl.atomic_add(counters_ptr, tl.sum(items, axis=0), sem="relaxed")
    if SPAN == 1:
        first = first_item  # a step and its item have one number
    else:
        first = tl.atomic_add(counters_ptr + 1, tl.sum(steps, axis=0), sem="relaxed")
    first_item = (first_item + tl.cumsum(items, axis=0) - items).to(tl.int64)
    first += tl.cumsum(steps, axis=0) - steps
    tl.store(first_ptr + where, first, mask=exists)
    used = steps > 0
    pages = block_table_ptr + row * block_table_stride
    unit = tl.maximum(tl.load(pages + index // PER_PAGE, mask=used, other=0), 0) * PER_PAGE + index % PER_PAGE
    for item in tl.range(0, tl.max(items, axis=0)):
        target = work_ptr + (first_item + item) * 4
        mask = item < items
        tl.store(target, unit, mask=mask)
        tl.store(target + 1, tl.zeros_like(unit) + head, mask=mask)
        tl.store(target + 2, first + item * SPAN, mask=mask)
        tl.store(target + 3, tl.minimum(steps - item * SPAN, SPAN), mask=mask)
    slot = tl.arange(0, TM)
    free = total[:, None] + slot[None, :]  # [WIDTH, TM]
    target = list_ptr + (first.to(tl.int64)[:, None] * TM + free) * 2
    mask = used[:, None] & (free < (steps * TM)[:, None])
    tl.store(target, tl.full([WIDTH, TM], -1, dtype=tl.int32), mask=mask)
    tl.store(target + 1, tl.zeros([WIDTH, TM], dtype=tl.int32), mask=mask)


@triton.jit(do_not_specialize=["block_table_stride", "last_page", "first_head", "num_norms"])
def prefill_list_kernel(
    query_ptr,
    kv_ptr,
    block_table_ptr,
    tiles_ptr,
    tile_run_ptr,
    table_ptr,
    rank_ptr,
    count_ptr,
    first_ptr,
    sums_ptr,
    gain_ptr,  # [H] float32
    tail_ptr,  # [tiles, heads, 2, TQ * GROUP_P] float32: log2 of the mean mass, mean logit of the tokens left out
    list_ptr,  # [steps, TM, 2] int32: (tile * PARTS + part) * TQ + token, and the token's place in the batch
    list_tail_ptr,  # [steps, TM, 2, GROUP_P] float32: the tail, beside the entries, where attention needs it
    query_token_stride,
    query_head_stride,
    page_stride,
    head_stride,
    block_table_stride,
    last_page,
    max_units,
    first_head,
    num_norms,
    scale,
    tile_state_ptr,  # [tiles] int32: where the state at a tile's page is
    state_ptr,  # [states, G, S_ROWS + 1, D] float32: state at the beginning of a page; last z
    num_kv_heads,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    TQ: tl.constexpr,
    TM: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    STRIDE: tl.constexpr,
    FP8: tl.constexpr,
    LOG2_UNIT: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_P: tl.constexpr,  # a power of two, at least 16
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    PARTS: tl.constexpr,  # units a token selects at most and is not forced to
    S_ROWS: tl.constexpr,
    SELECTOR: tl.constexpr,  # a GpuSelector
    MASS: tl.constexpr,  # whether there is a tail
    LIST_TAIL: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid (heads, tiles, TQ): every (token, unit) that was selected and not forced into the list of its unit; what was
    left out weighs what all units weigh less the selected ones."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tile = tl.program_id(1).to(tl.int64)
    token = tl.program_id(2)
    if token < tl.load(tiles_ptr + tile * 4 + 2):
        pair = tile * tl.num_programs(0) + tl.program_id(0)
        run = tl.load(tile_run_ptr + tile).to(tl.int64)
        PER_PAGE: tl.constexpr = PAGE // UNIT
        num_complete, _, num_forced = tile_units(tl.load(tiles_ptr + tile * 4 + 3), PAGE, UNIT, FIRST, LAST)
        slot = tl.arange(0, SLOTS_P)
        count = tl.load(count_ptr + pair * TQ + token)
        taken = slot < count
        unit = tl.load(table_ptr + (pair * TQ + token) * SLOTS + slot, mask=taken, other=0)
        listed = taken & (slot >= num_forced)
        rank = tl.load(rank_ptr + (pair * TQ + token) * SLOTS + slot, mask=listed, other=0)
        where = (run * tl.num_programs(0) + tl.program_id(0)) * max_units + unit
        first = tl.load(first_ptr + where, mask=listed, other=0)
        place = first.to(tl.int64) * TM + rank
        entry = ((tile * PARTS + slot - num_forced) * TQ + token).to(tl.int32)
        batch_token = tl.load(tiles_ptr + tile * 4 + 1) + token
        tl.store(list_ptr + place * 2, entry, mask=listed)
        tl.store(list_ptr + place * 2 + 1, tl.zeros_like(entry) + batch_token, mask=listed)
        if MASS:
            head = first_head + tl.program_id(0)
            row = tl.load(tiles_ptr + tile * 4).to(tl.int64)
            MP: tl.constexpr = GROUP_P if GROUP_P > 16 else 16  # heads, padded for the tensor cores
            member = tl.arange(0, MP)
            in_group = member < GROUP
            column = tl.arange(0, DP)
            in_head = column < D
            query = query_ptr + batch_token.to(tl.int64) * query_token_stride
            query += (head * GROUP + member) * query_head_stride
            q = tl.load(query[:, None] + column[None, :], mask=in_group[:, None] & in_head[None, :], other=0.0)
            q = as_factor(q, kv_ptr, FP8)  # [MP, DP]
            physical = tl.load(block_table_ptr + row * block_table_stride + unit // PER_PAGE, mask=taken, other=0)
            statistic = kv_ptr + tl.minimum(tl.maximum(physical, 0), last_page).to(tl.int64) * page_stride
            if FP8:
                statistic = (statistic + (head * head_stride + PAGE * 2 * D)).to(tl.pointer_type(tl.uint8))
                statistic += unit % PER_PAGE * STRIDE
            else:
                statistic += head * head_stride + PAGE * 2 * D + unit % PER_PAGE * STRIDE
            rows = statistic[:, None] + column[None, :]
            mask = taken[:, None] & in_head[None, :]
            # The score is asked twice, for the products and then for the mass over what is known only below. What both
            # need is computed once, and what only the mass needs after the loop: registers and shared memory hold one
            # operand at a time.
            _, _, product = SELECTOR.score(SELECTOR.prepare(q, scale, True, LOG2E), Blocks(
                statistic, rows, mask, scale * LOG2E, 0.0, D, DP, FP8, True, True, UNIT, LOG2_UNIT, LOG2E
            ))  # [MP, SLOTS_P] # fmt: skip
            sums = sums_ptr + pair * num_norms * 3 * TQ * GROUP_P + token * GROUP_P + member
            top = tl.load(sums, mask=in_group, other=0.0)
            all_mass = tl.load(sums + TQ * GROUP_P, mask=in_group, other=0.0)
            if not FP8:
                all_products = tl.load(sums + 2 * TQ * GROUP_P, mask=in_group, other=0.0)
            elif LIST_TAIL:
                # Means of 3 bits of mantissa err alike in all units where keys have something in common. The state has
                # the sum of all keys; what the means get wrong is then that of the selected units alone.
                state = tl.load(tile_state_ptr + tile).to(tl.int64) * num_kv_heads + head
                z = tl.load(state_ptr + (state * (S_ROWS + 1) + S_ROWS) * D + column, mask=in_head, other=0.0)  # [DP]
                all_products = tl.sum(q.to(tl.float32) * z[None, :], axis=1) / UNIT
            else:
                all_products = tl.zeros([MP], dtype=tl.float32)
            for _ in tl.range(1, num_norms, num_stages=1):
                sums += 3 * TQ * GROUP_P
                split_top = tl.load(sums, mask=in_group, other=0.0)
                larger = tl.maximum(top, split_top)
                all_mass *= tl.exp2(top - larger)
                all_mass += tl.load(sums + TQ * GROUP_P, mask=in_group, other=0.0) * tl.exp2(split_top - larger)
                if not FP8:
                    all_products += tl.load(sums + 2 * TQ * GROUP_P, mask=in_group, other=0.0)
                top = larger
            _, mass, _ = SELECTOR.score(SELECTOR.prepare(q, scale, True, LOG2E), Blocks(
                statistic, rows, mask, scale * LOG2E, -top[:, None], D, DP, FP8, True, True, UNIT, LOG2_UNIT, LOG2E
            ))  # [MP, SLOTS_P] # fmt: skip
            weight = sum_over(mass, 0.0)
            rest = all_mass - tl.sum(tl.where(taken[None, :], weight, 0.0), axis=1)  # [MP]
            rest = tl.where(num_complete > count, rest, 0.0)
            num_rest = tl.maximum(num_complete - count, 1).to(tl.float32)  # units
            gain = tl.load(gain_ptr + head * GROUP + member, mask=in_group, other=0.0)
            weighs = (rest > 0) & (gain > 0)
            # Masses are those of UNIT tokens, and so many tokens share them.
            norm = tl.where(weighs, rest * gain / num_rest, 1.0)
            log_mean = tl.where(weighs, top + tl.log2(norm), float("-inf"))
            center = (all_products - tl.sum(tl.where(taken[None, :], product, 0.0), axis=1)) * scale / num_rest
            tail = tail_ptr + pair * 2 * TQ * GROUP_P + token * GROUP_P + member
            tl.store(tail, log_mean, mask=in_group)
            tl.store(tail + TQ * GROUP_P, center, mask=in_group)
            if LIST_TAIL:
                target = list_tail_ptr + place[:, None] * 2 * GROUP_P + member[None, :]  # [SLOTS_P, MP]
                mask = listed[:, None] & in_group[None, :]
                tl.store(target, tl.broadcast_to(log_mean[None, :], [SLOTS_P, MP]), mask=mask)
                tl.store(target + GROUP_P, tl.broadcast_to(center[None, :], [SLOTS_P, MP]), mask=mask)
