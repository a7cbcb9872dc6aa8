"""The recurrent state at the beginning of every page of a prefill (docs/design.md, 6), and behind the last of them.

Plain reference: `reference.recurrent_state` over the complete pages below a page. Source: residual linear attention,
SPLA (arXiv 2601.22379). The state's blocks are brought up to the first tile's page by the rule that decode follows
(`trusted_pages`); then each page's state is put aside before the page is folded, one page after the other.

Rows that attend to everything only have their state brought up to date, so that their first decode step finds it. It
is a sum over pages, which are cut into splits: `fold_pages_kernel` sums each of them, and `fold_sum_kernel` adds the
sums up, in the order of the splits whichever program is first. How many there are depends on all rows of the step.

Floor, bytes a page and kv head: `2 B d` elements read, `(F_S + F_z / d) d` float32 written where states are put aside.
FLOP: `2 B F_S d`.
"""

import triton
import triton.language as tl

from ..feature_maps import key_features
from ..state import state_row_offset, trusted_pages, write_headers


@triton.jit(do_not_specialize=["block_table_stride", "state_table_stride", "last_page"])
def prefill_state_kernel(
    kv_ptr,
    kv_int_ptr,
    state_ptr,
    state_int_ptr,
    block_table_ptr,
    state_table_ptr,
    runs_ptr,  # [runs, 3] int32: first tile, tiles, row
    groups_ptr,  # [groups, 4] int32
    group_state_ptr,  # [groups] int32: place in `states_ptr` of the state at a group's page; ascending within a run
    states_ptr,  # [states, G, S_ROWS + 1, D] float32; the last row is z
    arrivals_ptr,  # [runs, G] int32, zero between launches
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
    SLICES: tl.constexpr,
    SLICE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    S_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    PHI: tl.constexpr,
):
    """Grid (SLICES, G, runs)."""
    slice_index = tl.program_id(0)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    run = tl.program_id(2)
    first_group = tl.load(runs_ptr + run * 3).to(tl.int64)
    last_group = first_group + tl.load(runs_ptr + run * 3 + 1) - 1
    row = tl.load(runs_ptr + run * 3 + 2).to(tl.int64)
    first_page = tl.load(groups_ptr + first_group * 4 + 3) // PAGE
    target = tl.load(groups_ptr + last_group * 4 + 3) // PAGE
    first_state = tl.load(group_state_ptr + first_group)
    pages = block_table_ptr + row * block_table_stride
    blocks = state_table_ptr + row * state_table_stride
    dtype = kv_ptr.dtype.element_ty
    state = state_ptr + head * block_head_stride
    # `regression` has a constant feature behind those of the key: its row of S is the sum of the values. The last
    # program has it as well, and keys in the place of the values: its row is z, which lies behind those of S.
    of_z = (PHI is None) & (slice_index == SLICES - 1)
    feature = tl.where(of_z, S_ROWS, slice_index * SLICE) + tl.arange(0, SLICE)
    rows_end = tl.where(of_z, S_ROWS + 1, S_ROWS)
    in_slice = feature < rows_end
    of_key = feature < D
    column = tl.arange(0, DP)
    in_head = column < D
    values_at = column + tl.where(of_z, 0, D)
    token = tl.arange(0, TILE)
    s_rows = state + state_row_offset(blocks, feature, block_stride, BODY, D, in_slice)[:, None] + column[None, :]
    z_block = tl.maximum(tl.load(blocks + S_ROWS // BODY), 0).to(tl.int64)
    z_row = state + z_block * block_stride + (1 + S_ROWS % BODY) * D + feature  # [SLICE], of a feature map

    covered = trusted_pages(
        kv_int_ptr, state_int_ptr, pages, blocks, head, first_page, int_page_stride, int_head_stride,
        block_stride, block_head_stride, MAGIC, STAMP_WORD, NUM_BLOCKS,
    )  # fmt: skip
    # Old bytes must not be used where they are not trusted: they may be NaN, and 0 * NaN is NaN.
    kept = feature < tl.where(covered > 0, rows_end, 0)
    s = tl.load(s_rows, mask=kept[:, None] & in_head[None, :], other=0.0)  # [SLICE, DP]
    z = tl.zeros([SLICE], dtype=tl.float32)
    if PHI is not None:
        z = tl.load(z_row, mask=of_key & kept, other=0.0)
    states = states_ptr + (first_state.to(tl.int64) * num_heads + head) * (S_ROWS + 1) * D
    begin = tl.minimum(covered, first_page)
    # Page ids are fetched a step ahead: a load that waits for another load is not pipelined well.
    page = tl.load(pages + begin)
    for index in tl.range(begin, target, num_stages=STAGES):
        out = states + (index - first_page).to(tl.int64) * num_heads * (S_ROWS + 1) * D
        put = feature < tl.where(index >= first_page, rows_end, 0)
        tl.store(out + feature[:, None] * D + column[None, :], s, mask=put[:, None] & in_head[None, :])
        if PHI is not None:
            tl.store(out + S_ROWS * D + feature, z, mask=put & of_key)
        base = kv_ptr + tl.minimum(tl.maximum(page, 0), last_page).to(tl.int64) * page_stride + head * head_stride
        page = tl.load(pages + tl.minimum(index + 1, target - 1))
        for first in tl.static_range(0, PAGE, TILE):
            rows = base + (first + token) * 2 * D  # [TILE]
            v = tl.load(rows[:, None] + values_at[None, :], mask=in_head[None, :], other=0.0)  # [TILE, DP]
            if PHI is not None:
                k = key_features(PHI, rows, feature, of_key, column, in_head)  # [SLICE, TILE]
                z += tl.sum(k.to(tl.float32), axis=1)
            else:
                k = tl.load(rows[None, :] + feature[:, None], mask=of_key[:, None], other=0.0)
                k = tl.where(of_key[:, None], k, 1.0).to(dtype)
            s = tl.dot(k, v, s)
    out = states + (target - first_page).to(tl.int64) * num_heads * (S_ROWS + 1) * D
    tl.store(out + feature[:, None] * D + column[None, :], s, mask=in_slice[:, None] & in_head[None, :])
    if PHI is not None:
        tl.store(out + S_ROWS * D + feature, z, mask=of_key)
    if covered < target:
        tl.store(s_rows, s, mask=in_slice[:, None] & in_head[None, :])
        if PHI is not None:
            tl.store(z_row, z, mask=of_key)
        write_headers(
            arrivals_ptr + run * num_heads + head, SLICES, kv_int_ptr, state_int_ptr, pages, blocks, head, target,
            int_page_stride, int_head_stride, block_stride, block_head_stride, MAGIC, STAMP_WORD, NUM_BLOCKS,
        )  # fmt: skip


@triton.jit
def _add_to_rows(rows, x, mask, covered):
    """Add to stored float32; old bytes must not be used where they are not trusted: they may be NaN."""
    if covered > 0:
        x += tl.load(rows, mask=mask, other=0.0)
    tl.store(rows, x, mask=mask)


@triton.jit
def _add_to_state(
    s, z, state, blocks, feature, of_s, of_key, column, block_stride, covered,
    D: tl.constexpr, BODY: tl.constexpr, S_ROWS: tl.constexpr,
):  # fmt: skip
    """Add to the rows `feature` of S where `of_s`, `s [SLICE, DP]`, and to their z, `z [SLICE]`."""
    s_rows = state + state_row_offset(blocks, feature, block_stride, BODY, D, of_s)[:, None] + column[None, :]
    _add_to_rows(s_rows, s, of_s[:, None] & (column < D)[None, :], covered)
    z_block = tl.maximum(tl.load(blocks + S_ROWS // BODY), 0).to(tl.int64)
    _add_to_rows(state + z_block * block_stride + (1 + S_ROWS % BODY) * D + feature, z, of_key, covered)


@triton.jit(do_not_specialize=["block_table_stride", "state_table_stride", "last_page"])
def fold_pages_kernel(
    kv_ptr,
    kv_int_ptr,
    state_ptr,
    state_int_ptr,
    block_table_ptr,
    state_table_ptr,
    folds_ptr,  # [folds, 4] int32: row, its complete pages, splits, place of the first split's sums
    items_ptr,  # [items, 2] int32: fold, split
    partial_ptr,  # [places, G, S_ROWS + 1, D] float32: sums over a split's pages; the last row is z
    arrivals_ptr,  # [folds, G] int32, zero between launches
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
    SLICES: tl.constexpr,
    SLICE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    S_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    PHI: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid (SLICES, G, items). The sums of a row's only split go to the state at once."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        # Behind the wait: `fold_sum_kernel` knows that everything but this launch has ended.
        tl.extra.cuda.gdc_launch_dependents()
    slice_index = tl.program_id(0)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    fold = tl.load(items_ptr + tl.program_id(2) * 2)
    split = tl.load(items_ptr + tl.program_id(2) * 2 + 1)
    row = tl.load(folds_ptr + fold * 4).to(tl.int64)
    target = tl.load(folds_ptr + fold * 4 + 1)
    splits = tl.load(folds_ptr + fold * 4 + 2)
    place = tl.load(folds_ptr + fold * 4 + 3) + split
    pages = block_table_ptr + row * block_table_stride
    blocks = state_table_ptr + row * state_table_stride
    dtype = kv_ptr.dtype.element_ty
    feature = slice_index * SLICE + tl.arange(0, SLICE)
    of_key = feature < D
    column = tl.arange(0, DP)
    in_head = column < D
    token = tl.arange(0, TILE)
    covered = trusted_pages(
        kv_int_ptr, state_int_ptr, pages, blocks, head, target, int_page_stride, int_head_stride,
        block_stride, block_head_stride, MAGIC, STAMP_WORD, NUM_BLOCKS,
    )  # fmt: skip
    share = tl.cdiv(target - covered, splits)
    begin = tl.minimum(covered + split * share, target)
    end = tl.minimum(begin + share, target)
    s = tl.zeros([SLICE, DP], dtype=tl.float32)
    # Sums of keys and values are products as well, of the same kind: where anything else reads what a product reads,
    # Triton 3.6 forgets that `wgmma` runs on, and copies the next page over it.
    ROWS: tl.constexpr = 64 if SLICE >= 64 else 16
    v_ones = tl.full([ROWS, TILE], 1.0, dtype=dtype)
    k_ones = tl.full([TILE, 16], 1.0, dtype=dtype)
    sums_v = tl.zeros([ROWS, DP], dtype=tl.float32)  # every row is the sum of the values
    sums_k = tl.zeros([SLICE, 16], dtype=tl.float32)  # every column is z
    TILES: tl.constexpr = PAGE // TILE
    page = tl.load(pages + tl.minimum(begin, target - 1))  # fetched a step ahead, as above
    for index in tl.range(begin * TILES, end * TILES, num_stages=STAGES):
        base = kv_ptr + tl.minimum(tl.maximum(page, 0), last_page).to(tl.int64) * page_stride + head * head_stride
        page = tl.load(pages + tl.minimum((index + 1) // TILES, target - 1))
        rows = base + (index % TILES * TILE + token) * 2 * D  # [TILE]
        v = tl.load(rows[:, None] + D + column[None, :], mask=in_head[None, :], other=0.0)  # [TILE, DP]
        if PHI is not None:
            k = key_features(PHI, rows, feature, of_key, column, in_head)  # [SLICE, TILE]
        else:
            k = tl.load(rows[None, :] + feature[:, None], mask=of_key[:, None], other=0.0)
            sums_v = tl.dot(v_ones, v, sums_v)
        s = tl.dot(k, v, s)
        sums_k = tl.dot(k, k_ones, sums_k)
    z = tl.max(sums_k, axis=1)  # [SLICE]
    sum_v = tl.max(sums_v, axis=0)  # [DP]
    of_s = of_key[:, None] & in_head[None, :]
    of_v = column < tl.where(slice_index == 0, D, 0)
    if splits == 1:
        if covered < target:
            state = state_ptr + head * block_head_stride
            _add_to_state(
                s, z, state, blocks, feature, of_key, of_key, column, block_stride, covered, D, BODY, S_ROWS,
            )  # fmt: skip
            if PHI is None:
                v_block = tl.maximum(tl.load(blocks + D // BODY), 0).to(tl.int64)
                _add_to_rows(state + v_block * block_stride + (1 + D % BODY) * D + column, sum_v, of_v, covered)
            write_headers(
                arrivals_ptr + fold * num_heads + head, SLICES, kv_int_ptr, state_int_ptr, pages, blocks, head, target,
                int_page_stride, int_head_stride, block_stride, block_head_stride, MAGIC, STAMP_WORD, NUM_BLOCKS,
            )  # fmt: skip
    elif begin < end:
        partial = partial_ptr + (place * num_heads + head).to(tl.int64) * (S_ROWS + 1) * D
        tl.store(partial + feature[:, None] * D + column[None, :], s, mask=of_s)
        tl.store(partial + S_ROWS * D + feature, z, mask=of_key)
        if PHI is None:
            tl.store(partial + D * D + column, sum_v, mask=of_v)


@triton.jit(do_not_specialize=["block_table_stride", "state_table_stride"])
def fold_sum_kernel(
    kv_int_ptr,
    state_ptr,
    state_int_ptr,
    block_table_ptr,
    state_table_ptr,
    folds_ptr,  # [folds, 4] int32: row, its complete pages, splits, place of the first split's sums
    partial_ptr,  # [places, G, S_ROWS + 1, D] float32
    arrivals_ptr,  # [folds, G] int32, zero between launches
    int_page_stride,
    int_head_stride,
    block_stride,
    block_head_stride,
    block_table_stride,
    state_table_stride,
    MAGIC: tl.constexpr,
    STAMP_WORD: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BODY: tl.constexpr,
    SLICES: tl.constexpr,
    SLICE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    S_ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid (SLICES, G, folds). Rows of one split are left alone."""
    slice_index = tl.program_id(0)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    fold = tl.program_id(2)
    row = tl.load(folds_ptr + fold * 4).to(tl.int64)
    target = tl.load(folds_ptr + fold * 4 + 1)
    splits = tl.load(folds_ptr + fold * 4 + 2)
    place = tl.load(folds_ptr + fold * 4 + 3)
    pages = block_table_ptr + row * block_table_stride
    blocks = state_table_ptr + row * state_table_stride
    covered = trusted_pages(
        kv_int_ptr, state_int_ptr, pages, blocks, head, target, int_page_stride, int_head_stride,
        block_stride, block_head_stride, MAGIC, STAMP_WORD, NUM_BLOCKS,
    )  # fmt: skip
    if DEPENDENT:
        # For the sums: of rows with several splits `fold_pages_kernel` writes nothing that was read until here.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if (covered < target) & (splits > 1):
        feature = slice_index * SLICE + tl.arange(0, SLICE)
        in_slice = feature < S_ROWS
        of_key = feature < D
        column = tl.arange(0, DP)
        partial = partial_ptr + (place * num_heads + head).to(tl.int64) * (S_ROWS + 1) * D
        share = tl.cdiv(target - covered, splits)
        filled = tl.cdiv(target - covered, share)  # the splits behind them had no page and wrote nothing
        s = tl.zeros([SLICE, DP], dtype=tl.float32)
        z = tl.zeros([SLICE], dtype=tl.float32)
        for first in tl.range(0, filled, 8):
            for i in tl.static_range(8):  # so that eight are on their way at a time
                end = tl.where(first + i < filled, S_ROWS, 0)
                of_split = partial + (first + i) * num_heads * (S_ROWS + 1) * D
                s_mask = (feature < end)[:, None] & (column < D)[None, :]
                s += tl.load(of_split + feature[:, None] * D + column[None, :], mask=s_mask, other=0.0)
                z += tl.load(of_split + S_ROWS * D + feature, mask=of_key & (feature < end), other=0.0)
        state = state_ptr + head * block_head_stride
        _add_to_state(
            s, z, state, blocks, feature, in_slice, of_key, column, block_stride, covered, D, BODY, S_ROWS,
        )  # fmt: skip
        write_headers(
            arrivals_ptr + fold * num_heads + head, SLICES, kv_int_ptr, state_int_ptr, pages, blocks, head, target,
            int_page_stride, int_head_stride, block_stride, block_head_stride, MAGIC, STAMP_WORD, NUM_BLOCKS,
        )  # fmt: skip
