"""Block selection for the tokens of a prefill: scores, selection, and what the pages left out weigh.

Plain reference: `reference.selection_score`, `share_in_group`, `select_blocks`, `mass_score`. Sources: SPLA (arXiv
2601.22379) and those of `triton_score`. A token chooses the pages that it would choose in decode.

A *tile* is up to `TQ` <= 32 query tokens of one page of one row: they share their complete pages, their forced pages
and the recurrent state, and one int32 holds which of them selected a page. The `M = TQ * GROUP_P` rows of a tile's
matrices are its tokens' heads, heads innermost.

Scores are never stored for each head: `prefill_score_kernel` goes over the pages three times, for the heads'
normalisers, for the group's shared scores, and, once the selection is known, for the mass that was left out. Storing
them would move 8 bytes a (token, page, head); computing them again is `4 d` to `6 d` FLOP on the tensor cores.

Floor: `3 * 6 d` FLOP a (token, complete page, head); 4 bytes written and read a (token, complete page, kv head).
"""

import triton
import triton.language as tl

from .triton_cache import CUMULANT2, MEAN, QUEST, REM, TAYLOR2
from .triton_select import _middle

NORMALISE = tl.constexpr(0)
SHARE = tl.constexpr(1)
REST = tl.constexpr(2)
MODES = {"normalise": 0, "share": 1, "rest": 2}
LOG2E = tl.constexpr(1.4426950408889634)
SHIFT = tl.constexpr(100.0)


