"""What a tile left out, and the output: the state of all complete pages less the selected blocks, read by each token.

Plain reference: `reference.recurrent_state`, `residual_direction`, `combine_shared_normalizer`, `rms_norm`, over tiles
(`algorithm/tiles.py`). Source: residual linear attention, SPLA (arXiv 2601.22379). A tile's rest is the same for all of
its tokens, so that the difference of sums is made once a tile and kv head, in float32, and then multiplied with its
queries.

Floor: `2 d F` FLOP a selected token, tile and kv head; `4 d` bytes read for each of the former.
"""

import triton
import triton.language as tl

from ..feature_maps import key_features, map_features
from ..residual import LINEAR, NO_RESIDUAL, REGRESSION
from ..sinks import load_sinks
from ..statistics import LOG2E
from .score import add_log2
from .tiles import load_tile


@triton.jit
def prompt_rest_kernel(
    kv_ptr,
    groups_ptr,  # [groups, 4] int32
    group_state_ptr,  # [groups] int32: where the state at a candidate tile's page is
    table_ptr,  # [G, tiles, SLOTS] int32
    count_ptr,  # [G, tiles] int32
    state_ptr,  # [states, G, S_ROWS + 1, D] float32: state at the beginning of a page; last z
    rest_ptr,  # [tiles, G, 2, D, D]: means over the rest of `feature v^T` (of `regression` about the means, so that no
    # large numbers cancel in products with it), in two parts of the cache dtype, which together have twice its digits
    sums_ptr,  # [tiles, G, 2, D] float32: sums over the rest of features, and of values for `regression`
    ADDRESS: tl.constexpr,  # elements of a unit of address
    C: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    KEYS: tl.constexpr,  # at a time
    SLICE: tl.constexpr,  # features of a program
    S_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    PHI: tl.constexpr,
):
    """Grid (tiles, G, DP / SLICE)."""
    dtype = kv_ptr.dtype.element_ty
    tile = tl.program_id(0).to(tl.int64)
    num_tiles = tl.num_programs(0)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    count = tl.load(count_ptr + head * num_tiles + tile)
    if count < 0:
        return  # a tile without a token
    group = tile // (C // T)
    taken = count * BLOCK
    num_rest = tl.load(groups_ptr + group * 4 + 3) // PAGE * PAGE - taken
    table = table_ptr + (head * num_tiles + tile) * SLOTS
    state = tl.load(group_state_ptr + group).to(tl.int64)
    state_base = state_ptr + (state * num_heads + head) * (S_ROWS + 1) * D
    key = tl.arange(0, KEYS)
    column = tl.arange(0, DP)
    in_head = column < D
    feature = tl.program_id(2) * SLICE + tl.arange(0, SLICE)
    of_key = feature < D
    s_mask = of_key[:, None] & in_head[None, :]
    # Selected less all: sums begin with what they are subtracted from, so that registers need not hold both.
    s = -tl.load(state_base + feature[:, None] * D + column[None, :], mask=s_mask, other=0.0)  # [SLICE, DP]
    z = tl.load(state_base + S_ROWS * D + feature, mask=of_key, other=0.0)
    # Sums of keys and values are products as well: where anything else reads what a product reads, Triton 3.6 forgets
    # that `wgmma` runs on, and copies the next keys over it.
    ones = tl.full([KEYS, 16], 1.0, dtype=dtype)
    sums_k = tl.zeros([SLICE, 16], dtype=tl.float32) - z[:, None]  # every column is the sum of the features
    sums_v = tl.zeros([DP, 16], dtype=tl.float32)  # and here that of the values
    if PHI is None:
        sums_v -= tl.load(state_base + D * D + column, mask=in_head, other=0.0)[:, None]
    # Addresses are fetched a step ahead: a load that waits for another load is not pipelined well.
    address = tl.load(table + key // BLOCK, mask=key < taken, other=0)
    for start in tl.range(0, taken, KEYS, num_stages=STAGES):
        at = start + key
        rows = kv_ptr + address.to(tl.int64) * ADDRESS + at % BLOCK * (2 * D)  # [KEYS]
        following = at + KEYS
        address = tl.load(table + following // BLOCK, mask=following < taken, other=0)
        there = at < taken
        v = tl.load(rows[:, None] + D + column[None, :], mask=there[:, None] & in_head[None, :], other=0.0)
        if PHI is not None:
            k = key_features(PHI, rows, feature, of_key, column, in_head)  # [SLICE, KEYS]
            k = tl.where(there[None, :], k, 0.0).to(dtype)
        else:
            k = tl.load(rows[None, :] + feature[:, None], mask=there[None, :] & of_key[:, None], other=0.0)
            sums_v = tl.dot(tl.trans(v), ones, sums_v)
        s = tl.dot(k, v, s)
        sums_k = tl.dot(k, ones, sums_k)
    z = -tl.max(sums_k, axis=1)
    share = 1.0 / tl.maximum(num_rest, 1).to(tl.float32)
    s *= -share
    pair = tile * num_heads + head
    if PHI is None:
        sum_v = -tl.max(sums_v, axis=1)
        s -= (z * share)[:, None] * (sum_v * share)[None, :]
        tl.store(sums_ptr + (pair * 2 + 1) * D + column, sum_v, mask=in_head)
    tl.store(sums_ptr + pair * 2 * D + feature, z, mask=of_key)
    high = s.to(dtype)
    rest = rest_ptr + pair * 2 * D * D + feature[:, None] * D + column[None, :]
    tl.store(rest, high, mask=s_mask)
    tl.store(rest + D * D, (s - high.to(tl.float32)).to(dtype), mask=s_mask)


@triton.jit(do_not_specialize=["num_tokens_of_pass", "mass_splits"])
def prompt_combine_kernel(
    query_ptr,
    groups_ptr,  # [groups, 4] int32
    places_ptr,  # [groups] int32: place of a candidate tile's first token among those of the pass
    count_ptr,  # [G, tiles] int32
    rest_ptr,  # [tiles, G, 2, D, D]
    sums_ptr,  # [tiles, G, 2, D] float32
    mass_ptr,  # [tiles, G, mass_splits, T * GROUP_P] float32: log2 of the mass of the rest, over UNIT
    exact_ptr,  # [G, tokens of the pass, GROUP, D]
    lse_ptr,  # [GROUP, G, tokens of the pass] float32, natural log
    sink_ptr,  # [H]; None without sinks
    gain_ptr,  # [H] float32
    exact_weight_ptr,  # [H, D] float32
    tail_weight_ptr,  # [H, D] float32
    output_ptr,
    query_token_stride,
    query_head_stride,
    output_token_stride,
    output_head_stride,
    num_tokens_of_pass,
    mass_splits,
    scale,
    residual_scale,
    norm_eps,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    TM: tl.constexpr,  # tokens a program
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    FEATURES: tl.constexpr,  # at a time; of `linear` all
    RESIDUAL: tl.constexpr,
    PHI: tl.constexpr,
    DOUBLE_NORM: tl.constexpr,
):
    """Grid (tiles * T / TM, G)."""
    ROWS: tl.constexpr = TM * GROUP_P
    dtype = exact_ptr.dtype.element_ty
    tile = (tl.program_id(0) // (T // TM)).to(tl.int64)
    num_tiles = tl.num_programs(0) // (T // TM)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    group, first_token, begin, num_tokens, base = load_tile(groups_ptr, tile, C, T)
    m = tl.arange(0, ROWS)
    member = m % GROUP_P
    in_group = member < GROUP
    head_row = head * GROUP + tl.minimum(member, GROUP - 1)
    token = tl.program_id(0) % (T // TM) * TM + m // GROUP_P
    exists = (token < num_tokens) & in_group
    if tl.program_id(0) % (T // TM) * TM >= num_tokens:
        return
    place = tl.load(places_ptr + group) + begin
    column = tl.arange(0, DP)
    in_head = column < D
    num_rest = base // PAGE * PAGE - tl.load(count_ptr + head * num_tiles + tile) * BLOCK
    has_rest = num_rest > 0
    read = tl.zeros([ROWS, DP], dtype=tl.float32)
    read_z = tl.zeros([ROWS], dtype=tl.float32)
    if RESIDUAL != NO_RESIDUAL:
        rest = rest_ptr + (tile * num_heads + head) * (2 * D * D)
        sums = sums_ptr + (tile * num_heads + head) * (2 * D)
        query = query_ptr + (first_token + begin + token).to(tl.int64) * query_token_stride
        query += head_row * query_head_stride  # [ROWS]
        # Some features at a time, so that programs share a multiprocessor.
        for first in tl.static_range(0, DP, FEATURES):
            feature = first + tl.arange(0, FEATURES)
            mask = exists[:, None] & (feature < D)[None, :]
            features = tl.load(query[:, None] + feature[None, :], mask=mask, other=0.0).to(dtype)
            if RESIDUAL == LINEAR:
                features = map_features(PHI, features.to(tl.float32) * scale, in_head[None, :], 1).to(dtype)
                z = tl.load(sums + feature, mask=feature < D, other=0.0)
                read_z += tl.sum(features.to(tl.float32) * z[None, :], axis=1)
            mask = (feature < D)[:, None] & in_head[None, :]
            at = rest + feature[:, None] * D + column[None, :]
            read = tl.dot(features, tl.load(at, mask=mask, other=0.0), read)
            read = tl.dot(features, tl.load(at + D * D, mask=mask, other=0.0), read)

    exact_row = ((head.to(tl.int64) * num_tokens_of_pass + place + token) * GROUP + member) * D
    mask = exists[:, None] & in_head[None, :]
    out = tl.load(exact_ptr + exact_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    lse_at = lse_ptr + (member * num_heads + head).to(tl.int64) * num_tokens_of_pass + place + token
    top = tl.load(lse_at, mask=exists, other=0.0) * LOG2E
    if sink_ptr is not None:
        # A token without a value.
        with_sink = add_log2(top, load_sinks(sink_ptr, head_row, in_group) * LOG2E)
        out = out * tl.exp2(top - with_sink)[:, None]
        top = with_sink
    scaled = 1.0 / tl.maximum(num_rest, 1).to(tl.float32)
    if RESIDUAL == REGRESSION:
        sum_v = tl.load(sums + D + column, mask=in_head, other=0.0)
        tail = (sum_v * scaled)[None, :] + (residual_scale * scale) * read
    elif RESIDUAL == LINEAR:
        tail = read * tl.maximum(num_rest, 1).to(tl.float32)
        if not DOUBLE_NORM:
            tail = tail / tl.maximum(read_z, 1e-30)[:, None]
    if DOUBLE_NORM:
        weight_row = head_row[:, None] * D + column[None, :]
        variance = tl.sum(tl.where(mask, out * out, 0.0), axis=1) / D
        out = out / tl.sqrt(variance + norm_eps)[:, None]
        out *= tl.load(exact_weight_ptr + weight_row, mask=mask, other=0.0)
        if RESIDUAL != NO_RESIDUAL:
            tail = tl.where(has_rest & in_head[None, :], tail, 0.0)
            variance = tl.sum(tail * tail, axis=1) / D
            tail = tail / tl.sqrt(variance + norm_eps)[:, None]
            out += tail * tl.load(tail_weight_ptr + weight_row, mask=mask, other=0.0)
    elif RESIDUAL != NO_RESIDUAL:
        mass_row = mass_ptr + (tile * num_heads + head) * mass_splits * (T * GROUP_P) + token * GROUP_P + member
        mass = tl.load(mass_row, mask=exists, other=0.0)
        for other in tl.range(1, mass_splits, num_stages=1):
            # -inf where a split has nothing left out.
            mass = add_log2(tl.maximum(mass, -1e30), tl.load(mass_row + other * (T * GROUP_P), mask=exists, other=0.0))
        gain = tl.load(gain_ptr + head_row)
        mass = tl.where(has_rest & exists, mass + tl.log2(1.0 * UNIT) + tl.log2(gain), float("-inf"))
        larger = tl.maximum(top, mass)
        of_exact = tl.exp2(top - larger)
        of_tail = tl.exp2(mass - larger)
        total = of_exact + of_tail
        out = (out * of_exact[:, None] + tl.where(has_rest, tail, 0.0) * of_tail[:, None]) / total[:, None]
    output = output_ptr + (first_token + begin + token).to(tl.int64) * output_token_stride
    output += head_row * output_head_stride
    tl.store(output[:, None] + column[None, :], out.to(output_ptr.dtype.element_ty), mask=mask)
