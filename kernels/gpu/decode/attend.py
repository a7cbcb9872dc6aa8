"""Attention over the selected units (selection blocks), the residual by subtraction, their combination, in one launch.

Plain reference: `reference.exact_attention`, `residual_direction`, `combine_shared_normalizer`, `rms_norm`. Sources:
SPLA (arXiv 2601.22379), residual linear attention by subtraction; RAttention (arXiv 2506.15545), double RMSNorm;
split-K decode with an LSE merge, flash-decoding.

Keys are the left side of `K Q^T`, so that they go from shared memory into the tensor cores; values are the right side
of `W^T V`. A decode group would leave most of the short side of both products empty; here it carries the residual.
With `C` the heads of a group, padded, the `N = 4 C` columns of `W` are

    0 .. C-1      softmax weights, rescaled as the maximum moves       -> the exact part
    C .. 2C-1     high part of the feature weights phi(q) . phi(k)     -> what to subtract from the state
    2C .. 3C-1    low part of the same: two numbers of the cache dtype keep the digits of `state - selected`
    3C            ones                                                 -> the sum of the selected values

The last program of a (token, kv head) to arrive merges the splits, takes the state's share from `gpu/state`, and
combines. A head's sink joins there, as a token without a value. Programs beside the splits sum the mass of the units
that were not selected.

Floor, bytes a (token, kv head): `2 d` elements a selected token, 5 bytes a unit and head for mass and flag, `GROUP d`
output elements. FLOP: `4 N d` a selected token.
"""

from typing import Any

import triton
import triton.language as tl

from ..feature_maps import map_features
from ..layer import GpuLayer
from ..residual import LINEAR, NO_RESIDUAL, REGRESSION, RESIDUAL_CODES
from ..sinks import load_sinks
from .residual import subtract_weights, tail_of_rest
from .running_sum import add_exponentials, log_of_columns
from .tuning import DecodeSizes, Tuning


