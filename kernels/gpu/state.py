"""Fold complete pages into the recurrent state of a request, until the state is valid (docs/design.md, 6).

Plain reference: `reference.recurrent_state` over `reference.key_features` of the complete pages; header rules as in
`VectorisedAttention._fold`. Source: residual linear attention, SPLA (arXiv 2601.22379); the undecayed sum is what makes
subtracting the selected blocks exact. `regression` takes `phi(k) = [k, 1]`.

The program that has a slice of the state at hand also reads it for the row's query tokens (`phi(q) S`, `phi(q) . z`),
beside the scoring and off the path of the attention that follows.

Floor, bytes a row and kv head: one step in `B` reads a page (`2 B d` elements) and reads and writes the state
(`2 (F_S + F_z / d) d` float32); the other steps read `K` headers of 32 bytes. A rebuild from nothing reads all pages.
FLOP: `2 B F_S d` a page.
"""

import triton
import triton.language as tl

from .feature_maps import key_features


@triton.jit
def state_row_offset(table, row, block_stride, BODY: tl.constexpr, D: tl.constexpr, mask):
    """Offsets (float32) of body rows `row` of a request whose blocks `table` points at, within a kv head."""
    block = tl.maximum(tl.load(table + row // BODY, mask=mask, other=0), 0).to(tl.int64)
    return block * block_stride + (1 + row % BODY) * D


@triton.jit
def trusted_pages(
    kv_int_ptr,
    state_int_ptr,
    pages,  # this row's block table
    blocks,  # this row's state table
    head,
    target,
    int_page_stride,
    int_head_stride,
    block_stride,
    block_head_stride,
    MAGIC: tl.constexpr,
    STAMP_WORD: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """Pages that the stored state covers for this very sequence, 0 where it cannot be trusted."""
    word = tl.arange(0, 8)
    first = tl.maximum(tl.load(blocks), 0).to(tl.int64)
    covered = tl.load(state_int_ptr + first * block_stride + head * block_head_stride + 1)
    plausible = (covered > 0) & (covered <= target)
    page = tl.maximum(tl.load(pages + covered - 1, mask=plausible, other=0), 0).to(tl.int64)
    stamp = tl.load(
        kv_int_ptr + page * int_page_stride + head * int_head_stride + STAMP_WORD + word - 2,
        mask=(word >= 2) & (word < tl.where(plausible, 6, 0)),
        other=0,
    )  # [8], words 2 to 5
    wrong = 0
    for ordinal in tl.static_range(NUM_BLOCKS):
        block = tl.maximum(tl.load(blocks + ordinal), 0).to(tl.int64)
        header = tl.load(state_int_ptr + block * block_stride + head * block_head_stride + word)  # [8]
        expected = tl.where(word == 0, MAGIC, tl.where(word == 1, covered, tl.where(word == 6, ordinal, stamp)))
        wrong += tl.sum((header != expected).to(tl.int32), axis=0)
    return tl.where(plausible & (wrong == 0), covered, 0)


@triton.jit
def write_headers(
    arrivals_ptr,  # this row's and head's number of programs that have arrived, zero between launches
    SLICES: tl.constexpr,
    kv_int_ptr,
    state_int_ptr,
    pages,  # this row's block table
    blocks,  # this row's state table
    head,
    target,
    int_page_stride,
    int_head_stride,
    block_stride,
    block_head_stride,
    MAGIC: tl.constexpr,
    STAMP_WORD: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """Say that the stored state covers `target` pages, which `trusted_pages` reads: the last of the `SLICES` programs
    does that each have stored their slice of it."""
    # All of them have read the headers before the last arrives here, so it may replace them.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel")
    if arrived == SLICES - 1:
        tl.store(arrivals_ptr, 0)
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


@triton.jit
def _add_page(
    s, z, sum_v, index, pages, kv, page_stride, feature, in_slice,
    D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, PHI: tl.constexpr,
):  # fmt: skip
    """A slice of the state, and the sum of the values, with the page at `index` of a block table."""
    column = tl.arange(0, DP)
    in_head = column < D
    token = tl.arange(0, TILE)
    base = kv + tl.maximum(tl.load(pages + index), 0).to(tl.int64) * page_stride
    for first in tl.static_range(0, PAGE, TILE):
        rows = base + (first + token) * 2 * D  # [TILE]
        v = tl.load(rows[:, None] + D + column[None, :], mask=in_head[None, :], other=0.0)  # [TILE, DP]
        if PHI is not None:
            k = key_features(PHI, rows, feature, in_slice, column, in_head)  # [SLICE, TILE]
        else:
            k = tl.load(rows[None, :] + feature[:, None], mask=in_slice[:, None], other=0.0)
            sum_v += tl.sum(v.to(tl.float32), axis=0)
        s = tl.dot(k, v, s)
        z += tl.sum(k.to(tl.float32), axis=1)
    return s, z, sum_v


@triton.jit
def _read_slice(q, s, z, scale, PHI: tl.constexpr):
    """`phi(q) S` `[M, DP]` and `phi(q) . z` `[M]` over a slice of the features."""
    # q has few enough digits for tf32, S has not: in two parts the product is exact to float32.
    s_high = (s.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # 10 bits of mantissa
    read = tl.dot(q, s - s_high, tl.dot(q, s_high, input_precision="tf32"), input_precision="tf32")
    read_z = tl.sum(q * z[None, :], axis=1)
    if PHI is None:
        read *= scale
        read_z *= scale
    return read, read_z


@triton.jit
def fold_slice(
    row,
    head,
    slice_index,  # this program has the features slice_index * SLICE .. slice_index * SLICE + SLICE - 1
    query_ptr,
    kv_ptr,
    kv_int_ptr,
    state_ptr,
    state_int_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    block_table_ptr,
    state_table_ptr,
    arrivals_ptr,  # [rows, G] int32, zero between launches
    read_ptr,  # [tokens, G, SLICES, GROUP_P, DP] float32: phi(q) S over this slice's features
    read_z_ptr,  # [tokens, G, SLICES, GROUP_P] float32: phi(q) . z
    read_v_ptr,  # [tokens, G, DP] float32: sum v, for regression
    query_token_stride,
    query_head_stride,
    num_kv_heads,
    page_stride,
    head_stride,
    int_page_stride,
    int_head_stride,
    block_stride,  # float32 (= int32) elements of the state cache
    block_head_stride,
    block_table_stride,
    state_table_stride,
    scale,
    MAGIC: tl.constexpr,
    STAMP_WORD: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BODY: tl.constexpr,  # body rows of a block
    SLICES: tl.constexpr,
    SLICE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    QUERY_LEN: tl.constexpr,  # the most query tokens of a row
    M: tl.constexpr,  # query tokens of a row * GROUP_P, padded for the tensor cores
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    WHOLE: tl.constexpr,  # units of a row up to which all of it is attended to
    TILE: tl.constexpr,
    PHI: tl.constexpr,  # feature map of the linear residual
):
    """Bring one slice of the features of one (row, kv head) up to date; the last slice to finish writes the headers."""
    seq_len = tl.load(seq_lens_ptr + row)
    query_len = tl.load(query_start_loc_ptr + row + 1) - tl.load(query_start_loc_ptr + row)
    target = tl.maximum(seq_len - query_len, 0) // PAGE
    num_pages = (tl.maximum(seq_len, 1) - 1) // PAGE
    reads = (tl.maximum(seq_len, 1) - 1) // UNIT + 1 > WHOLE
    if (target > 0) | reads:
        pages = block_table_ptr + row.to(tl.int64) * block_table_stride
        blocks = state_table_ptr + row.to(tl.int64) * state_table_stride
        dtype = kv_ptr.dtype.element_ty
        state = state_ptr + head * block_head_stride
        feature = slice_index * SLICE + tl.arange(0, SLICE)
        in_slice = feature < D
        column = tl.arange(0, DP)
        in_head = column < D
        s_mask = in_slice[:, None] & in_head[None, :]
        s_offset = state_row_offset(blocks, feature, block_stride, BODY, D, in_slice)
        s_rows = state + s_offset[:, None] + column[None, :]  # [SLICE, DP]
        # z, and for regression sum v before it, follow S.
        Z_ROW: tl.constexpr = D if PHI is not None else D + 1
        z_block = tl.maximum(tl.load(blocks + Z_ROW // BODY), 0).to(tl.int64)
        z_row = state + z_block * block_stride + (1 + Z_ROW % BODY) * D + feature  # [SLICE]
        v_block = tl.maximum(tl.load(blocks + D // BODY), 0).to(tl.int64)
        v_row = state + v_block * block_stride + (1 + D % BODY) * D + column  # [DP]
        # Where the state will be read anyway it is on its way while the headers are checked.
        early = tl.where(reads, D, 0)
        s_early = tl.load(s_rows, mask=(feature < early)[:, None] & in_head[None, :], other=0.0)  # [SLICE, DP]
        z_early = tl.load(z_row, mask=feature < early, other=0.0)  # [SLICE]
        v_early = tl.load(v_row, mask=column < (0 if PHI is not None else early), other=0.0)  # [DP]
        covered = trusted_pages(
            kv_int_ptr, state_int_ptr, pages, blocks, head, target, int_page_stride, int_head_stride,
            block_stride, block_head_stride, MAGIC, STAMP_WORD, NUM_BLOCKS,
        )  # fmt: skip
        if (covered < target) | reads:
            # Old bytes must not be used where they are not trusted: they may be NaN, and 0 * NaN is NaN.
            kept = tl.where(covered > 0, D, 0)
            late = tl.where(reads, 0, kept)
            s = tl.load(s_rows, mask=(feature < late)[:, None] & in_head[None, :], other=0.0)
            s += tl.where((feature < kept)[:, None], s_early, 0.0)
            z = tl.load(z_row, mask=feature < late, other=0.0) + tl.where(feature < kept, z_early, 0.0)
            sum_v = tl.load(v_row, mask=column < (0 if PHI is not None else late), other=0.0)
            sum_v += tl.where(column < kept, v_early, 0.0)
            if covered < target:
                for index in tl.range(covered, target):
                    s, z, sum_v = _add_page(
                        s, z, sum_v, index, pages, kv_ptr + head * head_stride, page_stride, feature, in_slice,
                        D, DP, PAGE, TILE, PHI,
                    )  # fmt: skip
                tl.store(s_rows, s, mask=s_mask)
                tl.store(z_row, z, mask=in_slice)
                if (slice_index == 0) & (PHI is None):
                    tl.store(v_row, sum_v, mask=in_head)
                write_headers(
                    arrivals_ptr + row * num_kv_heads + head, SLICES, kv_int_ptr, state_int_ptr, pages, blocks, head,
                    target, int_page_stride, int_head_stride, block_stride, block_head_stride, MAGIC, STAMP_WORD,
                    NUM_BLOCKS,
                )  # fmt: skip

            if reads:
                first_token = tl.load(query_start_loc_ptr + row)
                m = tl.arange(0, M)
                token_in_row = m // GROUP_P
                member = m % GROUP_P
                exists = (token_in_row < query_len) & (member < GROUP)
                query_row = (first_token + token_in_row).to(tl.int64)
                query = query_ptr + query_row * query_token_stride + (head * GROUP + member) * query_head_stride  # [M]
                q_mask = exists[:, None] & in_slice[None, :]
                q = tl.load(query[:, None] + feature[None, :], mask=q_mask, other=0.0).to(dtype).to(tl.float32)
                if PHI is not None:
                    all_mask = exists[:, None] & in_head[None, :]
                    every = tl.load(query[:, None] + column[None, :], mask=all_mask, other=0.0)
                    every = tl.where(in_head[None, :], every.to(dtype).to(tl.float32) * scale, float("-inf"))
                    q = tl.where(q_mask, PHI(every, q * scale, 1).to(dtype).to(tl.float32), 0.0)
                read, read_z = _read_slice(q, s, z, scale, PHI)  # [M, DP], [M]
                read_v = tl.broadcast_to(sum_v[None, :], [M, DP])
                if QUERY_LEN > 1:  # noqa: SIM102, compile-time and run-time conditions stay apart
                    if num_pages > target:
                        # This step's own tokens complete a page. Those behind it read it too, though it is not stored:
                        # a draft may be rejected.
                        s, z, sum_v = _add_page(
                            s, z, sum_v, target, pages, kv_ptr + head * head_stride, page_stride, feature, in_slice,
                            D, DP, PAGE, TILE, PHI,
                        )  # fmt: skip
                        behind = (seq_len - query_len + token_in_row) // PAGE > target  # [M]
                        more, more_z = _read_slice(q, s, z, scale, PHI)
                        read = tl.where(behind[:, None], more, read)
                        read_z = tl.where(behind, more_z, read_z)
                        read_v = tl.where(behind[:, None], sum_v[None, :], read_v)
                pair = query_row * num_kv_heads + head  # [M]
                out = ((pair * SLICES + slice_index) * GROUP_P + member) * DP
                tl.store(read_ptr + out[:, None] + column[None, :], read, mask=exists[:, None])
                tl.store(read_z_ptr + (pair * SLICES + slice_index) * GROUP_P + member, read_z, mask=exists)
                if (slice_index == 0) & (PHI is None):
                    v_out = read_v_ptr + pair[:, None] * DP + column[None, :]  # [M, DP]
                    once = exists & (member == 0)
                    tl.store(v_out, read_v, mask=once[:, None])
