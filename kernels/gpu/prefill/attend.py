"""Attention of prefill tokens over the units (selection blocks) that each of them selected, one by one, and the merge.

Plain reference: `reference.exact_attention`, `residual_direction`, `combine_shared_normalizer`, `rms_norm`. Sources:
residual by subtraction, SPLA (arXiv 2601.22379); a unit gathers the tokens that chose it, partial results merged by
their LSE, as in block-sparse prefill of MoBA (arXiv 2502.13189).

A decode-like gather would read `2 b d` elements for every (token, kv head, unit), more than the second-level cache can
deliver. So `page_attend_kernel` lets the tokens that selected a unit attend to it together, as full tiles of the tensor
cores; what it writes for each (token, unit) is one row a head, `d` elements and two floats, which
`prefill_merge_kernel` reads once.

The regression residual costs nothing there. With `D` the tail mass, `n` the tokens left out, `l = q . k`, `c` the mean
of `l` over those tokens, all known before, the tail's numerator is

    D o_tail = (D / n) sum over the rest of (1 + rs (l - c)) v
             = (D / n) [ from the state: all tokens ] - (D / n) [ the selected tokens ],

so that a selected token's weight is `exp(l) - (D / n) (1 + rs (l - c))`: one product with the values does both. The
`linear` residual needs a second product.

Floor, bytes a (token, kv head, selected unit): `2 GROUP d` elements written and read. FLOP: `4 GROUP b d`, or
`8 GROUP b d`.
"""

import triton
import triton.language as tl

from ..feature_maps import map_features
from ..residual import LINEAR, NO_RESIDUAL, REGRESSION
from ..sinks import load_sinks
from ..statistics import LOG2E
from .select import tile_queries, tile_units


@triton.jit
def attend_step(
    q,  # [M, DP] queries of some tokens' heads
    k,  # [UNIT_P, DP]
    v,
    part,  # [M] where each token's part belongs
    exists,  # [M]
    log_mean,  # [M] float32: the tail, for REGRESSION
    center,  # [M] float32
    member,  # [M] head of the group
    column,
    part_out_ptr,
    part_sum_ptr,
    part_tail_ptr,
    part_z_ptr,
    scale,
    residual_scale,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    UNIT_P: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PHI: tl.constexpr,
):
    """Tokens' heads attend to a unit: their parts."""
    dtype = k.dtype
    in_head = column < D
    t = tl.arange(0, UNIT_P)
    unit = scale * LOG2E
    logit = tl.dot(q, tl.trans(k))  # [M, UNIT_P]
    exposed = logit
    if UNIT != UNIT_P:
        exposed = tl.where((t < UNIT)[None, :], logit, float("-inf"))
    top = tl.max(exposed, axis=1) * unit  # [M]
    if RESIDUAL == REGRESSION:
        top = tl.maximum(top, log_mean)
    weight = tl.exp2(exposed * unit - top[:, None])
    total = tl.sum(weight, axis=1)
    if RESIDUAL == REGRESSION:
        level = tl.exp2(log_mean - top)
        slope = level * (residual_scale * scale)
        weight -= logit * slope[:, None] + (level * (1.0 - residual_scale * center))[:, None]
    out = tl.dot(weight.to(dtype), v)  # [M, DP]
    stored = exists[:, None] & in_head[None, :]
    out_row = (part * GROUP + member) * D
    tl.store(part_out_ptr + out_row[:, None] + column[None, :], out.to(dtype), mask=stored)
    tl.store(part_sum_ptr + part * 2 * GROUP_P + member, top, mask=exists)
    tl.store(part_sum_ptr + part * 2 * GROUP_P + GROUP_P + member, total, mask=exists)
    if RESIDUAL == LINEAR:
        phi_k = map_features(PHI, k.to(tl.float32), in_head[None, :], 1).to(dtype)
        phi_q = map_features(PHI, q.to(tl.float32) * scale, in_head[None, :], 1).to(dtype)
        feature = tl.dot(phi_q, tl.trans(phi_k))
        if UNIT != UNIT_P:
            feature = tl.where((t < UNIT)[None, :], feature, 0.0)
        high = feature.to(dtype)
        low = (feature - high.to(tl.float32)).to(dtype)
        read = tl.dot(low, v, tl.dot(high, v))
        tl.store(part_tail_ptr + out_row[:, None] + column[None, :], read, mask=stored)
        tl.store(part_z_ptr + part * GROUP_P + member, tl.sum(feature, axis=1), mask=exists)


