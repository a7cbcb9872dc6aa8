"""The fine level of a selection in two levels: score the fine blocks of the candidates by their keys, or the sketch of
these (`gpu/sketch`), and select.

The candidates are what `select` leaves in a table of their own: one level with a larger budget, whose list ends with
the selection blocks of the current page. The first launch here reads their keys and makes of the logits the mass of
every fine block; the second shares these in the group and selects, as one level does, by place in the list of
candidates, which is in the order of the sequence. What it leaves is a page table of fine blocks, and of every candidate
how many of its fine blocks are selected, which tells `attend.mass_of_rest` what share of its mass is left over.

Plain reference: `reference.select_fine_blocks`. Source: docs/design.md, 1 (two levels).

Floor, bytes a (token, kv head): `d` elements a token of the candidates, read once, or of a sketch 18 bytes for 32 of
them and a mean key a selection block; written and read again from L2, 4 bytes a fine block and head. FLOP: `2 d` a
token of the candidates and head.
"""

import torch
import triton
import triton.language as tl

from ..layer import GpuLayer
from ..sketch import queries_by_chunk, sketch_products
from ..statistics import as_factor, decode_e4m3
from .attend import page_of, rows_of, unit_of
from .running_sum import add_exponentials, log_of_columns
from .select import all_group_scores, choose
from .tuning import DecodeSizes, Tuning


