"""The recurrent state at the beginning of every page of a prefill (docs/design.md, 6), and behind the last of them.

Plain reference: `reference.recurrent_state` over the complete pages below a page. Source: residual linear attention, SPLA
(arXiv 2601.22379). The state's blocks are brought up to the first tile's page by the rule that decode follows (`trusted_pages`);
then each page's state is put aside before the page is folded.

Floor, bytes a page and kv head: `2 B d` elements read, `(F_S + F_z / d) d` float32 written. FLOP: `2 B F_S d`.
"""

import triton
import triton.language as tl

from .triton_state import state_row_offset, trusted_pages


@triton.jit
def prefill_state_kernel(
    kv_ptr,
    kv_int_ptr,
    state_ptr,
    state_int_ptr,
    block_table_ptr,
    state_table_ptr,
    runs_ptr,  # [runs, 3] int32: first tile, tiles, row
    tiles_ptr,  # [tiles, 4] int32
    tile_state_ptr,  # [tiles] int32: place in `states_ptr` of the state at a tile's page; ascending within a run
    states_ptr,  # [states, G, S_ROWS + 1, D] float32
    arrivals_ptr,  # [runs, G] int32, zero between launches
    num_kv_heads,
    page_stride,
    head_stride,
    int_page_stride,
    int_head_stride,
    block_stride,
    block_head_stride,
    block_table_stride,
    state_table_stride,
    last_page,
    MAGIC: tl.constexpr,
    STAMP_WORD: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BODY: tl.constexpr,
    PARTS: tl.constexpr,
    SLICE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    S_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    LINEAR: tl.constexpr,
):
    """Grid (PARTS, G, runs)."""
    part = tl.program_id(0)
    head = tl.program_id(1)
    run = tl.program_id(2)
    first_tile = tl.load(runs_ptr + run * 3).to(tl.int64)
    last_tile = first_tile + tl.load(runs_ptr + run * 3 + 1) - 1
    row = tl.load(runs_ptr + run * 3 + 2).to(tl.int64)
    first_page = tl.load(tiles_ptr + first_tile * 4 + 3) // PAGE
    target = tl.load(tiles_ptr + last_tile * 4 + 3) // PAGE
    first_state = tl.load(tile_state_ptr + first_tile)
    pages = block_table_ptr + row * block_table_stride
    blocks = state_table_ptr + row * state_table_stride
    dtype = kv_ptr.dtype.element_ty
    state = state_ptr + head * block_head_stride
    feature = part * SLICE + tl.arange(0, SLICE)
    in_slice = feature < D
    column = tl.arange(0, DP)
    in_head = column < D
    token = tl.arange(0, TILE)
    s_mask = in_slice[:, None] & in_head[None, :]
    s_rows = state + state_row_offset(blocks, feature, block_stride, BODY, D, in_slice)[:, None] + column[None, :]
    Z_ROW: tl.constexpr = D if LINEAR else D + 1
    z_block = tl.maximum(tl.load(blocks + Z_ROW // BODY), 0).to(tl.int64)
    z_row = state + z_block * block_stride + (1 + Z_ROW % BODY) * D + feature  # [SLICE]
    v_block = tl.maximum(tl.load(blocks + D // BODY), 0).to(tl.int64)
    v_row = state + v_block * block_stride + (1 + D % BODY) * D + column  # [DP]

    covered = trusted_pages(
        kv_int_ptr, state_int_ptr, pages, blocks, head, first_page, int_page_stride, int_head_stride,
        block_stride, block_head_stride, MAGIC, STAMP_WORD, NUM_BLOCKS,
    )  # fmt: skip
    # Old bytes must not be used where they are not trusted: they may be NaN, and 0 * NaN is NaN.
    kept = tl.where(covered > 0, D, 0)
    s = tl.load(s_rows, mask=(feature < kept)[:, None] & in_head[None, :], other=0.0)  # [SLICE, DP]
    z = tl.load(z_row, mask=feature < kept, other=0.0)
    sum_v = tl.load(v_row, mask=column < (0 if LINEAR else kept), other=0.0)
    states = states_ptr + (first_state.to(tl.int64) * num_kv_heads + head) * (S_ROWS + 1) * D
    begin = tl.minimum(covered, first_page)
    # Page ids are fetched a step ahead: a load that waits for another load is not pipelined well.
    page = tl.load(pages + begin)
    for index in tl.range(begin, target, num_stages=STAGES):
        out = states + (index - first_page).to(tl.int64) * num_kv_heads * (S_ROWS + 1) * D
        put = tl.where(index >= first_page, D, 0)
        tl.store(out + feature[:, None] * D + column[None, :], s, mask=s_mask & (feature < put)[:, None])
        tl.store(out + S_ROWS * D + feature, z, mask=feature < put)
        if not LINEAR:
            tl.store(out + D * D + column, sum_v, mask=column < tl.where(part == 0, put, 0))
        base = kv_ptr + tl.minimum(tl.maximum(page, 0), last_page).to(tl.int64) * page_stride + head * head_stride
        page = tl.load(pages + tl.minimum(index + 1, target - 1))
        for first in tl.static_range(0, PAGE, TILE):
            rows = base + (first + token) * 2 * D  # [TILE]
            v = tl.load(rows[:, None] + D + column[None, :], mask=in_head[None, :], other=0.0)  # [TILE, DP]
            if LINEAR:
                k_all = tl.load(rows[None, :] + column[:, None], mask=in_head[:, None], other=0.0)
                k_all = tl.where(in_head[:, None], k_all.to(tl.float32), float("-inf"))  # [DP, TILE]
                top = tl.max(k_all, axis=0)
                norm = tl.sum(tl.exp(k_all - top[None, :]), axis=0)
            k = tl.load(rows[None, :] + feature[:, None], mask=in_slice[:, None], other=0.0)
            if LINEAR:
                k = (tl.exp(k.to(tl.float32) - top[None, :]) / norm[None, :]).to(dtype)
                k = tl.where(in_slice[:, None], k, 0.0).to(dtype)  # [SLICE, TILE]
            else:
                sum_v += tl.sum(v.to(tl.float32), axis=0)
            s = tl.dot(k, v, s)
            z += tl.sum(k.to(tl.float32), axis=1)
    out = states + (target - first_page).to(tl.int64) * num_kv_heads * (S_ROWS + 1) * D
    tl.store(out + feature[:, None] * D + column[None, :], s, mask=s_mask)
    tl.store(out + S_ROWS * D + feature, z, mask=in_slice)
    if (part == 0) & (not LINEAR):
        tl.store(out + D * D + column, sum_v, mask=in_head)
    if covered < target:
        tl.store(s_rows, s, mask=s_mask)
        tl.store(z_row, z, mask=in_slice)
        if (part == 0) & (not LINEAR):
            tl.store(v_row, sum_v, mask=in_head)
        # All slices have read the headers before the last of them arrives here, so it may replace them.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals_ptr + run * num_kv_heads + head, 1, sem="acq_rel")
        if arrived == PARTS - 1:
            tl.store(arrivals_ptr + run * num_kv_heads + head, 0)
            word = tl.arange(0, 8)
            last = tl.maximum(tl.load(pages + target - 1), 0).to(tl.int64)
            stamp = tl.load(
                kv_int_ptr + last * int_page_stride + head * int_head_stride + STAMP_WORD + word - 2,
                mask=(word >= 2) & (word < 6),
                other=0,
            )
            for ordinal in tl.static_range(NUM_BLOCKS):
                block = tl.maximum(tl.load(blocks + ordinal), 0).to(tl.int64)
                header = tl.where(word == 1, target, tl.where(word == 6, ordinal, stamp))
                header = tl.where(word == 0, MAGIC, header)
                tl.store(state_int_ptr + block * block_stride + head * block_head_stride + word, header)