@triton.jit
def tile_queries(
    query_ptr, head, first_token, num_tokens, query_token_stride, query_head_stride,
    GROUP: tl.constexpr, GROUP_P: tl.constexpr, TQ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Queries `[M, DP]` of a tile, 0 where there is none."""
    m = tl.arange(0, TQ * GROUP_P)
    exists = (m // GROUP_P < num_tokens) & (m % GROUP_P < GROUP)
    column = tl.arange(0, DP)
    row = query_ptr + (first_token + m // GROUP_P).to(tl.int64) * query_token_stride
    row += (head * GROUP + m % GROUP_P) * query_head_stride
    return tl.load(row[:, None] + column[None, :], mask=exists[:, None] & (column < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["block_table_stride", "last_page"])
def prefill_score_kernel(
    query_ptr,  # [tokens, H, D]
    kv_ptr,
    block_table_ptr,
    tiles_ptr,  # [tiles, 4] int32: row, first token, tokens, position of the first token
    lse_ptr,  # [tiles, G, M] float32: written by NORMALISE, log2 of the sum over the pages
    grouped_ptr,  # [tiles, G, TQ, max_pages] float32: written by SHARE
    words_ptr,  # [tiles, G, max_pages] int32: which tokens selected a page; read by REST
    count_ptr,  # [tiles, G, TQ] int32: complete pages that a token selected; read by REST
    gain_ptr,  # [H] float32
    tail_ptr,  # [tiles, G, 2, M] float32: written by REST: log2 of the mean mass, mean logit of the tokens left out
    query_token_stride,
    query_head_stride,
    page_stride,
    head_stride,
    block_table_stride,
    last_page,
    max_pages,
    num_kv_heads,
    scale,
    MODE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    TQ: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    LOG_PAGE: tl.constexpr,
    CHUNK: tl.constexpr,  # pages at a time
    STAGES: tl.constexpr,
    SELECTOR: tl.constexpr,
):
    """Grid (G, tiles, splits); only SHARE can use more than one split."""
    M: tl.constexpr = TQ * GROUP_P
    head = tl.program_id(0)
    tile = tl.program_id(1).to(tl.int64)
    row = tl.load(tiles_ptr + tile * 4).to(tl.int64)
    first_token = tl.load(tiles_ptr + tile * 4 + 1)
    num_tokens = tl.load(tiles_ptr + tile * 4 + 2)
    num_pages = tl.load(tiles_ptr + tile * 4 + 3) // PAGE  # complete pages
    per_split = tl.cdiv(tl.cdiv(num_pages, tl.num_programs(2)), CHUNK) * CHUNK
    start = tl.program_id(2) * per_split
    stop = tl.minimum(start + per_split, num_pages)
    if start < stop:
        m = tl.arange(0, M)
        dtype = kv_ptr.dtype.element_ty
        column = tl.arange(0, DP)
        in_head = column < D
        q = tile_queries(
            query_ptr, head, first_token, num_tokens, query_token_stride, query_head_stride, GROUP, GROUP_P, TQ, D, DP
        ).to(dtype)  # [M, DP]
        if SELECTOR == QUEST:
            left = tl.minimum(q, 0.0).to(dtype)
            right = tl.maximum(q, 0.0).to(dtype)
        elif SELECTOR != MEAN:
            # As in decode: q^2 in two parts, normalised to its largest element, keeps its digits.
            square = q.to(tl.float32) * q.to(tl.float32) * (scale * scale)
            peak = tl.maximum(tl.max(square, axis=1), 1e-30)  # [M]
            square = square * (1024.0 / peak)[:, None]
            square_high = square.to(dtype)
            square_low = (square - square_high.to(tl.float32)).to(dtype)
            restore = peak * (1.0 / 1024.0)
        pages = block_table_ptr + row * block_table_stride
        area = kv_ptr + head * head_stride + PAGE * 2 * D
        offset = tl.arange(0, CHUNK)
        pair = tile * num_kv_heads + head
        unit = scale * LOG2E  # logits in powers of two, which is what the hardware raises
        top = tl.full([M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([M], dtype=tl.float32)
        products = tl.zeros([M], dtype=tl.float32)
        bit = tl.full([M], 1, dtype=tl.int32) << (m // GROUP_P)
        if MODE == SHARE:
            member = (m % GROUP_P) < GROUP
            lse = tl.load(lse_ptr + pair * M + m, mask=member, other=float("inf"))
            token = tl.arange(0, TQ)
            shared_row = grouped_ptr + (pair * TQ + token) * max_pages  # [TQ]
        # Page ids are fetched a step ahead: a load that waits for another load is not pipelined well.
        page = tl.load(pages + tl.minimum(start + offset, num_pages - 1))
        for first in tl.range(start, stop, CHUNK, num_stages=STAGES):
            statistic = area + tl.minimum(tl.maximum(page, 0), last_page).to(tl.int64) * page_stride  # [CHUNK]
            page = tl.load(pages + tl.minimum(first + CHUNK + offset, num_pages - 1))
            index = first + offset
            exists = index < stop
            rows = statistic[:, None] + column[None, :]
            if D == DP:
                mean = tl.load(rows)  # [CHUNK, DP]
            else:
                mean = tl.load(rows, mask=in_head[None, :], other=0.0)
            if SELECTOR != MEAN:
                if D == DP:
                    second = tl.load(rows + D)
                else:
                    second = tl.load(rows + D, mask=in_head[None, :], other=0.0)
            # The mass of a page, over that of a token: factor * 2^exponent.
            if SELECTOR == MEAN:
                product = tl.dot(q, tl.trans(mean))  # [M, CHUNK]
                exponent = product * unit
            elif SELECTOR == QUEST:
                product = tl.dot(right, tl.trans(second), tl.dot(left, tl.trans(mean)))
                exponent = product * unit
            else:
                product = tl.dot(q, tl.trans(mean))
                # Only what ranks the pages needs all digits of q^2.
                s2 = tl.dot(square_high, tl.trans(second))
                if MODE == SHARE:
                    s2 = tl.dot(square_low, tl.trans(second), s2)
                if (MODE == REST) | (SELECTOR == TAYLOR2):
                    factor = 1.0 + s2 * (restore * 0.5)[:, None]
                    exponent = product * unit
                elif SELECTOR == CUMULANT2:
                    exponent = product * unit + s2 * (restore * (0.5 * LOG2E))[:, None]
                else:
                    tl.static_assert(SELECTOR == REM)
                    half = s2 * (restore * (0.5 * LOG2E))[:, None]
                    root = tl.sqrt(tl.maximum(s2, 0.0) * (restore * (2 * LOG_PAGE * LOG2E * LOG2E))[:, None])
                    term = tl.where(half < LOG_PAGE * LOG2E, half, root - LOG_PAGE * LOG2E)
                    exponent = product * unit + term
            FACTOR: tl.constexpr = (MODE == REST) & (SELECTOR != MEAN) | (SELECTOR == TAYLOR2)
            if MODE == SHARE:
                # The group's shared score itself and not its log, which would cost more than the rest: times 2^SHIFT,
                # so that only pages of less than 2^-220 of the mass are all alike.
                share = tl.exp2(exponent - (lse - SHIFT)[:, None])
                if FACTOR:
                    share *= factor
                shared = tl.sum(tl.reshape(share, [TQ, GROUP_P, CHUNK]), axis=1)
                mask = (token < num_tokens)[:, None] & exists[None, :]
                tl.store(shared_row[:, None] + index[None, :], shared, mask=mask)
            else:
                if MODE == REST:
                    word = tl.load(words_ptr + pair * max_pages + index, mask=exists, other=-1)
                    kept = (word[None, :] & bit[:, None]) == 0
                    products += tl.sum(tl.where(kept, product, 0.0), axis=1)
                    exponent = tl.where(kept, exponent, float("-inf"))
                else:
                    exponent = tl.where(exists[None, :], exponent, float("-inf"))
                new_top = tl.maximum(top, tl.max(exponent, axis=1))
                safe = tl.where(new_top == float("-inf"), 0.0, new_top)
                mass = tl.exp2(exponent - safe[:, None])
                if FACTOR:
                    mass *= factor
                total = total * tl.exp2(top - safe) + tl.sum(mass, axis=1)
                top = new_top
        if MODE == NORMALISE:
            tl.store(lse_ptr + pair * M + m, top + tl.log2(total))
        if MODE == REST:
            in_tile = m // GROUP_P < num_tokens
            taken = tl.load(count_ptr + pair * TQ + m // GROUP_P, mask=in_tile, other=0)
            num_rest = (num_pages - taken).to(tl.float32)  # pages
            gain = tl.load(gain_ptr + head * GROUP + m % GROUP_P, mask=(m % GROUP_P) < GROUP, other=0.0)
            weighs = (total > 0) & (gain > 0) & (num_rest > 0)
            # Page masses are those of PAGE tokens, and so many tokens share them.
            norm = tl.where(weighs, total * gain / tl.maximum(num_rest, 1.0), 1.0)
            log_mean = tl.where(weighs, top + tl.log2(norm), float("-inf"))
            tail = tail_ptr + pair * 2 * M + m
            tl.store(tail, log_mean)
            tl.store(tail + M, products * scale / tl.maximum(num_rest, 1.0))


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(x, axis=0), axis=0)


@triton.jit
def _max(x):
    return tl.max(tl.max(x, axis=0), axis=0)


@triton.jit
def _min(x):
    return tl.min(tl.min(x, axis=0), axis=0)


@triton.jit
def prefill_select_kernel(
    tiles_ptr,
    grouped_ptr,  # [tiles, G, TQ, max_pages] float32
    table_ptr,  # [tiles, G, TQ, SLOTS] int32: complete pages that a token selected, places in the row, unordered
    count_ptr,  # [tiles, G, TQ] int32
    bytes_ptr,  # [tiles, G, max_pages, 4] int8, the bytes of `words`
    max_pages,
    num_kv_heads,
    TQ: tl.constexpr,
    ROWS: tl.constexpr,  # tokens a program, at most 8
    PAGE: tl.constexpr,
    SLOTS: tl.constexpr,  # complete pages a token selects at most: the budget without the current page
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    PAGES: tl.constexpr,  # a power of two, at least the complete pages of every tile
    LANES: tl.constexpr,
    TOP_P: tl.constexpr,  # 0 where there is none
):
    """Grid (G, tiles, TQ / ROWS): every tile has more complete pages than SLOTS.

    A token at a time: with one warp, nothing waits for other warps.
    """
    head = tl.program_id(0)
    tile = tl.program_id(1).to(tl.int64)
    byte = tl.program_id(2)
    num_tokens = tl.load(tiles_ptr + tile * 4 + 2)
    current = tl.load(tiles_ptr + tile * 4 + 3) // PAGE
    pair = tile * num_kv_heads + head
    # Two dimensions, the first of which a thread has to itself: running sums along it need no other thread.
    index = tl.arange(0, PAGES // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]  # [PAGES / LANES, LANES]
    complete = index < current
    forced = complete & ((index < FIRST) | (index > current - LAST))
    NUM_FORCED: tl.constexpr = FIRST + (LAST - 1 if LAST > 1 else 0)
    word = tl.zeros([PAGES // LANES, LANES], dtype=tl.int32)
    for step in tl.range(0, ROWS):
        token = byte * ROWS + step
        if token < num_tokens:
            row = pair * TQ + token
            grouped = tl.load(grouped_ptr + row * max_pages + index, mask=complete, other=0.0)
            # Not negative, so that its bits compare as it does. Forced pages above, pages that do not exist below all.
            key = tl.where(complete, grouped.to(tl.int32, bitcast=True), -1)
            key = tl.where(forced, 2147483647, key)
            # Invariant: count(key >= low) >= SLOTS > count(key >= high), or the forced pages alone are as many.
            low = _min(tl.where(complete, key, 2147483647))
            high = _max(tl.where(forced, -1, key)) + 1
            low = tl.where(NUM_FORCED >= SLOTS, high, low)
            count = tl.where(NUM_FORCED >= SLOTS, NUM_FORCED, current)
            span = high - low
            while (count != SLOTS) & (span > 1):
                # Two thresholds a step, their counts in the halves of one number.
                lower = low + tl.maximum(span // 3, 1)
                upper = low + tl.maximum(span - span // 3, 1)
                above = _sum(tl.where(key >= lower, 1, 0) + tl.where(key >= upper, 65536, 0))
                above_upper = (above >> 16) & 65535
                above_lower = above & 65535
                at_upper = above_upper >= SLOTS
                at_lower = above_lower >= SLOTS
                high = tl.where(at_upper, high, tl.where(at_lower, upper, lower))
                low = tl.where(at_upper, upper, tl.where(at_lower, lower, low))
                count = tl.where(at_upper, above_upper, tl.where(at_lower, above_lower, count))
                span = high - low
            selected = key >= low
            if count > SLOTS:
                # Ties at the threshold: the lower page goes first. Bisect for the last page that does.
                tied = key == low
                allowed = SLOTS - (count - _sum(tied.to(tl.int32)))
                bound = current * 0
                beyond = current
                while beyond - bound > 1:
                    middle = (bound + beyond) // 2
                    fits = _sum((tied & (index < middle)).to(tl.int32)) <= allowed
                    bound = tl.where(fits, middle, bound)
                    beyond = tl.where(fits, beyond, middle)
                selected = (key > low) | (tied & (index < bound))

            if TOP_P > 0:
                # As in `triton_select`: bisect for the least key with too little mass above it.
                enough = TOP_P * _sum(grouped)
                chosen = tl.where(selected, grouped, 0.0)
                low_key = _min(tl.where(selected, key, 2147483647)) - 1
                high_key = tl.full([], 2147483647, dtype=tl.int32)
                middle = _middle(low_key, high_key)
                while middle != low_key:
                    short = _sum(tl.where(key > middle, chosen, 0.0)) < enough
                    high_key = tl.where(short, middle, high_key)
                    low_key = tl.where(short, low_key, middle)
                    middle = _middle(low_key, high_key)
                # Of its ties the lower page goes first, while the mass before it is too little.
                tied = selected & (key == high_key)
                above_mass = _sum(tl.where(key > high_key, chosen, 0.0))
                bound = current * 0
                beyond = current
                while beyond - bound > 1:
                    middle = (bound + beyond) // 2
                    short = above_mass + _sum(tl.where(tied & (index < middle), chosen, 0.0)) < enough
                    bound = tl.where(short, middle, bound)
                    beyond = tl.where(short, beyond, middle)
                selected &= forced | (key > high_key) | (tied & (index <= bound))

            taken = selected.to(tl.int32)
            column = tl.sum(taken, axis=0)  # [LANES]
            slot = tl.cumsum(taken, axis=0) - 1 + (tl.cumsum(column, axis=0) - column)[None, :]
            tl.store(table_ptr + row * SLOTS + slot, index, mask=selected)
            tl.store(count_ptr + row, tl.sum(column, axis=0))
            word += taken << step
    target = bytes_ptr + (pair * max_pages + index) * 4
    tl.store(target + byte, word.to(tl.int8), mask=complete)
    if byte == 0:  # tokens that a tile cannot have
        for absent in tl.static_range(TQ // ROWS, 4):
            tl.store(target + absent, tl.zeros_like(word).to(tl.int8), mask=complete)


@triton.jit
def _bits(word):
    """Number of bits set in an int32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + ((word >> 4) & 0x0F0F0F0F)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24) & 0xFF


