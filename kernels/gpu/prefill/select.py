"""What a tile of a prompt attends to: candidates, the scores of their fine blocks, and the blocks that are selected.

Plain reference: `reference.select_blocks`, `select_fine_blocks`, over tiles (`algorithm/tiles.py`). What is selected is
left as a table of addresses, so that any kernel of paged attention can attend to it (`attend.py`).

`prompt_fine_kernel` multiplies the voters of a candidate tile with the keys of its candidates; floor: `2 d` FLOP a
(voter, key, head).
"""

import triton
import triton.language as tl

from ..decode.select import midpoint
from ..sinks import load_sinks
from ..statistics import LOG2E
from .score import SHIFT, add_log2
from .tiles import forced_blocks, in_registers, load_queries, tile_tokens, voters


@triton.jit
def largest(key, exists, forced, index, num, most):
    """Which of the int32 `key` >= 0 are the `most` largest: forced ones, then of ties the lower index (of `num`)."""
    num_forced = tl.sum(forced.to(tl.int32), axis=0)
    key = tl.where(exists, key, -1)
    key = tl.where(forced, 2147483647, key)
    # Invariant: count(key >= low) >= most > count(key >= high), or the forced ones alone are as many, or all are fewer.
    low = tl.min(tl.where(exists, key, 2147483647), axis=0)
    high = tl.max(tl.where(forced, -1, key), axis=0) + 1
    low = tl.where(num_forced >= most, high, low)
    count = tl.where(num_forced >= most, num_forced, tl.sum(exists.to(tl.int32), axis=0))
    span = high - low
    while (count > most) & (span > 1):
        # Two thresholds a step, their counts in the halves of one number.
        lower = low + tl.maximum(span // 3, 1)
        upper = low + tl.maximum(span - span // 3, 1)
        above = tl.sum(tl.where(key >= lower, 1, 0) + tl.where(key >= upper, 65536, 0), axis=0)
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
        allowed = most - (count - tl.sum(tied.to(tl.int32), axis=0))
        bound = num * 0
        beyond = num
        while beyond - bound > 1:
            middle = (bound + beyond) // 2
            fits = tl.sum((tied & (index < middle)).to(tl.int32), axis=0) <= allowed
            bound = tl.where(fits, middle, bound)
            beyond = tl.where(fits, beyond, middle)
        selected = (key > low) | (tied & (index < bound))
    return selected & exists, key


@triton.jit
def enough_mass(selected, forced, key, share, index, num, enough):
    """Of the selected ones those that are forced, and by falling key as many more as have mass `enough` together, the
    one that reaches it included; of ties the lower index first. As in `gpu/decode/select`."""
    chosen = tl.where(selected, share, 0.0)
    low_key = tl.min(tl.where(selected, key, 2147483647), axis=0) - 1
    high_key = tl.full([], 2147483647, dtype=tl.int32)
    middle = midpoint(low_key, high_key)
    while middle != low_key:
        short = tl.sum(tl.where(key > middle, chosen, 0.0), axis=0) < enough
        high_key = tl.where(short, middle, high_key)
        low_key = tl.where(short, low_key, middle)
        middle = midpoint(low_key, high_key)
    tied = selected & (key == high_key)
    above_mass = tl.sum(tl.where(key > high_key, chosen, 0.0), axis=0)
    bound = num * 0
    beyond = num
    while beyond - bound > 1:
        middle = (bound + beyond) // 2
        short = above_mass + tl.sum(tl.where(tied & (index < middle), chosen, 0.0), axis=0) < enough
        bound = tl.where(short, middle, bound)
        beyond = tl.where(short, beyond, middle)
    return selected & (forced | (key > high_key) | (tied & (index <= bound)))


@triton.jit
def unit_addresses(pages, unit, exists, of_head, page_stride, unit_stride, last_page, PER_PAGE: tl.constexpr):
    """Where in the cache the units `unit` of a row begin, of which `exists`; `pages` is its block table."""
    page = tl.load(pages + unit // PER_PAGE, mask=exists, other=0)
    page = tl.minimum(tl.maximum(page, 0), last_page)
    return page * page_stride + of_head + unit % PER_PAGE * unit_stride


@triton.jit(do_not_specialize=["block_table_stride", "last_page"])
def prompt_candidates_kernel(
    block_table_ptr,
    groups_ptr,  # [groups, 4] int32
    shares_ptr,  # [groups, G, max_units] float32
    candidates_ptr,  # [groups, G, 2, MOST] int32: candidates in ascending order, and where in the cache each begins
    num_ptr,  # [groups, G] int32
    left_ptr,  # [tiles, G, max_units] float32: cleared, for nothing is selected yet; None where nobody asks
    page_stride,  # in units of `address`
    head_stride,
    unit_stride,
    block_table_stride,
    last_page,
    max_units,
    C: tl.constexpr,
    T: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    MOST: tl.constexpr,  # candidates at most, forced ones and those of the current page included
    UNITS_P: tl.constexpr,  # a power of two, at least the units of every group
):
    """Grid (groups, G)."""
    group = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    pair = group * tl.num_programs(1) + head
    row = tl.load(groups_ptr + group * 4).to(tl.int64)
    base = tl.load(groups_ptr + group * 4 + 3) // C * C
    PER_PAGE: tl.constexpr = PAGE // UNIT
    num_complete = base // PAGE * PER_PAGE
    wanted = MOST - ((base + C - 1) // UNIT + 1 - num_complete)
    index = tl.arange(0, UNITS_P)
    exists = index < num_complete
    share = tl.load(shares_ptr + pair * max_units + index, mask=exists, other=0.0)
    forced = forced_blocks(index, base, num_complete, UNIT, FIRST, LAST)
    # Shares are not negative, so that their bits compare as they do.
    chosen, _ = largest(share.to(tl.int32, bitcast=True), exists, forced, index, num_complete, wanted)
    place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    address = unit_addresses(
        block_table_ptr + row * block_table_stride, index, exists, head * head_stride, page_stride, unit_stride,
        last_page, PER_PAGE,
    )  # fmt: skip
    tl.store(candidates_ptr + pair * 2 * MOST + place, index, mask=chosen)
    tl.store(candidates_ptr + pair * 2 * MOST + MOST + place, address, mask=chosen)
    tl.store(num_ptr + pair, tl.sum(chosen.to(tl.int32), axis=0))
    for within in tl.static_range(C // T if left_ptr is not None else 0):
        left = left_ptr + ((group * (C // T) + within) * tl.num_programs(1) + head) * max_units
        tl.store(left + index, tl.zeros([UNITS_P], dtype=tl.float32), mask=exists)


@triton.jit
def prompt_fine_kernel(
    query_ptr,
    kv_ptr,
    groups_ptr,
    candidates_ptr,  # [groups, G, 2, MOST] int32
    num_ptr,  # [groups, G] int32
    fine_ptr,  # [groups, G, MOST * UNIT / KEYS, KEYS / FINE + 1, ROWS] float32: mass of each fine block over a power of
    # two, and the exponent of that
    norm_ptr,  # [groups, G, splits, ROWS] float32: log2 of the mass of a split's candidates
    query_token_stride,
    query_head_stride,
    scale,
    ADDRESS: tl.constexpr,  # elements of a unit of address
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    UNIT: tl.constexpr,
    FINE: tl.constexpr,
    MOST: tl.constexpr,
    KEYS: tl.constexpr,  # at a time; a multiple of FINE, divides UNIT
    STAGES: tl.constexpr,
):
    """Grid (groups, G, splits)."""
    group = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    pair = group * tl.num_programs(1) + head
    first_token = tl.load(groups_ptr + group * 4 + 1)
    num_tokens = tl.load(groups_ptr + group * 4 + 2)
    position = tl.load(groups_ptr + group * 4 + 3)
    m = tl.arange(0, ROWS)
    member = m % GROUP_P
    token, votes = voters(position, num_tokens, m // GROUP_P, C, T, STEP)
    dtype = kv_ptr.dtype.element_ty
    q = load_queries(
        query_ptr, head, first_token, token, member, votes, query_token_stride, query_head_stride, GROUP, D, DP
    )  # [ROWS, DP]
    q = in_registers(q.to(dtype), DP)
    BLOCKS: tl.constexpr = KEYS // FINE
    num = tl.load(num_ptr + pair) * UNIT  # keys
    per_split = tl.cdiv(tl.cdiv(num, KEYS), tl.num_programs(2)) * KEYS
    start = tl.program_id(2) * per_split
    stop = tl.minimum(start + per_split, num)
    addresses = candidates_ptr + pair * 2 * MOST + MOST
    column = tl.arange(0, DP)
    in_head = column < D
    key = tl.arange(0, KEYS)
    block = tl.arange(0, BLOCKS)
    fine = fine_ptr + pair * (MOST * UNIT // KEYS * (BLOCKS + 1)) * ROWS
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    unit = scale * LOG2E
    # Fetched a step ahead: a load that waits for another load is not pipelined well.
    address = tl.load(addresses + tl.minimum(start, tl.maximum(num - 1, 0)) // UNIT)
    for first in tl.range(start, stop, KEYS, num_stages=STAGES):
        rows = kv_ptr + address.to(tl.int64) * ADDRESS + (first % UNIT + key) * (2 * D)
        address = tl.load(addresses + tl.minimum(first + KEYS, num - 1) // UNIT)
        if D == DP:
            k = tl.load(rows[:, None] + column[None, :])  # [KEYS, DP]
        else:
            k = tl.load(rows[:, None] + column[None, :], mask=in_head[None, :], other=0.0)
        product = tl.dot(q, tl.trans(k))  # [ROWS, KEYS]
        # Over the largest logit so far: a fine block of less than 2^-126 of that is as good as none.
        new_top = tl.maximum(top, tl.max(product, axis=1) * unit)
        mass = tl.exp2(product * unit - new_top[:, None])
        mass = tl.sum(tl.reshape(mass, [ROWS, BLOCKS, FINE]), axis=2)  # [ROWS, BLOCKS]
        total = total * tl.exp2(top - new_top) + tl.sum(mass, axis=1)
        top = new_top
        # Without a logarithm, which is thirty instructions.
        part = fine + first // KEYS * (BLOCKS + 1) * ROWS + m
        tl.store(part[:, None] + block[None, :] * ROWS, mass)
        tl.store(part + BLOCKS * ROWS, top)
    # -inf where a split has nothing.
    norm = tl.where(total > 0, top + tl.log2(total), float("-inf"))
    tl.store(norm_ptr + (pair * tl.num_programs(2) + tl.program_id(2)) * ROWS + m, norm)


@triton.jit
def fine_shares(
    fine, norm, sink_ptr, head, position, num_tokens, within, splits, item, exists,
    GROUP: tl.constexpr, GROUP_P: tl.constexpr, C: tl.constexpr, T: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, MINE: tl.constexpr, SOME: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Sums of the shares of a tile's voters in the fine blocks `item`, times 2^SHIFT."""
    share = tl.zeros(item.shape, dtype=tl.float32)
    for first in tl.static_range(0, MINE, SOME):
        m = within * MINE + first + tl.arange(0, SOME)
        member = m % GROUP_P
        _, votes = voters(position, num_tokens, m // GROUP_P, C, T, STEP)
        votes &= member < GROUP
        lse = tl.load(norm + m)  # finite: the first split has candidates
        for other in tl.range(1, splits, num_stages=1):
            lse = add_log2(lse, tl.load(norm + other * ROWS + m))
        if sink_ptr is not None:
            lse = add_log2(lse, load_sinks(sink_ptr, head * GROUP + member, member < GROUP) * LOG2E)
        shift = tl.where(votes, lse - SHIFT, float("inf"))
        part = fine + item[:, None] // BLOCKS * ((BLOCKS + 1) * ROWS) + m[None, :]
        mass = tl.load(part + item[:, None] % BLOCKS * ROWS, mask=exists[:, None], other=0.0)
        top = tl.load(part + BLOCKS * ROWS, mask=exists[:, None], other=float("-inf"))
        share += tl.sum(mass * tl.exp2(top - shift[None, :]), axis=1)
    return share


@triton.jit(do_not_specialize=["block_table_stride", "last_page", "splits"])
def prompt_select_kernel(
    block_table_ptr,
    groups_ptr,
    shares_ptr,  # [groups, G, max_units] float32: of one level
    candidates_ptr,  # of two levels, with `num_ptr`, `fine_ptr` and `norm_ptr`
    num_ptr,
    fine_ptr,
    norm_ptr,
    sink_ptr,  # [H]; None without sinks
    table_ptr,  # [G, tiles, SLOTS] int32: where in the cache each block begins that a tile attends to: complete
    # pages in ascending order, then the current one
    used_ptr,  # [G, tiles] int32: tokens up to the tile's last one, of the blocks in the table
    count_ptr,  # [G, tiles] int32: blocks of complete pages; -1 for a tile without a token
    left_ptr,  # [tiles, G, max_units] float32: log2 of the share of a unit that is left out; None where
    # nobody asks
    page_stride,  # in units of address
    head_stride,
    block_stride,
    block_table_stride,
    last_page,
    max_units,
    splits,  # of `norm_ptr`
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,  # FINE, or UNIT with one level
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BUDGET: tl.constexpr,  # in units
    MOST: tl.constexpr,  # candidates at most; 0: one level
    SLOTS: tl.constexpr,
    UNITS_P: tl.constexpr,  # a power of two, at least the candidates, or with one level the units of every tile
    CURRENT_P: tl.constexpr,  # a power of two, at least the blocks of a page
    FINE_BLOCKS: tl.constexpr,  # KEYS / FINE of `prompt_fine_kernel`
    SOME: tl.constexpr,  # voters at a time
    TOP_P: tl.constexpr,  # 0 where there is none
):
    """Grid (tiles, G)."""
    tile = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    num_tiles = tl.num_programs(0)
    group = tile // (C // T)
    within = (tile % (C // T)).to(tl.int32)
    pair = group * tl.num_programs(1) + head
    row = tl.load(groups_ptr + group * 4).to(tl.int64)
    group_tokens = tl.load(groups_ptr + group * 4 + 2)
    position = tl.load(groups_ptr + group * 4 + 3)
    begin, num_tokens, base = tile_tokens(position, group_tokens, within, C, T)
    out = head * num_tiles + tile
    if num_tokens == 0:
        # Attention has no query here; what it reads of the table must be numbers.
        tl.store(used_ptr + out, 0)
        tl.store(count_ptr + out, -1)
        return
    PER_PAGE: tl.constexpr = PAGE // UNIT
    PER_UNIT: tl.constexpr = UNIT // BLOCK
    num_complete = base // PAGE * PER_PAGE  # units
    wanted = BUDGET * PER_UNIT - ((base + T - 1) // BLOCK + 1 - num_complete * PER_UNIT)
    item = tl.arange(0, UNITS_P * PER_UNIT)
    nth = item // PER_UNIT  # unit, or candidate
    block = item % PER_UNIT  # of the unit
    num_units = num_complete
    if MOST > 0:
        candidates = candidates_ptr + pair * 2 * MOST
        num_units = tl.load(num_ptr + pair)
    exists = nth < num_units
    if MOST == 0:
        unit = nth
        share = tl.load(shares_ptr + pair * max_units + unit, mask=exists, other=0.0)
        address = unit_addresses(
            block_table_ptr + row * block_table_stride, unit, exists, head * head_stride, page_stride, block_stride,
            last_page, PER_PAGE,
        )  # fmt: skip
    else:
        unit = tl.load(candidates + nth, mask=exists, other=0)
        address = tl.load(candidates + MOST + nth, mask=exists, other=0) + block * block_stride
        MINE: tl.constexpr = ROWS // (C // T)
        share = fine_shares(
            fine_ptr + pair * (MOST * PER_UNIT // FINE_BLOCKS * (FINE_BLOCKS + 1)) * ROWS,
            norm_ptr + pair * splits * ROWS, sink_ptr, head, position, group_tokens, within, splits, item, exists,
            GROUP, GROUP_P, C, T, STEP, ROWS, MINE, SOME, FINE_BLOCKS,
        )  # fmt: skip
    num_items = num_units * PER_UNIT
    forced = exists & forced_blocks(unit, base, num_complete, UNIT, FIRST, LAST)
    # Shares are not negative, so that their bits compare as they do.
    selected, key = largest(share.to(tl.int32, bitcast=True), exists, forced, item, num_items, wanted)
    if TOP_P > 0:
        # What goes to the sinks is not in the sum.
        enough = TOP_P * tl.sum(share, axis=0)
        selected = enough_mass(selected, forced, key, share, item, num_items, enough)
    count = tl.sum(selected.to(tl.int32), axis=0)
    table = table_ptr + out * SLOTS
    place = tl.cumsum(selected.to(tl.int32), axis=0) - 1
    tl.store(table + place, address, mask=selected)
    in_page = position + begin + num_tokens - base // PAGE * PAGE  # tokens up to the tile's last one
    current = tl.arange(0, CURRENT_P)
    page = tl.load(block_table_ptr + row * block_table_stride + base // PAGE)
    here = tl.minimum(tl.maximum(page, 0), last_page) * page_stride + head * head_stride + current * block_stride
    tl.store(table + count + current, here, mask=current * BLOCK < in_page)
    tl.store(used_ptr + out, count * BLOCK + in_page)
    tl.store(count_ptr + out, count)
    if left_ptr is not None:
        taken = tl.sum(tl.reshape(selected.to(tl.int32), [UNITS_P, PER_UNIT]), axis=1)
        left_out = tl.log2((PER_UNIT - taken).to(tl.float32) * (1.0 / PER_UNIT))
        nth = tl.arange(0, UNITS_P)
        unit = nth
        if MOST > 0:
            unit = tl.load(candidates + nth, mask=nth < num_units, other=0)
        tl.store(left_ptr + (tile * tl.num_programs(1) + head) * max_units + unit, left_out, mask=nth < num_units)