@triton.jit(do_not_specialize=["last_page", "num_parts", "first_head"])
def page_attend_kernel(
    query_ptr,  # [tokens, H, D]
    kv_ptr,
    work_ptr,  # [items, 4] int32: page * PER_PAGE + unit of the page, head of the pass, first step, steps
    num_items_ptr,  # [1] int32
    list_ptr,  # [steps, TM, 2] int32: part and token of each entry; -1 where there is none
    list_tail_ptr,  # [steps, TM, 2, GROUP_P] float32, for REGRESSION
    part_out_ptr,  # [heads, tiles * PARTS * TQ, GROUP, D] cache dtype
    part_sum_ptr,  # [heads, tiles * PARTS * TQ, 2, GROUP_P] float32: maxima in powers of two, sums
    part_tail_ptr,  # as part_out, float32: phi(q) S of the unit, for LINEAR
    part_z_ptr,  # [heads, tiles * PARTS * TQ, GROUP_P] float32: phi(q) . z
    query_token_stride,
    query_head_stride,
    page_stride,
    head_stride,
    last_page,
    first_head,
    num_parts,  # parts of a kv head
    scale,
    residual_scale,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    TM: tl.constexpr,  # tokens of a step
    SPAN: tl.constexpr,  # steps of a work item at most
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    UNIT_P: tl.constexpr,
    STAGES: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PHI: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid (programs): each takes every so many-th work item; its unit is loaded once for all the item's steps."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    M: tl.constexpr = TM * GROUP_P
    PER_PAGE: tl.constexpr = PAGE // UNIT
    column = tl.arange(0, DP)
    in_head = column < D
    t = tl.arange(0, UNIT_P)
    m = tl.arange(0, M)
    member = m % GROUP_P
    in_group = member < GROUP
    num_items = tl.load(num_items_ptr)
    if SPAN == 1:
        # Step and item have one number, so that everything but the unit is known a step ahead, and the units of several
        # items are on their way at once: where few tokens selected a unit, there is no step to hide it behind.
        begin = tl.program_id(0)
        last = num_items - 1
        unit_id = tl.load(work_ptr + tl.minimum(begin, last) * 4, mask=num_items > 0, other=0)
        local = tl.load(work_ptr + tl.minimum(begin, last) * 4 + 1, mask=num_items > 0, other=0)
        where = tl.maximum(tl.minimum(begin, last), 0).to(tl.int64) * TM + m // GROUP_P
        entry = tl.load(list_ptr + where * 2)
        token = tl.load(list_ptr + where * 2 + 1)
        if RESIDUAL == REGRESSION:
            next_mean = tl.load(list_tail_ptr + where * 2 * GROUP_P + member)
            next_center = tl.load(list_tail_ptr + where * 2 * GROUP_P + GROUP_P + member)
        for item in tl.range(begin, num_items, tl.num_programs(0), num_stages=STAGES):
            # Beyond the last item the pipeline computes addresses, without reading, from undefined numbers.
            head = first_head + local
            unit_id = tl.maximum(unit_id, 0)
            rows = kv_ptr + tl.minimum(unit_id // PER_PAGE, last_page).to(tl.int64) * page_stride + head * head_stride
            rows += unit_id % PER_PAGE * (UNIT * 2 * D)
            rows = rows + (t * 2 * D)[:, None] + column[None, :]
            part = local.to(tl.int64) * num_parts + tl.maximum(entry, 0)  # [M]
            exists = (entry >= 0) & in_group
            query = query_ptr + (head * GROUP + tl.minimum(member, GROUP - 1)) * query_head_stride
            query += tl.maximum(token, 0).to(tl.int64) * query_token_stride
            ahead = tl.minimum(item + tl.num_programs(0), last)
            unit_id = tl.load(work_ptr + ahead * 4)
            local = tl.load(work_ptr + ahead * 4 + 1)
            where = ahead.to(tl.int64) * TM + m // GROUP_P
            entry = tl.load(list_ptr + where * 2)
            token = tl.load(list_ptr + where * 2 + 1)
            log_mean = tl.zeros([M], dtype=tl.float32)
            center = tl.zeros([M], dtype=tl.float32)
            if RESIDUAL == REGRESSION:
                log_mean = tl.where(exists, next_mean, float("-inf"))
                center = tl.where(exists, next_center, 0.0)
                next_mean = tl.load(list_tail_ptr + where * 2 * GROUP_P + member)
                next_center = tl.load(list_tail_ptr + where * 2 * GROUP_P + GROUP_P + member)
            if (D == DP) & (UNIT == UNIT_P):
                k = tl.load(rows)  # [UNIT_P, DP]
                v = tl.load(rows + D)
            else:
                kv_mask = (t < UNIT)[:, None] & in_head[None, :]
                k = tl.load(rows, mask=kv_mask, other=0.0)
                v = tl.load(rows + D, mask=kv_mask, other=0.0)
            if D == DP:
                q = tl.load(query[:, None] + column[None, :])  # [M, DP]
            else:
                q = tl.load(query[:, None] + column[None, :], mask=in_head[None, :], other=0.0)
            attend_step(
                q, k, v, part, exists, log_mean, center, member, column, part_out_ptr, part_sum_ptr, part_tail_ptr,
                part_z_ptr, scale, residual_scale, GROUP, GROUP_P, D, UNIT, UNIT_P, RESIDUAL, PHI,
            )  # fmt: skip
    else:
        for item in tl.range(tl.program_id(0), num_items, tl.num_programs(0), num_stages=1):
            unit_id = tl.load(work_ptr + item * 4)
            page = tl.minimum(unit_id // PER_PAGE, last_page).to(tl.int64)
            local = tl.load(work_ptr + item * 4 + 1)
            first = tl.load(work_ptr + item * 4 + 2).to(tl.int64)
            steps = tl.load(work_ptr + item * 4 + 3)
            head = first_head + local
            rows = kv_ptr + page * page_stride + head * head_stride + unit_id % PER_PAGE * (UNIT * 2 * D)
            rows = rows + (t * 2 * D)[:, None] + column[None, :]
            if (D == DP) & (UNIT == UNIT_P):
                k = tl.load(rows)  # [UNIT_P, DP]
                v = tl.load(rows + D)
            else:
                kv_mask = (t < UNIT)[:, None] & in_head[None, :]
                k = tl.load(rows, mask=kv_mask, other=0.0)
                v = tl.load(rows + D, mask=kv_mask, other=0.0)
            part_base = local.to(tl.int64) * num_parts
            query_base = query_ptr + (head * GROUP + tl.minimum(member, GROUP - 1)) * query_head_stride  # [M]
            # What a step's addresses come from is fetched a step ahead: a load that waits for a load is not pipelined.
            where = first * TM + m // GROUP_P
            entry = tl.load(list_ptr + where * 2)
            token = tl.load(list_ptr + where * 2 + 1)
            if RESIDUAL == REGRESSION:
                next_mean = tl.load(list_tail_ptr + where * 2 * GROUP_P + member)
                next_center = tl.load(list_tail_ptr + where * 2 * GROUP_P + GROUP_P + member)
            for step in tl.range(0, steps, num_stages=STAGES):
                # Beyond the last step the pipeline computes addresses, without reading, from undefined ids.
                mine = tl.maximum(entry, 0)  # [M]
                exists = (entry >= 0) & in_group
                query = query_base + tl.maximum(token, 0).to(tl.int64) * query_token_stride
                where = (first + tl.minimum(step + 1, steps - 1)) * TM + m // GROUP_P
                entry = tl.load(list_ptr + where * 2)
                token = tl.load(list_ptr + where * 2 + 1)
                log_mean = tl.zeros([M], dtype=tl.float32)
                center = tl.zeros([M], dtype=tl.float32)
                if RESIDUAL == REGRESSION:
                    log_mean = tl.where(exists, next_mean, float("-inf"))
                    center = tl.where(exists, next_center, 0.0)
                    next_mean = tl.load(list_tail_ptr + where * 2 * GROUP_P + member)
                    next_center = tl.load(list_tail_ptr + where * 2 * GROUP_P + GROUP_P + member)
                if D == DP:
                    q = tl.load(query[:, None] + column[None, :])  # [M, DP]
                else:
                    q = tl.load(query[:, None] + column[None, :], mask=in_head[None, :], other=0.0)
                attend_step(
                    q, k, v, part_base + mine, exists, log_mean, center, member, column, part_out_ptr, part_sum_ptr,
                    part_tail_ptr, part_z_ptr, scale, residual_scale, GROUP, GROUP_P, D, UNIT, UNIT_P, RESIDUAL, PHI,
                )  # fmt: skip


@triton.jit(do_not_specialize=["block_table_stride", "last_page", "num_parts", "first_head"])
def prefill_merge_kernel(
    query_ptr,
    kv_ptr,
    block_table_ptr,
    tiles_ptr,
    tile_state_ptr,  # [tiles] int32: where the state at a tile's page is
    count_ptr,  # [tiles, heads, TQ] int32
    tail_ptr,
    state_ptr,  # [states, G, S_ROWS + 1, D] float32: state at the beginning of a page; last z
    part_out_ptr,
    part_sum_ptr,
    part_tail_ptr,
    part_z_ptr,
    sink_ptr,  # [H]; None without sinks
    exact_weight_ptr,  # [H, D] float32
    tail_weight_ptr,  # [H, D] float32
    output_ptr,
    query_token_stride,
    query_head_stride,
    output_token_stride,
    output_head_stride,
    page_stride,
    head_stride,
    block_table_stride,
    last_page,
    num_kv_heads,
    first_head,
    num_parts,
    scale,
    residual_scale,
    norm_eps,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    TQ: tl.constexpr,
    TM: tl.constexpr,  # tokens a program
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    UNIT_P: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    PARTS: tl.constexpr,  # parts of a token at most
    S_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    FORCED_STAGES: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PHI: tl.constexpr,
    DOUBLE_NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid (heads, tiles, TQ / TM): the units that all of the tile's tokens select, the current one causal; the parts
    of the other selected units; the state's share; the output."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    M: tl.constexpr = TM * GROUP_P
    dtype = kv_ptr.dtype.element_ty
    local = tl.program_id(0)
    head = first_head + local
    tile = tl.program_id(1).to(tl.int64)
    row = tl.load(tiles_ptr + tile * 4).to(tl.int64)
    first_token = tl.load(tiles_ptr + tile * 4 + 1)
    num_tokens = tl.load(tiles_ptr + tile * 4 + 2)
    position = tl.load(tiles_ptr + tile * 4 + 3)
    if tl.program_id(2) * TM >= num_tokens:
        return
    PER_PAGE: tl.constexpr = PAGE // UNIT
    num_complete, num_current, num_forced = tile_units(position, PAGE, UNIT, FIRST, LAST)
    pair = tile * tl.num_programs(0) + local
    m = tl.arange(0, M)
    member = m % GROUP_P
    token = tl.program_id(2) * TM + m // GROUP_P
    exists = (token < num_tokens) & (member < GROUP)
    column = tl.arange(0, DP)
    in_head = column < D
    q = tile_queries(
        query_ptr, head, first_token, num_tokens, token, member, query_token_stride, query_head_stride, GROUP, D, DP
    ).to(dtype)  # [M, DP]
    taken = tl.load(count_ptr + pair * TQ + token, mask=exists, other=0)  # [M]
    most = tl.max(taken, axis=0) - num_forced
    has_rest = exists & (num_complete > taken)
    tail_row = tail_ptr + pair * 2 * TQ * GROUP_P + token * GROUP_P + member
    top = tl.full([M], float("-inf"), dtype=tl.float32)
    if RESIDUAL == REGRESSION:
        log_mean = tl.load(tail_row, mask=has_rest, other=float("-inf"))
        center = tl.load(tail_row + TQ * GROUP_P, mask=has_rest, other=0.0)
        top = log_mean
    total = tl.zeros([M], dtype=tl.float32)
    if sink_ptr is not None:  # one token more, without a value
        sink = load_sinks(sink_ptr, head * GROUP + member, exists) * LOG2E
        top = tl.maximum(top, sink)
        total += tl.exp2(sink - tl.where(top == float("-inf"), 0.0, top))
    out = tl.zeros([M, DP], dtype=tl.float32)
    minus = tl.zeros([M, DP], dtype=tl.float32)
    minus_z = tl.zeros([M], dtype=tl.float32)
    t = tl.arange(0, UNIT_P)
    pages = block_table_ptr + row * block_table_stride
    numbers = num_forced + num_current
    skipped = num_complete - num_forced  # from the last of the first units to the next
    next_page = tl.load(pages + tl.where(FIRST > 0, 0, skipped) // PER_PAGE)
    for number in tl.range(0, numbers, num_stages=FORCED_STAGES):
        index = tl.where(number < FIRST, number, skipped + number)
        page = tl.minimum(tl.maximum(next_page, 0), last_page).to(tl.int64)
        ahead = tl.minimum(number + 1, numbers - 1)
        next_page = tl.load(pages + tl.where(ahead < FIRST, ahead, skipped + ahead) // PER_PAGE)
        base = kv_ptr + page * page_stride + head * head_stride + index % PER_PAGE * (UNIT * 2 * D) + t * 2 * D
        # Behind the tile's last token a page holds whatever was there.
        there = (t < UNIT) & (index * UNIT + t < position + num_tokens)
        kv_mask = there[:, None] & in_head[None, :]
        k = tl.load(base[:, None] + column[None, :], mask=kv_mask, other=0.0)  # [UNIT_P, DP]
        v = tl.load(base[:, None] + D + column[None, :], mask=kv_mask, other=0.0)
        product = tl.dot(q, tl.trans(k))
        seen = there[None, :] & ((index * UNIT + t)[None, :] <= (position + token)[:, None])
        logit = tl.where(seen, product * (scale * LOG2E), float("-inf"))
        new_top = tl.maximum(top, tl.max(logit, axis=1))  # [M], finite: every token sees the unit's first key
        decay = tl.exp2(top - new_top)
        weight = tl.exp2(logit - new_top[:, None])
        total = total * decay + tl.sum(weight, axis=1)
        complete = number < num_forced
        if RESIDUAL == REGRESSION:  # as in `page_attend_kernel`
            level = tl.where(complete, tl.exp2(log_mean - new_top), 0.0)
            slope = level * (residual_scale * scale)
            weight -= product * slope[:, None] + (level * (1.0 - residual_scale * center))[:, None]
        out = tl.dot(weight.to(dtype), v, out * decay[:, None])  # [M, DP]
        top = new_top
        if RESIDUAL == LINEAR:
            phi_k = map_features(PHI, k.to(tl.float32), in_head[None, :], 1).to(dtype)
            phi_q = map_features(PHI, q.to(tl.float32) * scale, in_head[None, :], 1).to(dtype)
            feature = tl.where(there[None, :] & complete, tl.dot(phi_q, tl.trans(phi_k)), 0.0)
            high = feature.to(dtype)
            low = (feature - high.to(tl.float32)).to(dtype)
            minus = tl.dot(low, v, tl.dot(high, v, minus))
            minus_z += tl.sum(feature, axis=1)

    part = local.to(tl.int64) * num_parts + tile * PARTS * TQ + token
    for slot in tl.range(0, most, num_stages=STAGES):
        has = exists & (slot < taken - num_forced)
        sums = part_sum_ptr + (part + slot * TQ) * 2 * GROUP_P + member
        part_top = tl.load(sums, mask=has, other=float("-inf"))
        part_total = tl.load(sums + GROUP_P, mask=has, other=0.0)
        out_row = ((part + slot * TQ) * GROUP + member) * D
        mask = has[:, None] & in_head[None, :]
        more = tl.load(part_out_ptr + out_row[:, None] + column[None, :], mask=mask, other=0.0)  # [M, DP]
        new_top = tl.maximum(top, part_top)
        decay = tl.exp2(top - new_top)
        gain = tl.exp2(part_top - new_top)
        out = out * decay[:, None] + more.to(tl.float32) * gain[:, None]
        total = total * decay + part_total * gain
        top = new_top
        if RESIDUAL == LINEAR:
            minus += tl.load(part_tail_ptr + out_row[:, None] + column[None, :], mask=mask, other=0.0)
            minus_z += tl.load(part_z_ptr + (part + slot * TQ) * GROUP_P + member, mask=has, other=0.0)

    if RESIDUAL != NO_RESIDUAL:
        state = tl.load(tile_state_ptr + tile).to(tl.int64)
        state_base = state_ptr + (state * num_kv_heads + head) * (S_ROWS + 1) * D
        # Features have few enough digits for tf32, S has not: in two parts the product is exact to float32. Some
        # features at a time, so that programs share a multiprocessor.
        FEATURES: tl.constexpr = DP if (RESIDUAL == LINEAR) | (DP < 32) else 32
        read = tl.zeros([M, DP], dtype=tl.float32)
        for begin in tl.static_range(0, DP, FEATURES):
            f = begin + tl.arange(0, FEATURES)
            if RESIDUAL == LINEAR:
                features = map_features(PHI, q.to(tl.float32) * scale, in_head[None, :], 1).to(dtype).to(tl.float32)
            else:
                query = query_ptr + (first_token + token).to(tl.int64) * query_token_stride
                query += (head * GROUP + member) * query_head_stride
                features = tl.load(query[:, None] + f[None, :], mask=exists[:, None] & (f < D)[None, :], other=0.0)
                features = features.to(dtype).to(tl.float32)  # [M, FEATURES]
            s_mask = (f < D)[:, None] & in_head[None, :]
            s = tl.load(state_base + f[:, None] * D + column[None, :], mask=s_mask, other=0.0)  # [FEATURES, DP]
            s_high = (s.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            read = tl.dot(features, s_high, read, input_precision="tf32")
            read = tl.dot(features, s - s_high, read, input_precision="tf32")
    if (RESIDUAL != NO_RESIDUAL) & (not DOUBLE_NORM):
        log_mean = tl.load(tail_row, mask=has_rest, other=float("-inf"))
        num_rest = ((num_complete - taken) * UNIT).to(tl.float32)
        new_top = tl.maximum(top, log_mean)
        decay = tl.exp2(top - new_top)
        level = tl.exp2(log_mean - new_top)  # [M], 0 where there is no rest
        if RESIDUAL == REGRESSION:
            sum_v = tl.load(state_base + D * D + column, mask=in_head, other=0.0)  # [DP]
            # Over all complete tokens; the selected ones have been subtracted with their pages.
            tail = residual_scale * scale * read + (1.0 - residual_scale * center)[:, None] * sum_v[None, :]
            out = out * decay[:, None] + tl.where(has_rest[:, None], level[:, None] * tail, 0.0)
        else:
            z = tl.load(state_base + S_ROWS * D + column, mask=in_head, other=0.0)
            read_z = tl.sum(features * z[None, :], axis=1)
            tail = (read - minus) / tl.maximum(read_z - minus_z, 1e-30)[:, None]
            out = out * decay[:, None] + tl.where(has_rest[:, None], (level * num_rest)[:, None] * tail, 0.0)
        total = total * decay + level * num_rest
    result = out / tl.where(exists, total, 1.0)[:, None]
    head_row = head * GROUP + member
    mask = exists[:, None] & in_head[None, :]
    if DOUBLE_NORM:
        weight_row = head_row[:, None] * D + column[None, :]
        variance = tl.sum(tl.where(mask, result * result, 0.0), axis=1) / D
        result = result / tl.sqrt(variance + norm_eps)[:, None]
        result *= tl.load(exact_weight_ptr + weight_row, mask=mask, other=0.0)
        if RESIDUAL != NO_RESIDUAL:
            tail = tl.where(has_rest[:, None] & in_head[None, :], read - minus, 0.0)
            variance = tl.sum(tail * tail, axis=1) / D
            tail = tail / tl.sqrt(variance + norm_eps)[:, None]
            result += tail * tl.load(tail_weight_ptr + weight_row, mask=mask, other=0.0)
    output = output_ptr + (first_token + token).to(tl.int64) * output_token_stride
    output += head_row * output_head_stride
    tl.store(output[:, None] + column[None, :], result.to(output_ptr.dtype.element_ty), mask=mask)