@triton.jit
def prefill_count_kernel(
    tiles_ptr,
    runs_ptr,  # [runs, 3] int32: first tile, tiles, row, of a row's share of this pass
    words_ptr,
    offsets_ptr,  # [tiles, G, max_pages] int32: tokens of earlier tiles of the run that selected the page
    totals_ptr,  # [runs, G, max_pages] int32: tokens that selected the page
    items_ptr,  # [runs, G, max_pages] int32: their work items of TM tokens
    max_pages,
    num_kv_heads,
    PAGE: tl.constexpr,
    TM: tl.constexpr,
    WIDTH: tl.constexpr,  # pages a program
):
    """Grid (page groups, G, runs): how many tokens of a run selected a page, for lists in the order of tokens."""
    index = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    head = tl.program_id(1)
    run = tl.program_id(2)
    first_tile = tl.load(runs_ptr + run * 3)
    num_tiles = tl.load(runs_ptr + run * 3 + 1)
    running = tl.zeros([WIDTH], dtype=tl.int32)
    for step in tl.range(0, num_tiles, num_stages=4):
        tile = (first_tile + step).to(tl.int64)
        current = tl.load(tiles_ptr + tile * 4 + 3) // PAGE
        where = (tile * num_kv_heads + head) * max_pages + index
        word = tl.load(words_ptr + where, mask=index < current, other=0)
        tl.store(offsets_ptr + where, running, mask=index < current)
        running += _bits(word)
    where = (run.to(tl.int64) * num_kv_heads + head) * max_pages + index
    tl.store(totals_ptr + where, running, mask=index < max_pages)
    tl.store(items_ptr + where, (running + TM - 1) // TM, mask=index < max_pages)


@triton.jit(do_not_specialize=["block_table_stride"])
def prefill_work_kernel(
    block_table_ptr,
    runs_ptr,
    totals_ptr,
    items_ptr,
    ends_ptr,  # [runs, G, max_pages] int32: running sum of the items
    work_ptr,  # [items] int32: page * G + kv head
    list_ptr,  # [items, TM, 2] int32
    block_table_stride,
    max_pages,
    num_kv_heads,
    TM: tl.constexpr,
    WIDTH: tl.constexpr,  # pages a program
):
    """Grid (page groups, G, runs): what each work item is about; the unused end of a page's last item becomes -1."""
    index = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    exists = index < max_pages
    head = tl.program_id(1)
    run = tl.program_id(2).to(tl.int64)
    row = tl.load(runs_ptr + run * 3 + 2).to(tl.int64)
    where = (run * num_kv_heads + head) * max_pages + index
    total = tl.load(totals_ptr + where, mask=exists, other=0)
    items = tl.load(items_ptr + where, mask=exists, other=0)
    first = (tl.load(ends_ptr + where, mask=exists, other=0) - items).to(tl.int64)
    used = items > 0
    page = tl.maximum(tl.load(block_table_ptr + row * block_table_stride + index, mask=used, other=0), 0)
    for item in tl.range(0, tl.max(items, axis=0)):
        tl.store(work_ptr + first + item, page * num_kv_heads + head, mask=item < items)
    slot = tl.arange(0, TM)
    free = total[:, None] + slot[None, :]  # [WIDTH, TM]
    target = list_ptr + (first[:, None] * TM + free) * 2
    mask = used[:, None] & (free < (items * TM)[:, None])
    tl.store(target, tl.full([WIDTH, TM], -1, dtype=tl.int32), mask=mask)
    tl.store(target + 1, tl.zeros([WIDTH, TM], dtype=tl.int32), mask=mask)


@triton.jit
def prefill_list_kernel(
    tiles_ptr,
    tile_run_ptr,  # [tiles] int32: run of a tile
    table_ptr,
    count_ptr,
    words_ptr,
    offsets_ptr,
    items_ptr,
    ends_ptr,
    list_ptr,  # [items, TM, 2] int32: (tile * TQ + token) * SLOTS + slot, and the token's place in the batch
    tail_ptr,  # [tiles, G, 2, M] float32
    list_tail_ptr,  # [items, TM, 2, GROUP_P] float32: the same, beside the entries, where attention needs it
    max_pages,
    num_kv_heads,
    GROUP_P: tl.constexpr,
    TQ: tl.constexpr,
    TM: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_P: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Grid (G, tiles, TQ): every selected (token, page) into the list of its page."""
    head = tl.program_id(0)
    tile = tl.program_id(1).to(tl.int64)
    token = tl.program_id(2)
    if token < tl.load(tiles_ptr + tile * 4 + 2):
        pair = tile * num_kv_heads + head
        run = tl.load(tile_run_ptr + tile).to(tl.int64)
        slot = tl.arange(0, SLOTS_P)
        taken = slot < tl.load(count_ptr + pair * TQ + token)
        page = tl.load(table_ptr + (pair * TQ + token) * SLOTS + slot, mask=taken, other=0)
        where = pair * max_pages + page
        word = tl.load(words_ptr + where, mask=taken, other=0)
        rank = _bits(word & ((1 << token) - 1))
        where_run = (run * num_kv_heads + head) * max_pages + page
        first = tl.load(ends_ptr + where_run, mask=taken, other=0) - tl.load(items_ptr + where_run, mask=taken, other=0)
        place = first.to(tl.int64) * TM + tl.load(offsets_ptr + where, mask=taken, other=0) + rank
        entry = ((tile * TQ + token) * SLOTS + slot).to(tl.int32)
        batch_token = tl.load(tiles_ptr + tile * 4 + 1) + token
        tl.store(list_ptr + place * 2, entry, mask=taken)
        tl.store(list_ptr + place * 2 + 1, tl.zeros_like(entry) + batch_token, mask=taken)
        if TAIL:
            member = tl.arange(0, GROUP_P)
            source = tail_ptr + pair * 2 * TQ * GROUP_P + token * GROUP_P + member  # [GROUP_P]
            target = list_tail_ptr + place[:, None] * 2 * GROUP_P + member[None, :]  # [SLOTS_P, GROUP_P]
            for part in tl.static_range(2):
                value = tl.load(source + part * TQ * GROUP_P)
                value = tl.broadcast_to(value[None, :], [SLOTS_P, GROUP_P])
                tl.store(target + part * GROUP_P, value, mask=taken[:, None])
