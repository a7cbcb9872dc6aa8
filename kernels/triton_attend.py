"""Attention over the selected pages, the residual by subtraction, and their combination, in one launch.

Plain reference: `reference.exact_attention`, `residual_direction`, `combine_shared_normalizer`, `rms_norm`. Sources:
SPLA (arXiv 2601.22379), residual linear attention by subtraction; RAttention (arXiv 2506.15545), double RMSNorm;
split-K decode with an LSE merge, flash-decoding.

One matrix product does it all. The rows of its left side are, for the `GROUP` heads of a kv head,

    0 .. GROUP-1            softmax weights, rescaled as the maximum moves          -> the exact part
    GROUP .. 2 GROUP-1      high part of the feature weights `phi(q) . phi(k)`      -> what to subtract
    2 GROUP .. 3 GROUP-1    low part of the same: two numbers of the cache dtype keep the digits that
                            `state - selected` needs
    3 GROUP                 ones (regression: the sum of the selected values)

and its right side are the values, which are read once. The padding of a decode group to the 16 rows of the tensor cores
pays for the residual. Each split also takes its share of the state (`phi(q) S`, subtracted from the same accumulators)
and of the tail mass; the last split to arrive merges and combines.

Floor, bytes a (token, kv head): the selected pages' `2 B d` elements each, the state's `(F_S + F_z / d) d` float32, 5
bytes a page for mass and flag, `GROUP d` output elements. FLOP: `4 M d` a selected token, `M` the padded rows.
"""

import triton
import triton.language as tl

from .triton_state import softmax_features, state_row_offset

NO_RESIDUAL = tl.constexpr(0)
REGRESSION = tl.constexpr(1)
LINEAR = tl.constexpr(2)
RESIDUAL_CODES = {"none": 0, "regression": 1, "linear": 2}


@triton.jit
def _merge_log_sum(top, total, new_top, new_total):
    """Join two `(maximum, sum of exp(x - maximum))`, either of which may be empty."""
    both = tl.maximum(top, new_top)
    safe = tl.where(both == float("-inf"), 0.0, both)
    return both, total * tl.exp(top - safe) + new_total * tl.exp(new_top - safe)


