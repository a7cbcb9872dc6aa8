"""Select units (selection blocks) from their scores: group sharing, forced units, top-k, top-p, and the page table.

Plain reference: `reference.share_in_group`, `reference.select_blocks`, `page_table.build_page_table`. Source: docs/
design.md, 1 (SPLA, arXiv 2601.22379, block selection; the group shares one selection).

The k-th largest score is found by bisecting the order-preserving integer image of the scores, all of them in registers
of one program: a count over the program a step, until the count is `k`, which on distinct scores is some ten steps and
never more than 32. A tie at the threshold goes to the lower index by a prefix sum.

Floor, bytes a (token, kv head): 4 bytes a unit and head of the group, read from L2; written, one byte a unit and 4 a
selected unit. It is bound by latency: two reductions a step.
"""

import triton
import triton.language as tl

from ..sinks import load_sinks


@triton.jit
def _ordered(x):
    """Int32 that compare as the float32 `x` do."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def midpoint(low, high):
    """Floor of the mean of two int32, without overflow."""
    return (low >> 1) + (high >> 1) + (low & high & 1)


@triton.jit
def _group_scores(
    pair, head, num_complete, scores_ptr, lse_ptr, sink_ptr, max_units, num_splits, first,
    GROUP: tl.constexpr, GROUP_P: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Log of the sum over the group of each head's softmax over complete pages' units, and its sink where `sink_ptr` is
    not None, from `first` on, `[WIDTH]`."""
    index = first + tl.arange(0, WIDTH)
    member = tl.arange(0, GROUP_P)
    valid = (index < num_complete)[:, None] & (member < GROUP)[None, :]
    scores = scores_ptr + (pair * max_units + index)[:, None] * GROUP_P + member[None, :]
    score = tl.load(scores, mask=valid, other=float("-inf"))  # [WIDTH, GROUP_P]
    split = tl.arange(0, SPLITS)
    parts = lse_ptr + (pair * num_splits + split)[:, None] * GROUP_P + member[None, :]
    part = tl.load(parts, mask=(split < num_splits)[:, None] & (member < GROUP)[None, :], other=float("-inf"))
    best = tl.max(part, axis=0)  # [GROUP_P]
    best = tl.where(member < GROUP, best, 0.0)
    norm = tl.sum(tl.exp(part - best[None, :]), axis=0)
    lse = best + tl.log(tl.where(member < GROUP, norm, 1.0))
    if sink_ptr is not None:
        sink = load_sinks(sink_ptr, head * GROUP + member, member < GROUP)
        larger = tl.maximum(lse, sink)
        lse = larger + tl.log(tl.exp(lse - larger) + tl.exp(sink - larger))
    log_probability = score - lse[None, :]
    top = tl.max(log_probability, axis=1)  # [WIDTH]
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(log_probability - safe[:, None]), axis=1)
    return tl.where(total > 0, safe + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))