@triton.jit
def unit_of(table, first, limit, UNIT: tl.constexpr, TILE: tl.constexpr):
    """Table entries of the tokens `first .. first + TILE - 1`: one, or `[TILE]` where a tile spans units.

    Behind the last token, the last entry again.
    """
    if UNIT % TILE == 0:
        entry = tl.load(table + tl.minimum(first, limit - 1) // UNIT)
    else:
        entry = tl.load(table + tl.minimum(first + tl.arange(0, TILE), limit - 1) // UNIT)
    return entry


@triton.jit
def page_of(entry, last_page, num_kv_heads, PAGE: tl.constexpr, UNIT: tl.constexpr):
    """Page of a table's entries, and the row of it where the unit begins.

    The table names units of kv heads of pages, as FlashInfer wants it; all of them are of this program's head. The
    pipeline computes addresses, but does not read, beyond the last tile, where entries are undefined.
    """
    PER_PAGE: tl.constexpr = PAGE // UNIT
    entry = tl.maximum(entry, 0)
    page = tl.minimum(entry // (num_kv_heads * PER_PAGE), last_page).to(tl.int64)
    return page, entry % PER_PAGE * UNIT  # 0 where the unit is the page


@triton.jit
def rows_of(
    first, entry, kv, page_stride, last_page, num_kv_heads,
    D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Where the keys of a table's tokens `first .. first + TILE - 1` stand, `[TILE, DP]`; `entry` from `unit_of`."""
    column = tl.arange(0, DP)
    page, in_page = page_of(entry, last_page, num_kv_heads, PAGE, UNIT)
    if UNIT % TILE == 0:
        start = kv + page * page_stride + (in_page + first % UNIT) * 2 * D
        rows = start + (tl.arange(0, TILE) * 2 * D)[:, None] + column[None, :]
    else:
        t = first + tl.arange(0, TILE)
        rows = kv + (page * page_stride + (in_page + t % UNIT) * 2 * D)[:, None] + column[None, :]
    return rows


@triton.jit
def _attend_tile(
    first, entry, limit, num_subtract, kv, q, phi_q, top, total, out,
    page_stride, last_page, num_kv_heads, scale,
    C: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, UNIT: tl.constexpr,
    TILE: tl.constexpr, RESIDUAL: tl.constexpr, PHI: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the tokens `first .. first + TILE - 1` of the table, whose entries are `entry`, to the accumulators."""
    t = first + tl.arange(0, TILE)
    column = tl.arange(0, DP)
    in_head = column < D
    n = tl.arange(0, N)
    rows = rows_of(first, entry, kv, page_stride, last_page, num_kv_heads, D, DP, PAGE, UNIT, TILE)  # [TILE, DP]
    if MASKED:
        mask = (t < limit)[:, None] & in_head[None, :]
        k = tl.load(rows, mask=mask, other=0.0)
        v = tl.load(rows + D, mask=mask, other=0.0)
    elif D == DP:
        k = tl.load(rows)
        v = tl.load(rows + D)
    else:
        k = tl.load(rows, mask=in_head[None, :], other=0.0)
        v = tl.load(rows + D, mask=in_head[None, :], other=0.0)
    dtype = k.dtype
    logit = tl.dot(k, q) * scale  # [TILE, N]
    exposed = logit
    if MASKED:
        exposed = tl.where((t < limit)[:, None], logit, float("-inf"))
    new_top = tl.maximum(top, tl.max(exposed, axis=0))  # [N]
    p = tl.exp(exposed - new_top[None, :])
    decay = tl.exp(top - new_top)
    if RESIDUAL == NO_RESIDUAL:
        total = total * decay[None, :] + p
        weight = p.to(dtype)
    else:
        kind = (n // C)[None, :]
        decay = tl.where(n < C, decay, 1.0)
        if RESIDUAL == LINEAR:
            phi_k = map_features(PHI, k.to(tl.float32), in_head[None, :], 1).to(dtype)
            feature = tl.dot(phi_k, phi_q)
        else:
            feature = logit
        covered = (t < num_subtract)[:, None]
        subtract = subtract_weights(feature, kind, covered, dtype)
        weight = tl.where(kind == 0, p.to(dtype), subtract)
        total = total * decay[None, :] + tl.where(kind == 0, p, tl.where(covered, feature, 0.0))
    out = tl.dot(tl.trans(weight), v, out * decay[:, None])
    return new_top, total, out


@triton.jit
def attend_split(
    split,
    num_splits,  # splits of this row
    token,
    head,
    limit,  # tokens of the table that exist
    num_subtract,  # tokens of the table that the state covers
    query_ptr,
    kv_ptr,
    table_ptr,
    part_out_ptr,  # [parts, N, DP] float32
    part_sum_ptr,  # [parts, 2, N] float32: maxima, sums
    part,
    query_token_stride,
    query_head_stride,
    page_stride,
    head_stride,
    last_page,  # the largest page id there is
    num_kv_heads,
    scale,
    GROUP: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    TABLE: tl.constexpr,  # entries of a token's page table
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PHI: tl.constexpr,  # feature map of the linear residual
):
    """One split of one (token, kv head): partial sums into scratch."""
    dtype = kv_ptr.dtype.element_ty
    n = tl.arange(0, N)
    column = tl.arange(0, DP)
    in_head = column < D
    query_row = query_ptr + token * query_token_stride + (head * GROUP + n % C) * query_head_stride  # [N]
    q_mask = (n % C < GROUP)[None, :] & in_head[:, None]
    q = tl.load(query_row[None, :] + column[:, None], mask=q_mask, other=0.0).to(dtype)  # [DP, N]
    phi_q = q
    if RESIDUAL == LINEAR:
        phi_q = map_features(PHI, q.to(tl.float32) * scale, in_head[:, None], 0).to(dtype)

    # This split's share of the selected tokens, in whole tiles.
    per_split = tl.cdiv(tl.cdiv(limit, TILE), num_splits) * TILE
    start = split * per_split
    stop = tl.minimum(start + per_split, limit)
    full = tl.minimum(stop, limit // TILE * TILE)  # tiles up to here need no mask
    table = table_ptr + (token * num_kv_heads + head) * TABLE
    kv = kv_ptr + head * head_stride
    top = tl.full([N], float("-inf"), dtype=tl.float32)
    total = tl.zeros([TILE, N], dtype=tl.float32)
    out = tl.zeros([N, DP], dtype=tl.float32)
    # Entries are fetched a step ahead: a load that waits for another load is not pipelined well.
    entry = unit_of(table, start, limit, UNIT, TILE)
    for first in tl.range(start, full, TILE, num_stages=STAGES):
        this_entry = entry
        entry = unit_of(table, first + TILE, limit, UNIT, TILE)
        top, total, out = _attend_tile(
            first, this_entry, limit, num_subtract, kv, q, phi_q, top, total, out, page_stride, last_page,
            num_kv_heads, scale, C, N, D, DP, PAGE, UNIT, TILE, RESIDUAL, PHI, False,
        )  # fmt: skip
    if (start < stop) & (full < stop):
        entry = unit_of(table, full, limit, UNIT, TILE)
        top, total, out = _attend_tile(
            full, entry, limit, num_subtract, kv, q, phi_q, top, total, out, page_stride, last_page,
            num_kv_heads, scale, C, N, D, DP, PAGE, UNIT, TILE, RESIDUAL, PHI, True,
        )  # fmt: skip

    tl.store(part_out_ptr + (part * N + n[:, None]) * DP + column[None, :], out)
    tl.store(part_sum_ptr + part * 2 * N + n, top)
    tl.store(part_sum_ptr + part * 2 * N + N + n, tl.sum(total, axis=0))


@triton.jit
def mass_of_rest(
    pair,  # token * G + head
    split,  # of MASS_SPLITS
    num_complete,  # selection blocks of complete pages
    flags_ptr,  # [tokens, G, max_units] int8: how many of their PER_UNIT parts are selected
    mass_ptr,
    rest_mass_ptr,  # [tokens, G, MASS_SPLITS, GROUP_P] float32
    max_units,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    WIDTH: tl.constexpr,
    MASS_SPLITS: tl.constexpr,
    PER_UNIT: tl.constexpr,  # fine blocks a selection block; 1 where these are selected whole
):
    """Log of the estimated mass of what was not selected, one share of the selection blocks, each head.

    The mass of a selection block of which some fine blocks are selected is spread evenly.
    """
    member = tl.arange(0, GROUP_P)
    in_group = (member < GROUP)[None, :]
    top = tl.full([WIDTH, GROUP_P], float("-inf"), dtype=tl.float32)
    total = tl.zeros([WIDTH, GROUP_P], dtype=tl.float32)
    for first in tl.range(split * WIDTH, num_complete, MASS_SPLITS * WIDTH):
        unit = first + tl.arange(0, WIDTH)
        exists = unit < num_complete
        # Both loads depend on nothing but the unit, so they are in flight together.
        flag = tl.load(flags_ptr + pair * max_units + unit, mask=exists, other=1)
        where = (pair * max_units + unit)[:, None] * GROUP_P + member[None, :]
        mass = tl.load(mass_ptr + where, mask=exists[:, None] & in_group, other=float("-inf"))  # [WIDTH, GROUP_P]
        if PER_UNIT == 1:
            mass = tl.where((flag == 0)[:, None], mass, float("-inf"))
        else:
            left = PER_UNIT - flag.to(tl.int32)  # [WIDTH]
            share = tl.log(tl.maximum(left, 1).to(tl.float32) / PER_UNIT)
            mass = tl.where((left > 0)[:, None], mass + share[:, None], float("-inf"))
        top, total = add_exponentials(top, total, mass)
    result = log_of_columns(top, total)  # [GROUP_P]
    tl.store(rest_mass_ptr + (pair * MASS_SPLITS + split) * GROUP_P + member, result)


@triton.jit
def merge_splits(
    num_splits,
    token,
    head,
    num_rest,  # units that were not selected
    part_out_ptr,
    part_sum_ptr,
    part,  # first part of this (token, kv head)
    rest_mass_ptr,
    read_ptr,
    read_z_ptr,
    read_v_ptr,
    gain_ptr,  # [H] float32
    sink_ptr,  # [H]; None without sinks
    exact_weight_ptr,  # [H, D] float32
    tail_weight_ptr,  # [H, D] float32
    output_ptr,
    output_token_stride,
    output_head_stride,
    num_kv_heads,
    residual_scale,
    norm_eps,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    UNIT: tl.constexpr,
    SPLITS: tl.constexpr,
    SLICES: tl.constexpr,
    MASS_SPLITS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_MASS: tl.constexpr,
    DOUBLE_NORM: tl.constexpr,
):
    """Merge the splits of one (token, kv head), combine, and write the output.

    Every thread goes through the splits by itself for the elements that it has: no reduction, no barrier, and all loads
    independent of each other.
    """
    c = tl.arange(0, C)
    in_group = c < GROUP
    column = tl.arange(0, DP)
    in_head = column < D
    pair = token * num_kv_heads + head
    mask = in_group[:, None] & in_head[None, :]
    head_row = head * GROUP + c  # [C]
    has_rest = num_rest > 0
    rest_group = c < tl.where(has_rest, GROUP, 0)
    rest_mask = rest_group[:, None] & in_head[None, :]
    rest_columns = column < tl.where(has_rest, D, 0)

    # What the launch before and the mass programs say, on its way while the splits are merged.
    minus = tl.zeros([C, DP], dtype=tl.float32)  # (selected - all) of phi(q) S
    minus_z = tl.zeros([C], dtype=tl.float32)
    minus_v = tl.zeros([DP], dtype=tl.float32)  # (selected - all) of sum v
    if RESIDUAL != NO_RESIDUAL:
        for index in tl.static_range(SLICES):
            read = (pair * SLICES + index) * GROUP_P + c  # [C]
            minus -= tl.load(read_ptr + read[:, None] * DP + column[None, :], mask=rest_mask, other=0.0)
            minus_z -= tl.load(read_z_ptr + read, mask=rest_group, other=0.0)
        if RESIDUAL == REGRESSION:
            minus_v -= tl.load(read_v_ptr + pair * DP + column, mask=rest_columns, other=0.0)
    if HAS_MASS:
        gain = tl.load(gain_ptr + head_row, mask=in_group, other=0.0)
        log_mass = tl.full([C], float("-inf"), dtype=tl.float32)
        for index in tl.static_range(MASS_SPLITS):
            mass_row = rest_mass_ptr + (pair * MASS_SPLITS + index) * GROUP_P + c
            more = tl.load(mass_row, mask=rest_group, other=float("-inf"))
            larger = tl.maximum(log_mass, more)
            anchor = tl.where(larger == float("-inf"), 0.0, larger)
            both = tl.exp(log_mass - anchor) + tl.exp(more - anchor)
            log_mass = tl.where(both > 0, anchor + tl.log(tl.where(both > 0, both, 1.0)), float("-inf"))
        log_mass += tl.where(gain > 0, tl.log(tl.where(gain > 0, gain, 1.0)), float("-inf"))

    top = tl.full([C], float("-inf"), dtype=tl.float32)
    for s in tl.static_range(SPLITS):
        exists = c < tl.where(s < num_splits, GROUP, 0)
        top = tl.maximum(top, tl.load(part_sum_ptr + (part + s) * 2 * N + c, mask=exists, other=float("-inf")))
    if sink_ptr is not None:  # one token more, without a value
        sink = load_sinks(sink_ptr, head_row, in_group)
        top = tl.maximum(top, sink)
    safe = tl.where(in_group, top, 0.0)
    norm = tl.zeros([C], dtype=tl.float32)
    if sink_ptr is not None:
        norm += tl.exp(sink - safe)
    exact = tl.zeros([C, DP], dtype=tl.float32)
    for s in tl.static_range(SPLITS):
        rows = tl.where(s < num_splits, GROUP, 0)
        exists = c < rows
        sums = part_sum_ptr + (part + s) * 2 * N + c  # [C]
        weight = tl.exp(tl.load(sums, mask=exists, other=float("-inf")) - safe)
        norm += weight * tl.load(sums + N, mask=exists, other=0.0)
        outs = part_out_ptr + ((part + s) * N + c[:, None]) * DP + column[None, :]  # [C, DP]
        exact += weight[:, None] * tl.load(outs, mask=exists[:, None] & in_head[None, :], other=0.0)
        if RESIDUAL != NO_RESIDUAL:
            rest = c < tl.where(has_rest, rows, 0)
            both = rest[:, None] & in_head[None, :]
            minus += tl.load(outs + C * DP, mask=both, other=0.0) + tl.load(outs + 2 * C * DP, mask=both, other=0.0)
            minus_z += tl.load(sums + N + C, mask=rest, other=0.0)
            if RESIDUAL == REGRESSION:
                ones = column < tl.where((s < num_splits) & has_rest, D, 0)
                minus_v += tl.load(part_out_ptr + ((part + s) * N + 3 * C) * DP + column, mask=ones, other=0.0)
    norm = tl.where(in_group, norm, 1.0)
    exact = exact / norm[:, None]

    if RESIDUAL != NO_RESIDUAL:
        tail = tail_of_rest(minus, minus_z, minus_v, num_rest * UNIT, residual_scale, RESIDUAL, DOUBLE_NORM)
    weight_row = head_row[:, None] * D + column[None, :]
    if DOUBLE_NORM:
        variance = tl.sum(tl.where(mask, exact * exact, 0.0), axis=1) / D  # [C]
        result = exact / tl.sqrt(variance + norm_eps)[:, None]
        result *= tl.load(exact_weight_ptr + weight_row, mask=mask, other=0.0)
        if RESIDUAL != NO_RESIDUAL:
            tail = tl.where(rest_mask, tail, 0.0)
            variance = tl.sum(tail * tail, axis=1) / D
            tail = tail / tl.sqrt(variance + norm_eps)[:, None]
            result += tail * tl.load(tail_weight_ptr + weight_row, mask=mask, other=0.0)
    elif HAS_MASS:
        lse = safe + tl.log(norm)
        share = 1.0 / (1.0 + tl.exp(lse - log_mass))  # [C], 0 where there is no rest or no gain
        share = tl.where(rest_group, share, 0.0)
        result = tl.where(share[:, None] > 0, exact + share[:, None] * (tail - exact), exact)
    else:
        result = exact
    output = output_ptr + token * output_token_stride + head_row[:, None] * output_head_stride + column[None, :]
    tl.store(output, result.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def clear_padding(
    split, slot, head, query_start_loc_ptr, num_rows, num_tokens, output_ptr, output_token_stride, output_head_stride,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Zero the output row of a slot without a token. It is ours to clear only behind the tokens of all real rows, and
    only where there is one: rows of fewer tokens than they may have leave slots behind the output's end."""
    token = slot.to(tl.int64)
    if (split == 0) & (token < num_tokens) & (token >= tl.load(query_start_loc_ptr + num_rows)):
        column = tl.arange(0, DP)
        for member in tl.static_range(GROUP):
            output = output_ptr + token * output_token_stride + (head * GROUP + member) * output_head_stride
            tl.store(output + column, tl.zeros([DP], output_ptr.dtype.element_ty), mask=column < D)


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "last_page"])
def attend_kernel(
    query_ptr,
    kv_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    table_ptr,
    count_ptr,
    flags_ptr,
    mass_ptr,
    part_out_ptr,
    part_sum_ptr,
    rest_mass_ptr,
    read_ptr,
    read_z_ptr,
    read_v_ptr,
    arrivals_ptr,  # [tokens, G] int32, zero between launches
    gain_ptr,
    sink_ptr,
    exact_weight_ptr,
    tail_weight_ptr,
    output_ptr,
    num_rows,
    num_tokens,  # of the output
    query_token_stride,
    query_head_stride,
    output_token_stride,
    output_head_stride,
    page_stride,
    head_stride,
    last_page,
    max_units,
    num_kv_heads,
    scale,
    residual_scale,
    norm_eps,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    TABLE: tl.constexpr,  # entries of a token's page table
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    SLICES: tl.constexpr,
    MASS_SPLITS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PHI: tl.constexpr,
    HAS_MASS: tl.constexpr,
    MASS_WIDTH: tl.constexpr,
    PER_UNIT: tl.constexpr,  # units a selection block, of which there are masses and flags
    DOUBLE_NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,  # launched as a programmatic dependent
):
    """Grid (SPLITS + MASS_SPLITS, G, rows * QUERY_LEN); without a mass, MASS_SPLITS is 0."""
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
        current = position // UNIT
        num_complete = position // PAGE * (PAGE // UNIT)  # units of complete pages
        count = tl.load(count_ptr + token * num_kv_heads + head)
        num_rest = current + 1 - count
        limit = (count - 1) * UNIT + position % UNIT + 1
        # Units of the current page, which no state has, stand last.
        num_subtract = (count - (current + 1 - num_complete)) * UNIT
        # Short rows use fewer splits, by their own length.
        splits = tl.minimum(SPLITS, tl.cdiv(limit, TILE))
        # Parts are numbered by program, so that their scratch depends on the grid only.
        part = (tl.program_id(2).to(tl.int64) * num_kv_heads + head) * SPLITS
        programs = splits
        if HAS_MASS:
            programs = tl.where(num_rest > 0, splits + MASS_SPLITS, splits)
        works = split < splits
        if HAS_MASS:  # noqa: SIM102, compile-time and run-time conditions stay apart
            if (split >= SPLITS) & (num_rest > 0):
                num_masses = num_complete if PER_UNIT == 1 else num_complete // PER_UNIT
                mass_of_rest(
                    token * num_kv_heads + head, split - SPLITS, num_masses, flags_ptr, mass_ptr, rest_mass_ptr,
                    max_units, GROUP, GROUP_P, MASS_WIDTH, MASS_SPLITS, PER_UNIT,
                )  # fmt: skip
                works = split >= SPLITS
        if split < splits:
            attend_split(
                split, splits, token, head, limit, num_subtract, query_ptr, kv_ptr, table_ptr,
                part_out_ptr, part_sum_ptr, part + split,
                query_token_stride, query_head_stride, page_stride, head_stride, last_page, num_kv_heads, scale,
                GROUP, C, N, D, DP, PAGE, UNIT, TABLE, TILE, STAGES, RESIDUAL, PHI,
            )  # fmt: skip
        if works:
            tl.debug_barrier()  # every thread's partial sums are written before the arrival is announced
            arrivals = arrivals_ptr + tl.program_id(2) * num_kv_heads + head
            arrived = tl.atomic_add(arrivals, 1, sem="acq_rel")
            if arrived == programs - 1:
                tl.store(arrivals, 0)
                merge_splits(
                    splits, token, head, num_rest, part_out_ptr, part_sum_ptr, part,
                    rest_mass_ptr, read_ptr, read_z_ptr, read_v_ptr, gain_ptr, sink_ptr, exact_weight_ptr,
                    tail_weight_ptr, output_ptr, output_token_stride, output_head_stride, num_kv_heads,
                    residual_scale, norm_eps,
                    GROUP, GROUP_P, C, N, D, DP, UNIT, SPLITS, SLICES, MASS_SPLITS, RESIDUAL, HAS_MASS, DOUBLE_NORM,
                )  # fmt: skip
    else:
        clear_padding(
            split, tl.program_id(2), head, query_start_loc_ptr, num_rows, num_tokens, output_ptr,
            output_token_stride, output_head_stride, GROUP, D, DP,
        )  # fmt: skip


def mass_programs(layer: GpuLayer, tuning: Tuning) -> int:
    """Programs a (token, kv head) that add up the mass of what is not selected."""
    return tuning.mass_splits if layer.has_mass else 0


def attend_constants(layer: GpuLayer, sizes: DecodeSizes, tuning: Tuning) -> dict[str, Any]:
    """What the launches that attend and combine have in common, whichever executor's they are."""
    return {
        "GROUP": layer.group,
        "GROUP_P": layer.group_p,
        "C": sizes.columns,
        "N": sizes.attend_n,
        "D": layer.head_size,
        "DP": layer.dp,
        "PAGE": layer.params.page_size,
        "TABLE": sizes.table,
        "TILE": tuning.tile,
        "STAGES": tuning.attend_stages,
        "SLICES": sizes.slices,
        "RESIDUAL": RESIDUAL_CODES[layer.params.residual],
        "PHI": layer.phi,
        "HAS_MASS": layer.has_mass,
        "MASS_SPLITS": mass_programs(layer, tuning),
        "MASS_WIDTH": max(64, 1024 // layer.group_p),
        "DOUBLE_NORM": layer.params.combine == "double_rmsnorm",
        "num_warps": tuning.attend_warps,
    }