@triton.jit
def attend_split(
    split,
    num_splits,  # splits of this row
    token,
    row,
    head,
    count,  # pages in the table
    limit,  # tokens of the table that exist
    num_subtract,  # tokens of the table that the state covers
    num_complete,  # complete pages of this token
    query_ptr,
    kv_ptr,
    state_ptr,
    state_table_ptr,
    table_ptr,
    flags_ptr,
    mass_ptr,
    part_out_ptr,  # [parts, M, DP] float32
    part_sum_ptr,  # [parts, 2, M] float32: maxima, sums
    part_mass_ptr,  # [parts, 2, GROUP_P] float32: maxima, sums
    part,
    query_token_stride,
    query_head_stride,
    page_stride,
    head_stride,
    block_stride,
    block_head_stride,
    state_table_stride,
    max_pages,
    num_heads,
    num_kv_heads,
    scale,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BUDGET: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_MASS: tl.constexpr,
    MASS_TILE: tl.constexpr,
    BODY: tl.constexpr,
    FEATURES: tl.constexpr,  # features of the state at a time
):
    """One split of one (token, kv head): partial sums into scratch."""
    dtype = kv_ptr.dtype.element_ty
    m = tl.arange(0, M)
    column = tl.arange(0, DP)
    in_head = column < D
    is_head = m < (GROUP if RESIDUAL == NO_RESIDUAL else 3 * GROUP)
    is_exact = m < GROUP
    is_high = (m >= GROUP) & (m < 2 * GROUP)
    is_low = (m >= 2 * GROUP) & (m < 3 * GROUP)
    query_row = query_ptr + token * query_token_stride + (head * GROUP + m % GROUP) * query_head_stride  # [M]
    q = tl.load(query_row[:, None] + column[None, :], mask=is_head[:, None] & in_head[None, :], other=0.0).to(dtype)
    if RESIDUAL == LINEAR:
        phi_q = softmax_features(q.to(tl.float32) * scale, in_head[None, :], 1).to(dtype)  # [M, DP]

    # This split's share of the selected tokens, in whole tiles.
    per_split = tl.cdiv(tl.cdiv(limit, TILE), num_splits) * TILE
    start = split * per_split
    stop = tl.minimum(start + per_split, limit)
    table = table_ptr + (token * num_kv_heads + head) * BUDGET
    top = tl.full([M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    out = tl.zeros([M, DP], dtype=tl.float32)
    for first in tl.range(start, stop, TILE, num_stages=STAGES):
        t = first + tl.arange(0, TILE)
        visible = t < stop
        entry = tl.load(table + t // PAGE, mask=visible, other=0)
        # The table names kv heads of pages, as FlashInfer wants it; all of them are of this program's head.
        base = (entry // num_kv_heads).to(tl.int64) * page_stride + head * head_stride + (t % PAGE) * 2 * D  # [TILE]
        mask = in_head[:, None] & visible[None, :]
        k = tl.load(kv_ptr + base[None, :] + column[:, None], mask=mask, other=0.0)  # [DP, TILE]
        v_mask = visible[:, None] & in_head[None, :]
        v = tl.load(kv_ptr + base[:, None] + D + column[None, :], mask=v_mask, other=0.0)  # [TILE, DP]
        logit = tl.dot(q, k) * scale  # [M, TILE]
        masked = tl.where(visible[None, :], logit, float("-inf"))
        new_top = tl.maximum(top, tl.max(masked, axis=1))
        p = tl.exp(masked - new_top[:, None])
        decay = tl.exp(top - new_top)
        top = new_top
        if RESIDUAL == NO_RESIDUAL:
            weight = p
        else:
            decay = tl.where(is_exact, decay, 1.0)
            if RESIDUAL == LINEAR:
                phi_k = softmax_features(k.to(tl.float32), in_head[:, None], 0).to(dtype)  # [DP, TILE]
                feature = tl.dot(phi_q, phi_k)
            else:
                feature = logit
            high = feature.to(dtype).to(tl.float32)
            rest = tl.where(is_high[:, None], high, tl.where(is_low[:, None], feature - high, 0.0))
            if RESIDUAL == REGRESSION:
                rest = tl.where((m == 3 * GROUP)[:, None], 1.0, rest)
            rest = tl.where((t < num_subtract)[None, :], rest, 0.0)
            weight = tl.where(is_exact[:, None], p, rest)
        total = total * decay + tl.sum(weight, axis=1)
        out = tl.dot(weight.to(dtype), v, out * decay[:, None])

    has_rest = num_complete >= count  # more complete pages than the table holds beside the current one
    if RESIDUAL != NO_RESIDUAL:  # noqa: SIM102, compile-time and run-time conditions stay apart
        if has_rest:
            blocks = state_table_ptr + row.to(tl.int64) * state_table_stride
            state = state_ptr + head * block_head_stride
            # q has few enough digits for tf32, S has not: in two parts the product is exact to float32.
            from_state = tl.zeros([M, DP], dtype=tl.float32)
            z_sum = tl.zeros([M], dtype=tl.float32)
            Z_ROW: tl.constexpr = D if RESIDUAL == LINEAR else D + 1
            z_block = tl.maximum(tl.load(blocks + Z_ROW // BODY), 0).to(tl.int64)
            z_row = state + z_block * block_stride + (1 + Z_ROW % BODY) * D
            if RESIDUAL == LINEAR:
                x = tl.where(in_head[None, :], q.to(tl.float32) * scale, float("-inf"))
                q_top = tl.max(x, axis=1)
                q_norm = tl.sum(tl.exp(x - q_top[:, None]), axis=1)
            for first in tl.range(split * FEATURES, D, num_splits * FEATURES):
                f = first + tl.arange(0, FEATURES)
                in_state = f < D
                offset = state_row_offset(blocks, f, block_stride, BODY, D, in_state)
                s_mask = in_state[:, None] & in_head[None, :]
                s = tl.load(state + offset[:, None] + column[None, :], mask=s_mask, other=0.0)  # [FEATURES, DP]
                s_high = (s.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # 10 bits of mantissa
                qf = tl.load(query_row[:, None] + f[None, :], mask=is_high[:, None] & in_state[None, :], other=0.0)
                qf = qf.to(dtype).to(tl.float32)  # [M, FEATURES]
                if RESIDUAL == LINEAR:
                    qf = (tl.exp(qf * scale - q_top[:, None]) / q_norm[:, None]).to(dtype).to(tl.float32)
                    qf = tl.where(is_high[:, None] & in_state[None, :], qf, 0.0)
                from_state = tl.dot(qf, s_high, from_state, input_precision="tf32")
                from_state = tl.dot(qf, s - s_high, from_state, input_precision="tf32")
                z = tl.load(z_row + f, mask=in_state, other=0.0)  # [FEATURES]
                z_sum += tl.sum(qf * z[None, :], axis=1)
            if RESIDUAL == REGRESSION:
                from_state *= scale
                z_sum *= scale
                if split == 0:
                    v_block = tl.maximum(tl.load(blocks + D // BODY), 0).to(tl.int64)
                    v_row = state + v_block * block_stride + (1 + D % BODY) * D
                    sum_v = tl.load(v_row + column, mask=in_head, other=0.0)  # [DP]
                    from_state += tl.where((m == 3 * GROUP)[:, None], sum_v[None, :], 0.0)
            out -= from_state
            total -= z_sum

    tl.store(part_out_ptr + part * M * DP + m[:, None] * DP + column[None, :], out)
    tl.store(part_sum_ptr + part * 2 * M + m, top)
    tl.store(part_sum_ptr + part * 2 * M + M + m, total)

    if HAS_MASS:  # noqa: SIM102
        if has_rest:
            g = tl.arange(0, GROUP_P)
            per_split = tl.cdiv(tl.cdiv(num_complete, num_splits), MASS_TILE) * MASS_TILE
            start = split * per_split
            stop = tl.minimum(start + per_split, num_complete)
            mass_row = mass_ptr + (token * num_heads + head * GROUP + g) * max_pages  # [GROUP_P]
            flags = flags_ptr + (token * num_kv_heads + head) * max_pages
            mass_top = tl.full([GROUP_P], float("-inf"), dtype=tl.float32)
            mass_total = tl.zeros([GROUP_P], dtype=tl.float32)
            for first in tl.range(start, stop, MASS_TILE):
                page = first + tl.arange(0, MASS_TILE)
                flag = tl.load(flags + page, mask=page < stop, other=1)
                left = (flag == 0)[None, :] & (g < GROUP)[:, None]
                mass = tl.load(mass_row[:, None] + page[None, :], mask=left, other=float("-inf"))
                tile_top = tl.max(mass, axis=1)
                safe = tl.where(tile_top == float("-inf"), 0.0, tile_top)
                tile_total = tl.sum(tl.exp(mass - safe[:, None]), axis=1)
                mass_top, mass_total = _merge_log_sum(mass_top, mass_total, tile_top, tile_total)
            tl.store(part_mass_ptr + part * 2 * GROUP_P + g, mass_top)
            tl.store(part_mass_ptr + part * 2 * GROUP_P + GROUP_P + g, mass_total)


@triton.jit
def merge_splits(
    num_splits,
    token,
    head,
    count,
    num_complete,
    part_out_ptr,
    part_sum_ptr,
    part_mass_ptr,
    part,  # first part of this (token, kv head)
    gain_ptr,  # [H] float32
    exact_weight_ptr,  # [H, D] float32
    tail_weight_ptr,  # [H, D] float32
    output_ptr,
    output_token_stride,
    output_head_stride,
    residual_scale,
    norm_eps,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS_P: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_MASS: tl.constexpr,
    DOUBLE_NORM: tl.constexpr,
):
    """Merge the splits of one (token, kv head), combine, and write the output."""
    g = tl.arange(0, GROUP_P)
    in_group = g < GROUP
    column = tl.arange(0, DP)
    in_head = column < D
    s = tl.arange(0, SPLITS_P)
    exists = (s < num_splits)[:, None] & in_group[None, :]
    sums = part_sum_ptr + (part + s)[:, None] * 2 * M + g[None, :]  # [SPLITS_P, GROUP_P]
    tops = tl.load(sums, mask=exists, other=float("-inf"))
    top = tl.max(tops, axis=0)  # [GROUP_P]
    safe = tl.where(in_group, top, 0.0)
    norm = tl.sum(tl.load(sums + M, mask=exists, other=0.0) * tl.exp(tops - safe[None, :]), axis=0)  # [GROUP_P]
    has_rest = num_complete >= count
    exact = tl.zeros([GROUP_P, DP], dtype=tl.float32)
    minus = tl.zeros([GROUP_P, DP], dtype=tl.float32)  # (selected - all) of phi(q) S
    minus_v = tl.zeros([DP], dtype=tl.float32)  # (selected - all) of sum v
    mask = in_group[:, None] & in_head[None, :]
    rest_mask = (g < tl.where(has_rest, GROUP, 0))[:, None] & in_head[None, :]
    rest_columns = column < tl.where(has_rest, D, 0)
    for index in tl.range(0, num_splits):
        rows = part_out_ptr + (part + index) * M * DP + g[:, None] * DP + column[None, :]  # [GROUP_P, DP]
        split_top = tl.load(part_sum_ptr + (part + index) * 2 * M + g, mask=in_group, other=float("-inf"))
        exact += tl.load(rows, mask=mask, other=0.0) * tl.exp(split_top - safe)[:, None]
        if RESIDUAL != NO_RESIDUAL:
            minus += tl.load(rows + GROUP * DP, mask=rest_mask, other=0.0)
            minus += tl.load(rows + 2 * GROUP * DP, mask=rest_mask, other=0.0)
            if RESIDUAL == REGRESSION:
                row = part_out_ptr + (part + index) * M * DP + 3 * GROUP * DP + column
                minus_v += tl.load(row, mask=rest_columns, other=0.0)
    exact = exact / tl.where(in_group, norm, 1.0)[:, None]
    head_row = head * GROUP + g  # [GROUP_P]

    if RESIDUAL != NO_RESIDUAL:
        tail = tl.zeros([GROUP_P, DP], dtype=tl.float32)
        if has_rest:
            z_mask = exists
            minus_z = tl.sum(tl.load(sums + M + GROUP, mask=z_mask, other=0.0), axis=0)
            minus_z += tl.sum(tl.load(sums + M + 2 * GROUP, mask=z_mask, other=0.0), axis=0)  # [GROUP_P]
            if RESIDUAL == REGRESSION:
                num_rest = ((num_complete - count + 1) * PAGE).to(tl.float32)
                mean_v = -minus_v / num_rest
                mean_qk = -minus_z / num_rest
                covariance = -minus / num_rest - mean_qk[:, None] * mean_v[None, :]
                tail = mean_v[None, :] + residual_scale * covariance
            elif DOUBLE_NORM:
                tail = -minus
            else:
                tail = -minus / tl.maximum(-minus_z, 1e-30)[:, None]
    if DOUBLE_NORM:
        exact_weight = tl.load(exact_weight_ptr + head_row[:, None] * D + column[None, :], mask=mask, other=0.0)
        variance = tl.sum(tl.where(mask, exact * exact, 0.0), axis=1) / D
        result = exact / tl.sqrt(variance + norm_eps)[:, None] * exact_weight
        if RESIDUAL != NO_RESIDUAL:
            tail = tl.where(mask, tail, 0.0)
            tail_weight = tl.load(tail_weight_ptr + head_row[:, None] * D + column[None, :], mask=mask, other=0.0)
            variance = tl.sum(tail * tail, axis=1) / D
            result += tail / tl.sqrt(variance + norm_eps)[:, None] * tail_weight
    elif HAS_MASS:
        result = exact
        if has_rest:
            masses = part_mass_ptr + (part + s)[:, None] * 2 * GROUP_P + g[None, :]  # [SPLITS_P, GROUP_P]
            mass_tops = tl.load(masses, mask=exists, other=float("-inf"))
            mass_top = tl.max(mass_tops, axis=0)
            mass_safe = tl.where(mass_top == float("-inf"), 0.0, mass_top)
            mass = tl.load(masses + GROUP_P, mask=exists, other=0.0) * tl.exp(mass_tops - mass_safe[None, :])
            gain = tl.load(gain_ptr + head_row, mask=in_group, other=0.0)
            log_mass = mass_top + tl.log(tl.sum(mass, axis=0)) + tl.log(gain)  # -inf where the gain is 0
            lse = safe + tl.log(tl.where(in_group, norm, 1.0))
            share = 1.0 / (1.0 + tl.exp(lse - log_mass))  # [GROUP_P]
            share = tl.where(in_group, share, 0.0)
            result = tl.where(share[:, None] > 0, exact + share[:, None] * (tail - exact), exact)
    else:
        result = exact
    output = output_ptr + token * output_token_stride + head_row[:, None] * output_head_stride + column[None, :]
    tl.store(output, result.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def attend_kernel(
    query_ptr,
    kv_ptr,
    state_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    state_table_ptr,
    table_ptr,
    count_ptr,
    flags_ptr,
    mass_ptr,
    part_out_ptr,
    part_sum_ptr,
    part_mass_ptr,
    arrivals_ptr,  # [tokens, G] int32, zero between launches
    gain_ptr,
    exact_weight_ptr,
    tail_weight_ptr,
    output_ptr,
    num_rows,
    query_token_stride,
    query_head_stride,
    output_token_stride,
    output_head_stride,
    page_stride,
    head_stride,
    block_stride,
    block_head_stride,
    state_table_stride,
    max_pages,
    num_heads,
    num_kv_heads,
    scale,
    residual_scale,
    norm_eps,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BUDGET: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_P: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_MASS: tl.constexpr,
    MASS_TILE: tl.constexpr,
    DOUBLE_NORM: tl.constexpr,
    BODY: tl.constexpr,
    FEATURES: tl.constexpr,
    DEPENDENT: tl.constexpr,  # launched as a programmatic dependent
):
    """Grid (SPLITS, G, rows * QUERY_LEN)."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2) // QUERY_LEN
    token_in_row = tl.program_id(2) % QUERY_LEN
    seq_len = tl.load(seq_lens_ptr + row)
    first_token = tl.load(query_start_loc_ptr + row)
    query_len = tl.load(query_start_loc_ptr + row + 1) - first_token
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    if (seq_len > 0) & (token_in_row < query_len):
        token = (first_token + token_in_row).to(tl.int64)
        position = seq_len - query_len + token_in_row
        num_complete = position // PAGE
        count = tl.load(count_ptr + token * num_kv_heads + head)
        limit = (count - 1) * PAGE + position % PAGE + 1
        # Complete pages beyond the state (of this step's own tokens) are forced, and stand last before the current one.
        covered = (seq_len - query_len) // PAGE
        num_subtract = (count - 1 - (num_complete - covered)) * PAGE
        # Short rows use fewer splits, by their own length.
        splits = tl.minimum(SPLITS, tl.cdiv(limit, TILE))
        if split < splits:
            # Parts are numbered by program, so that their scratch depends on the grid only.
            part = (tl.program_id(2).to(tl.int64) * num_kv_heads + head) * SPLITS
            attend_split(
                split, splits, token, row, head, count, limit, num_subtract, num_complete,
                query_ptr, kv_ptr, state_ptr, state_table_ptr, table_ptr, flags_ptr, mass_ptr,
                part_out_ptr, part_sum_ptr, part_mass_ptr, part + split,
                query_token_stride, query_head_stride, page_stride, head_stride, block_stride, block_head_stride,
                state_table_stride, max_pages, num_heads, num_kv_heads, scale,
                GROUP, GROUP_P, M, D, DP, PAGE, BUDGET, TILE, STAGES, RESIDUAL, HAS_MASS, MASS_TILE, BODY, FEATURES,
            )  # fmt: skip
            tl.debug_barrier()  # every thread's partial sums are written before the arrival is announced
            arrived = splits - 1
            if SPLITS > 1:
                arrivals = arrivals_ptr + tl.program_id(2) * num_kv_heads + head
                arrived = tl.atomic_add(arrivals, 1, sem="acq_rel")
            if arrived == splits - 1:
                if SPLITS > 1:
                    tl.store(arrivals, 0)
                merge_splits(
                    splits, token, head, count, num_complete, part_out_ptr, part_sum_ptr, part_mass_ptr, part,
                    gain_ptr, exact_weight_ptr, tail_weight_ptr, output_ptr, output_token_stride, output_head_stride,
                    residual_scale, norm_eps,
                    GROUP, GROUP_P, M, D, DP, PAGE, SPLITS_P, RESIDUAL, HAS_MASS, DOUBLE_NORM,
                )  # fmt: skip
    else:
        # Padding. Its output row is ours to clear only behind the tokens of all real rows.
        token = tl.program_id(2).to(tl.int64)
        if (split == 0) & (token >= tl.load(query_start_loc_ptr + num_rows)):
            column = tl.arange(0, DP)
            for member in tl.static_range(GROUP):
                output = output_ptr + token * output_token_stride + (head * GROUP + member) * output_head_stride
                tl.store(output + column, tl.zeros([DP], output_ptr.dtype.element_ty), mask=column < D)