@triton.jit
def all_group_scores(
    pair, head, num_complete, scores_ptr, lse_ptr, sink_ptr, grouped_ptr, max_units, num_splits,
    GROUP: tl.constexpr, GROUP_P: tl.constexpr, UNITS: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The scores by which a group ranks the units of complete pages, `[UNITS]`, -inf behind them."""
    if WIDTH == UNITS:
        grouped = _group_scores(
            pair, head, num_complete, scores_ptr, lse_ptr, sink_ptr, max_units, num_splits, 0,
            GROUP, GROUP_P, WIDTH, SPLITS,
        )  # [UNITS] # fmt: skip
    else:
        # A long context and a large group do not fit into registers at once.
        index = tl.arange(0, UNITS)
        shared = grouped_ptr + pair * max_units
        for first in tl.range(0, num_complete, WIDTH):
            part = _group_scores(
                pair, head, num_complete, scores_ptr, lse_ptr, sink_ptr, max_units, num_splits, first,
                GROUP, GROUP_P, WIDTH, SPLITS,
            )  # fmt: skip
            here = first + tl.arange(0, WIDTH)
            tl.store(shared + here, part, mask=here < num_complete)
        tl.debug_barrier()
        grouped = tl.load(shared + index, mask=index < num_complete, other=float("-inf"))
    return grouped


@triton.jit
def choose(grouped, complete, forced, num_complete, num_forced, wanted, TOP_P: tl.constexpr):
    """Which units are selected, `[UNITS]` bool: the forced ones and the best others.

    Args:
        grouped: Scores of the units `[UNITS]`.
        complete: Which units exist, `[UNITS]`: `num_complete`, ahead of those that do not.
        forced: Which of these are selected whatever their score: `num_forced`.
        num_complete: At least `wanted`.
        num_forced: At most `wanted`.
        wanted: How many to select.
        TOP_P: Share of the mass of all units at which selecting stops; 0 where it does not.
    """
    # Forced units above, units that do not exist below every score.
    key = tl.where(complete, _ordered(grouped), -2147483648)
    key = tl.where(forced, 2147483647, key)

    # Invariant: count(key >= low) >= wanted > count(key >= high), or the forced units alone are as many.
    low = tl.min(tl.where(complete, key, 2147483647), axis=0)
    high = tl.max(tl.where(complete & ~forced, key, -2147483648), axis=0) + 1
    low = tl.where(wanted <= num_forced, high, low)
    count = tl.where(wanted <= num_forced, num_forced, num_complete)
    span = high.to(tl.int64) - low
    # Two thresholds a step, their counts in the halves of one number: what costs is the reduction over the program,
    # not what is reduced.
    while (count != wanted) & (span > 1):
        lower = (low + tl.maximum(span // 3, 1)).to(tl.int32)
        upper = (low + tl.maximum(span * 2 // 3, 1)).to(tl.int32)
        above = tl.sum(tl.where(key >= lower, 1, 0) + tl.where(key >= upper, 65536, 0), axis=0)
        above_upper = (above >> 16) & 65535
        above_lower = above & 65535
        at_upper = above_upper >= wanted
        at_lower = above_lower >= wanted
        high = tl.where(at_upper, high, tl.where(at_lower, upper, lower))
        low = tl.where(at_upper, upper, tl.where(at_lower, lower, low))
        count = tl.where(at_upper, above_upper, tl.where(at_lower, above_lower, count))
        span = high.to(tl.int64) - low
    selected = key >= low
    if count > wanted:
        tied = key == low
        rank = tl.cumsum(tied.to(tl.int32), axis=0)
        allowed = wanted - (count - tl.sum(tied.to(tl.int32), axis=0))
        selected = (key > low) | (tied & (rank <= allowed))

    if TOP_P > 0:
        # A unit is kept while the mass ranked before it is short of the wanted mass. Bisect for the least key that is:
        # the mass strictly above a key falls as the key rises.
        mass = tl.where(complete, tl.exp(grouped), 0.0)
        enough_mass = TOP_P * tl.sum(mass, axis=0)
        chosen_mass = tl.where(selected, mass, 0.0)
        floor_key = tl.min(tl.where(selected, key, 2147483647), axis=0)  # least selected key
        low_key = floor_key - 1  # may have mass above it >= enough_mass
        high_key = tl.full([], 2147483647, dtype=tl.int32)  # nothing lies above it
        middle = midpoint(low_key, high_key)
        while middle != low_key:
            above_mass = tl.sum(tl.where(key > middle, chosen_mass, 0.0), axis=0)
            short = above_mass < enough_mass
            high_key = tl.where(short, middle, high_key)
            low_key = tl.where(short, low_key, middle)
            middle = midpoint(low_key, high_key)
        # high_key is the least key with too little mass above it; among its ties the lower index goes first.
        tied = selected & (key == high_key)
        tied_mass = tl.where(tied, chosen_mass, 0.0)
        before = tl.sum(tl.where(key > high_key, chosen_mass, 0.0), axis=0)
        before += tl.cumsum(tied_mass, axis=0) - tied_mass
        selected &= forced | (key > high_key) | (tied & (before < enough_mass))
    return selected


@triton.jit
def select_units(
    row,
    token_in_row,
    head,
    query_start_loc_ptr,
    seq_lens_ptr,
    block_table_ptr,
    scores_ptr,
    lse_ptr,
    sink_ptr,  # [H]; None without sinks, or where scores are no masses
    grouped_ptr,  # [tokens, G, max_units] float32, scratch
    table_ptr,  # [tokens, G, BUDGET] int32: (page * G + head) * PER_PAGE + unit of the page, ascending
    count_ptr,  # [tokens, G] int32: units in the table
    flags_ptr,  # [tokens, G, max_units] int8: which units of complete pages are selected; written where some are not
    units_ptr,  # as the table: the units by their number in the sequence; None where nobody asks
    block_table_stride,
    max_units,
    num_kv_heads,
    num_splits,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    BUDGET: tl.constexpr,
    BUDGET_P: tl.constexpr,  # padded to a power of two
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    UNITS: tl.constexpr,  # max_units, padded to a power of two
    WIDTH: tl.constexpr,  # units of group scores at a time
    SPLITS: tl.constexpr,  # num_splits, padded to a power of two
    TOP_P: tl.constexpr,  # 0 where there is none
    WAIT: tl.constexpr,  # for the launch before, as late as possible
):
    """Select for one (query token, kv head)."""
    seq_len = tl.load(seq_lens_ptr + row)
    first_token = tl.load(query_start_loc_ptr + row)
    query_len = tl.load(query_start_loc_ptr + row + 1) - first_token
    if (seq_len > 0) & (token_in_row < query_len):
        token = (first_token + token_in_row).to(tl.int64)
        PER_PAGE: tl.constexpr = PAGE // UNIT
        position = seq_len - query_len + token_in_row
        current = position // UNIT  # the current unit
        num_complete = position // PAGE * PER_PAGE  # units of complete pages
        num_current = current + 1 - num_complete  # units of the current page, all selected
        pages = block_table_ptr + row.to(tl.int64) * block_table_stride
        pair = token * num_kv_heads + head
        table = table_ptr + pair * BUDGET
        index = tl.arange(0, UNITS)
        complete = index < num_complete
        fetched = complete & (index < tl.where(current + 1 <= BUDGET, 0, UNITS))
        page = tl.maximum(tl.load(pages + index // PER_PAGE, mask=fetched, other=0), 0)
        unit_id = (page * num_kv_heads + head) * PER_PAGE + index % PER_PAGE  # [UNITS], early
        if WAIT:
            tl.extra.cuda.gdc_wait()
        if current + 1 <= BUDGET:
            slot = tl.arange(0, BUDGET_P)
            every = tl.maximum(tl.load(pages + slot // PER_PAGE, mask=slot <= current, other=0), 0)
            every = (every * num_kv_heads + head) * PER_PAGE + slot % PER_PAGE
            tl.store(table + slot, every, mask=slot <= current)
            tl.store(count_ptr + pair, current + 1)
            if units_ptr is not None:
                tl.store(units_ptr + pair * BUDGET + slot, slot, mask=slot <= current)
        else:
            grouped = all_group_scores(
                pair, head, num_complete, scores_ptr, lse_ptr, sink_ptr, grouped_ptr, max_units, num_splits,
                GROUP, GROUP_P, UNITS, WIDTH, SPLITS,
            )  # fmt: skip
            forced = complete & ((index < FIRST) | (index > current - LAST))
            num_forced = FIRST + tl.maximum(LAST - num_current, 0)  # the budget is larger: no overlap
            wanted = BUDGET - num_current  # units of complete pages to take; those of the current page come last
            selected = choose(grouped, complete, forced, num_complete, num_forced, wanted, TOP_P)
            taken = selected.to(tl.int32)
            place = tl.cumsum(taken, axis=0) - 1
            tl.store(table + place, unit_id, mask=selected)
            tl.store(flags_ptr + pair * max_units + index, taken.to(tl.int8), mask=complete)
            num_taken = tl.sum(taken, axis=0)
            last = (tl.maximum(tl.load(pages + position // PAGE), 0) * num_kv_heads + head) * PER_PAGE
            unit = tl.arange(0, BUDGET_P)
            tl.store(table + num_taken + unit, last + unit, mask=unit < num_current)
            tl.store(count_ptr + pair, num_taken + num_current)
            if units_ptr is not None:
                units = units_ptr + pair * BUDGET
                tl.store(units + place, index, mask=selected)
                tl.store(units + num_taken + unit, num_complete + unit, mask=unit < num_current)