@triton.jit(do_not_specialize=["last_page"])
def fine_score_kernel(
    query_ptr,  # [tokens, H, D]
    kv_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    candidates_ptr,  # [tokens, G, CANDIDATES] int32: page table of selection blocks
    candidate_count_ptr,  # [tokens, G] int32
    scores_ptr,  # [tokens, G, max_fine, GROUP_P] float32: log masses of fine blocks, by place in the list
    lse_ptr,  # [tokens, G, num_splits, GROUP_P] float32: log sum exp of this split's scores
    query_token_stride,
    query_head_stride,
    page_stride,
    head_stride,
    last_page,  # the largest page id there is
    max_fine,  # fine blocks of the most candidates
    num_kv_heads,
    scale,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    N: tl.constexpr,  # GROUP_P, padded for the tensor cores
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,  # tokens a selection block
    FINE: tl.constexpr,  # tokens a fine block
    WHOLE: tl.constexpr,  # selection blocks of a row up to which all of it is attended to
    CANDIDATES: tl.constexpr,
    STRIDE: tl.constexpr,  # stored elements from the statistics of one selection block to the next
    FP8: tl.constexpr,  # statistics are bytes
    SKETCH: tl.constexpr,  # bytes from the statistics of a page to its sketch, read instead of keys; 0: it has none
    TILE: tl.constexpr,  # tokens at a time
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,  # launched as a programmatic dependent
):
    """Grid (splits, G, rows * QUERY_LEN).

    As in `score`, keys are the long side of the product. The fine blocks of a tile lie one below the other there.
    """
    split = tl.program_id(0)
    num_splits = tl.num_programs(0)
    head = tl.program_id(1)
    row = tl.program_id(2) // QUERY_LEN
    token_in_row = tl.program_id(2) % QUERY_LEN
    seq_len = tl.load(seq_lens_ptr + row)
    first_token = tl.load(query_start_loc_ptr + row)
    query_len = tl.load(query_start_loc_ptr + row + 1) - first_token
    position = seq_len - query_len + token_in_row
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        # All programs wait: the launch that follows takes the end of this one for the end of the one before.
        tl.extra.cuda.gdc_wait()
    if (seq_len > 0) & (token_in_row < query_len) & (position // UNIT + 1 > WHOLE):
        token = (first_token + token_in_row).to(tl.int64)
        pair = token * num_kv_heads + head
        num_current = position // UNIT + 1 - position // PAGE * (PAGE // UNIT)  # units of the current page
        limit = (tl.load(candidate_count_ptr + pair) - num_current) * UNIT  # tokens of the list to score
        n = tl.arange(0, N)
        column = tl.arange(0, DP)
        in_head = column < D
        q = tl.load(
            query_ptr + token * query_token_stride + ((head * GROUP + n) * query_head_stride)[None, :]
            + column[:, None],
            mask=(n < GROUP)[None, :] & in_head[:, None],
            other=0.0,
        )  # [DP, N] # fmt: skip
        q = as_factor(q, kv_ptr, SKETCH > 0 and FP8)
        if SKETCH:
            of_group = query_ptr + token * query_token_stride + head * GROUP * query_head_stride
            by_chunk = queries_by_chunk(of_group, query_head_stride, GROUP, N, D, DP)
        per_split = tl.cdiv(tl.cdiv(limit, num_splits), TILE) * TILE
        start = split * per_split
        stop = tl.minimum(start + per_split, limit)
        table = candidates_ptr + pair * CANDIDATES
        kv = kv_ptr + head * head_stride
        BLOCKS: tl.constexpr = TILE // FINE
        offset = tl.arange(0, BLOCKS)
        top = tl.full([BLOCKS, N], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCKS, N], dtype=tl.float32)
        # As in `attend`, entries are fetched a step ahead; behind the last token, the last unit is read again.
        entry = unit_of(table, start, limit, UNIT, TILE)
        for first in tl.range(start, stop, TILE, num_stages=STAGES):
            this_entry = entry
            entry = unit_of(table, first + TILE, limit, UNIT, TILE)
            if SKETCH:
                page, in_page = page_of(this_entry, last_page, num_kv_heads, PAGE, UNIT)
                sketch = (kv + page * page_stride + PAGE * 2 * D).to(tl.pointer_type(tl.uint8)) + SKETCH
                in_page += (first + tl.arange(0, TILE)) % UNIT
                product = sketch_products(sketch, in_page, by_chunk, N, D, DP, PAGE, TILE)
            else:
                rows = rows_of(first, this_entry, kv, page_stride, last_page, num_kv_heads, D, DP, PAGE, UNIT, TILE)
                if D == DP:
                    k = tl.load(rows)  # [TILE, DP]
                else:
                    k = tl.load(rows, mask=in_head[None, :], other=0.0)
                product = tl.dot(k, q)
            logit = tl.reshape(product * scale, [BLOCKS, FINE, N])
            peak = tl.max(logit, axis=1)  # [BLOCKS, N]
            score = peak + tl.log(tl.sum(tl.exp(logit - peak[:, None, :]), axis=1))
            if SKETCH:
                mean = mean_products(
                    this_entry, kv, q, page_stride, last_page, num_kv_heads, N, D, DP, PAGE, UNIT, STRIDE, FP8, TILE,
                    BLOCKS,
                )  # fmt: skip
                score += mean * scale
            index = first // FINE + offset
            stored = (index < stop // FINE)[:, None] & (n < GROUP)[None, :]
            tl.store(scores_ptr + (pair * max_fine + index)[:, None] * GROUP_P + n[None, :], score, mask=stored)
            score = tl.where(stored, score, float("-inf"))
            top, total = add_exponentials(top, total, score)
        lse = log_of_columns(top, total)  # [N]
        tl.store(lse_ptr + (pair * num_splits + split) * GROUP_P + n, lse, mask=n < GROUP)


@triton.jit
def mean_products(
    entry, kv, q, page_stride, last_page, num_kv_heads, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PAGE: tl.constexpr, UNIT: tl.constexpr, STRIDE: tl.constexpr, FP8: tl.constexpr, TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Products `[BLOCKS, N]` of queries with the mean keys of the selection blocks that a tile's fine blocks are of;
    `entry` names these for each of its tokens.

    A matrix product takes 16 rows: a fine block has the first of its share of them, and the others are 0. A row for
    each selection block would be enough, but then Triton 3.6 lays out `[BLOCKS, N]` so that the lanes that have a
    column's rows are no neighbours, and sums over rows are wrong, without a word (seen with two fine blocks in a
    selection block and four of these in a tile).
    """
    ROWS: tl.constexpr = max(16, BLOCKS)
    EACH: tl.constexpr = ROWS // BLOCKS
    if TILE > UNIT:
        entry = tl.max(tl.reshape(entry, [ROWS, TILE // ROWS]), axis=1)
    page, in_page = page_of(entry, last_page, num_kv_heads, PAGE, UNIT)
    area = kv + page * page_stride + PAGE * 2 * D
    if FP8:
        area = area.to(tl.pointer_type(tl.uint8))
    row, column = tl.arange(0, ROWS), tl.arange(0, DP)
    rows = (area + in_page // UNIT * STRIDE + tl.zeros([ROWS], tl.int32))[:, None] + column[None, :]
    mean = tl.load(rows, mask=(row % EACH == 0)[:, None] & (column < D)[None, :], other=0)
    if FP8:
        mean = decode_e4m3(mean)
    return tl.sum(tl.reshape(tl.dot(mean, q), [BLOCKS, EACH, N]), axis=1)


@triton.jit
def fine_select_kernel(
    query_start_loc_ptr,
    seq_lens_ptr,
    candidates_ptr,
    candidate_units_ptr,  # [tokens, G, CANDIDATES] int32: the candidates by their number in the sequence
    candidate_count_ptr,
    scores_ptr,
    lse_ptr,
    sink_ptr,  # [H]; None without sinks
    grouped_ptr,  # [tokens, G, max_fine] float32, scratch
    table_ptr,  # [tokens, G, WHOLE] int32: (page * G + head) * (PAGE // FINE) + fine block of the page, ascending
    count_ptr,  # [tokens, G] int32: fine blocks in the table
    flags_ptr,  # [tokens, G, max_units] int8: how many fine blocks of a selection block are selected
    max_units,
    max_fine,
    num_kv_heads,
    num_splits,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    FINE: tl.constexpr,
    BUDGET: tl.constexpr,  # fine blocks
    WHOLE: tl.constexpr,  # fine blocks of a row up to which all of it is attended to, entries of a page table
    WHOLE_P: tl.constexpr,  # padded to a power of two
    CANDIDATES: tl.constexpr,
    FIRST: tl.constexpr,  # selection blocks
    LAST: tl.constexpr,
    BLOCKS: tl.constexpr,  # max_fine, padded to a power of two
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,  # num_splits, padded to a power of two
    TOP_P: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid (G, rows * QUERY_LEN)."""
    head = tl.program_id(0)
    row = tl.program_id(1) // QUERY_LEN
    token_in_row = tl.program_id(1) % QUERY_LEN
    seq_len = tl.load(seq_lens_ptr + row)
    first_token = tl.load(query_start_loc_ptr + row)
    query_len = tl.load(query_start_loc_ptr + row + 1) - first_token
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if (seq_len > 0) & (token_in_row < query_len):
        PER_UNIT: tl.constexpr = UNIT // FINE
        position = seq_len - query_len + token_in_row
        num_complete = position // PAGE * (PAGE // UNIT)  # selection blocks of complete pages
        num_current = position // UNIT + 1 - num_complete  # selection blocks of the current page
        fine_current = position // FINE + 1 - num_complete * PER_UNIT  # fine blocks of the current page, all selected
        pair = (first_token + token_in_row).to(tl.int64) * num_kv_heads + head
        table = table_ptr + pair * WHOLE
        candidates = candidates_ptr + pair * CANDIDATES
        slot = tl.arange(0, WHOLE_P)
        if position // FINE + 1 <= WHOLE:
            stored = slot <= position // FINE
            every = tl.load(candidates + slot // PER_UNIT, mask=stored, other=0)
            tl.store(table + slot, every * PER_UNIT + slot % PER_UNIT, mask=stored)
            tl.store(count_ptr + pair, position // FINE + 1)
        else:
            num_candidates = tl.load(candidate_count_ptr + pair) - num_current  # of complete pages
            num_fine = num_candidates * PER_UNIT
            index = tl.arange(0, BLOCKS)
            exists = index < num_fine
            unit_id = tl.load(candidates + index // PER_UNIT, mask=exists, other=0)
            grouped = all_group_scores(
                pair, head, num_fine, scores_ptr, lse_ptr, sink_ptr, grouped_ptr, max_fine, num_splits,
                GROUP, GROUP_P, BLOCKS, WIDTH, SPLITS,
            )  # fmt: skip
            # What one level forces stands at both ends of the candidates.
            num_last = tl.maximum(LAST - num_current, 0) * PER_UNIT
            forced = exists & ((index < FIRST * PER_UNIT) | (index >= num_fine - num_last))
            num_forced = FIRST * PER_UNIT + num_last
            selected = choose(grouped, exists, forced, num_fine, num_forced, BUDGET - fine_current, TOP_P)
            taken = selected.to(tl.int32)
            place = tl.cumsum(taken, axis=0) - 1
            tl.store(table + place, unit_id * PER_UNIT + index % PER_UNIT, mask=selected)
            num_taken = tl.sum(taken, axis=0)
            last = tl.load(candidates + num_candidates) * PER_UNIT  # the current page's first
            tl.store(table + num_taken + slot, last + slot, mask=slot < fine_current)
            tl.store(count_ptr + pair, num_taken + fine_current)
            in_unit = tl.sum(tl.reshape(taken, [BLOCKS // PER_UNIT, PER_UNIT]), axis=1)
            candidate = tl.arange(0, BLOCKS // PER_UNIT)
            complete = candidate < num_candidates
            unit = tl.load(candidate_units_ptr + pair * CANDIDATES + candidate, mask=complete, other=0)
            tl.store(flags_ptr + pair * max_units + unit, in_unit.to(tl.int8), mask=complete)


def select_fine(
    layer: GpuLayer,
    sizes: DecodeSizes,
    scratch: dict[str, torch.Tensor],
    tuning: Tuning,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    table: torch.Tensor,
    max_query_len: int,
) -> None:
    """From the candidates in `scratch` to the page `table` of fine blocks, with their counts and flags."""
    params, num_tokens = layer.params, seq_lens.shape[0] * max_query_len
    rows = {"query_start_loc_ptr": query_start_loc, "seq_lens_ptr": seq_lens}
    level = {
        "candidates_ptr": scratch["candidates"],
        "candidate_count_ptr": scratch["candidate_count"],
        "scores_ptr": scratch["fine_scores"],
        "lse_ptr": scratch["fine_lse"],
        "max_fine": sizes.candidates * sizes.per_unit,
        "num_kv_heads": layer.num_kv_heads,
        "GROUP": layer.group,
        "GROUP_P": layer.group_p,
        "QUERY_LEN": max_query_len,
        "PAGE": params.page_size,
        "UNIT": params.selection_block,
        "FINE": params.fine_block,
        "CANDIDATES": sizes.candidates,
        "DEPENDENT": layer.dependent,
        **layer.launch_early,
    }
    fine_score_kernel[(tuning.fine_splits, layer.num_kv_heads, num_tokens)](
        query_ptr=query,
        kv_ptr=kv_cache,
        query_token_stride=query.stride(0),
        query_head_stride=query.stride(1),
        page_stride=kv_cache.stride(0),
        head_stride=kv_cache.stride(1),
        last_page=kv_cache.shape[0] - 1,
        scale=layer.scale,
        N=max(8, layer.group_p),
        D=layer.head_size,
        DP=layer.dp,
        WHOLE=params.whole_blocks,
        STRIDE=layer.page_layout.statistics_stride,
        FP8=layer.page_layout.fp8_statistics,
        SKETCH=layer.page_layout.sketch_begin,
        TILE=max(tuning.fine_tile, params.fine_block),
        STAGES=tuning.fine_stages,
        num_warps=tuning.fine_warps,
        **rows,
        **level,
    )
    fine_select_kernel[(layer.num_kv_heads, num_tokens)](
        candidate_units_ptr=scratch["candidate_units"],
        sink_ptr=layer.sinks,
        grouped_ptr=scratch["fine_grouped"],
        table_ptr=table,
        count_ptr=scratch["count"],
        flags_ptr=scratch["flags"],
        max_units=sizes.max_units,
        num_splits=tuning.fine_splits,
        BUDGET=sizes.budget,
        WHOLE=sizes.table,
        WHOLE_P=triton.next_power_of_2(sizes.table),
        FIRST=params.first_blocks,
        LAST=params.last_blocks,
        BLOCKS=sizes.fine_p,
        WIDTH=sizes.fine_width,
        SPLITS=triton.next_power_of_2(tuning.fine_splits),
        TOP_P=layer.top_p,
        num_warps=tuning.fine_select_warps,
        **rows,
        **level,
    )
