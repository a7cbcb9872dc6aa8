"""Score every selection block of the complete pages of a row for all heads of a group and all query tokens of the row.

A page has one or several selection blocks of `UNIT` tokens; here and in the kernels that follow they are the units.

Plain reference: `reference.selection_score` and `reference.mass_score`. Sources: `taylor2` SPLA (arXiv 2601.22379),
`cumulant2` COBS (arXiv 2607.09052), `quest` (arXiv 2406.10774), `rem` the log-mean-exp of a random energy model,
`km2-rem` the same for each of two clusters of keys.

Floor, bytes a unit and kv head: `width` elements of statistics, once for all heads and tokens of the group, and 4 bytes
of block table; written, 4 bytes (8 where the mass is another score) a head and token. FLOP: `2 width` a head and token.
The statistics of one page are one dense row, so this is a gather of 256 to 1024 byte pieces (with finer units, more).

Statistics that are bytes (`algorithm/statistics_format.py`) come into shared memory as they are and become float16 in
registers, exactly; so do the queries, whatever the dtype of the cache.
"""

import triton
import triton.language as tl

from ..page import CUMULANT2, KM2_REM, MEAN, QUEST, REM, TAYLOR2, as_factor, load_vectors


@triton.jit
def second_order(s2, log_count, SELECTOR: tl.constexpr):
    """What the variance `s2` of `q . k` adds to the score; `log_count`: of the number of keys, not negative."""
    s2 = tl.maximum(s2, 0.0)
    if SELECTOR == TAYLOR2:
        term = tl.log(1.0 + 0.5 * s2)
    elif SELECTOR == CUMULANT2:
        term = 0.5 * s2
    else:
        tl.static_assert((SELECTOR == REM) | (SELECTOR == KM2_REM))
        term = tl.where(s2 < 2 * log_count, 0.5 * s2, tl.sqrt(2 * log_count * s2) - log_count)
    return term


@triton.jit
def log_add_exp(a, b):
    """`log(exp(a) + exp(b))`, one of them finite."""
    top = tl.maximum(a, b)
    return top + tl.log(tl.exp(a - top) + tl.exp(b - top))


@triton.jit
def cluster_counts(pair, FP8: tl.constexpr):
    """The numbers of keys of two clusters, float32. In one load of four bytes: one of less is not pipelined."""
    dtype = pair.dtype.element_ty
    both = tl.load(pair.to(tl.pointer_type(tl.int32)))
    if FP8:
        first = (both & 0xFF).to(tl.float32)
        second = ((both >> 8) & 0xFF).to(tl.float32)
    else:
        first = (both & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        second = (both >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def moments(
    rows, q, square_high, square_low, restore, scale, in_head, D: tl.constexpr, DP: tl.constexpr, FP8: tl.constexpr
):  # fmt: skip
    """Mean and variance `[CHUNK, N]` of `q . k` from the stored mean and variance of the keys at `rows [CHUNK, DP]`."""
    mean = load_vectors(rows, in_head[None, :], D != DP, FP8, False)  # [CHUNK, DP]
    variance = load_vectors(rows + D, in_head[None, :], D != DP, FP8, True)
    s2 = tl.dot(variance, square_low, tl.dot(variance, square_high)) * restore[None, :]
    return tl.dot(mean, q) * scale, s2


@triton.jit
def score_units(
    row,
    head,
    split,
    num_splits,
    query_ptr,  # [tokens, H, D]
    kv_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    block_table_ptr,
    scores_ptr,  # [tokens, G, max_units, GROUP_P] float32
    mass_ptr,  # as scores, where WRITE_MASS
    lse_ptr,  # [tokens, G, num_splits, GROUP_P] float32: log sum exp of this split's scores
    query_token_stride,
    query_head_stride,
    page_stride,
    head_stride,
    block_table_stride,
    last_page,  # the largest page id there is
    max_units,
    num_kv_heads,
    scale,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,  # GROUP, padded to a power of two
    N: tl.constexpr,  # query tokens of a row * GROUP_P, padded for the tensor cores
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    STRIDE: tl.constexpr,  # stored elements from the statistics of one unit to the next
    FP8: tl.constexpr,  # statistics are bytes
    LOG_UNIT: tl.constexpr,
    BUDGET: tl.constexpr,  # units
    CHUNK: tl.constexpr,  # units at a time
    STAGES: tl.constexpr,
    SELECTOR: tl.constexpr,
    WRITE_MASS: tl.constexpr,
):
    """Units of one split, for one (row, kv head).

    Units are the long side of the matrix products, so that a decode group pads to 8 columns and the statistics go from
    shared memory into the tensor cores without passing through registers.
    """
    seq_len = tl.load(seq_lens_ptr + row)
    first_token = tl.load(query_start_loc_ptr + row)
    query_len = tl.load(query_start_loc_ptr + row + 1) - first_token
    PER_PAGE: tl.constexpr = PAGE // UNIT
    position = tl.maximum(seq_len, 1) - 1  # of the row's last token
    num_units = position // PAGE * PER_PAGE  # of complete pages
    # Where everything fits into the budget, selection takes everything and no score is needed.
    if position // UNIT + 1 > BUDGET:
        n = tl.arange(0, N)
        token = n // GROUP_P
        member = n % GROUP_P
        exists = (token < query_len) & (member < GROUP)
        complete = (seq_len - query_len + token) // PAGE * PER_PAGE  # [N], units of each query token's complete pages
        column = tl.arange(0, DP)
        in_head = column < D
        query_row = (first_token + token).to(tl.int64)
        q = tl.load(
            query_ptr + (query_row * query_token_stride + (head * GROUP + member) * query_head_stride)[None, :]
            + column[:, None],
            mask=exists[None, :] & in_head[:, None],
            other=0.0,
        )  # [DP, N] # fmt: skip
        q = as_factor(q, kv_ptr, FP8)
        dtype = q.dtype
        if SELECTOR == QUEST:
            left = tl.minimum(q, 0.0).to(dtype)
            right = tl.maximum(q, 0.0).to(dtype)
        elif SELECTOR != MEAN:
            # q^2 has twice the digits of q: as a sum of two numbers of its dtype it keeps them, and the tensor
            # cores can be used. Normalised to its largest element, because fp16 could not hold it otherwise.
            square = q.to(tl.float32) * q.to(tl.float32) * (scale * scale)
            peak = tl.maximum(tl.max(square, axis=0), 1e-30)  # [N]
            square = square * (1024.0 / peak)[None, :]
            square_high = square.to(dtype)
            square_low = (square - square_high.to(tl.float32)).to(dtype)
            restore = peak * (1.0 / 1024.0)

        per_split = tl.cdiv(tl.cdiv(num_units, num_splits), CHUNK) * CHUNK
        start = split * per_split
        stop = tl.minimum(start + per_split, num_units)
        pages = block_table_ptr + row.to(tl.int64) * block_table_stride
        area = kv_ptr + head * head_stride + PAGE * 2 * D
        out_row = (query_row * num_kv_heads + head) * max_units  # [N]
        offset = tl.arange(0, CHUNK)
        top = tl.full([CHUNK, N], float("-inf"), dtype=tl.float32)
        total = tl.zeros([CHUNK, N], dtype=tl.float32)
        # Page ids are fetched a step ahead: a load that waits for another load is not pipelined well. Behind the last
        # unit, its statistics are read again instead of masking.
        page = tl.load(pages + tl.minimum(start + offset, num_units - 1) // PER_PAGE)
        for first in tl.range(start, stop, CHUNK, num_stages=STAGES):
            # Beyond the last step the pipeline computes addresses, without reading, from undefined ids.
            statistic = area + tl.minimum(tl.maximum(page, 0), last_page).to(tl.int64) * page_stride  # [CHUNK]
            page = tl.load(pages + tl.minimum(first + CHUNK + offset, num_units - 1) // PER_PAGE)
            index = first + offset
            if FP8:
                statistic = statistic.to(tl.pointer_type(tl.uint8))
            if PER_PAGE > 1:
                statistic += tl.minimum(index, num_units - 1) % PER_PAGE * STRIDE
            rows = statistic[:, None] + column[None, :]
            if SELECTOR == MEAN:
                mean = load_vectors(rows, in_head[None, :], D != DP, FP8, False)  # [CHUNK, DP]
                score = LOG_UNIT + tl.dot(mean, q) * scale
            elif SELECTOR == QUEST:
                least = load_vectors(rows, in_head[None, :], D != DP, FP8, False)  # [CHUNK, DP]
                largest = load_vectors(rows + D, in_head[None, :], D != DP, FP8, False)
                score = tl.dot(largest, right, tl.dot(least, left)) * scale
            elif SELECTOR == KM2_REM:
                # An empty cluster has the log count -inf, and so no share.
                count, other_count = cluster_counts(statistic + 4 * D, FP8)
                log_count = tl.log(count)[:, None]  # [CHUNK, 1]
                other_count = tl.log(other_count)[:, None]
                linear, s2 = moments(rows, q, square_high, square_low, restore, scale, in_head, D, DP, FP8)
                other, other_s2 = moments(rows + 2 * D, q, square_high, square_low, restore, scale, in_head, D, DP, FP8)
                linear += log_count
                other += other_count
                score = log_add_exp(
                    linear + second_order(s2, tl.maximum(log_count, 0.0), SELECTOR),
                    other + second_order(other_s2, tl.maximum(other_count, 0.0), SELECTOR),
                )
            else:
                linear, s2 = moments(rows, q, square_high, square_low, restore, scale, in_head, D, DP, FP8)
                linear += LOG_UNIT
                score = linear + second_order(s2, LOG_UNIT, SELECTOR)  # [CHUNK, N]
            stored = exists[None, :] & (index[:, None] < tl.minimum(complete, stop)[None, :])
            out = (out_row[None, :] + index[:, None]) * GROUP_P + member[None, :]
            tl.store(scores_ptr + out, score, mask=stored)
            if WRITE_MASS:
                mass = linear + second_order(s2, 0.0, TAYLOR2)
                if SELECTOR == KM2_REM:
                    mass = log_add_exp(mass, other + second_order(other_s2, 0.0, TAYLOR2))
                tl.store(mass_ptr + out, mass, mask=stored)
            score = tl.where(stored, score, float("-inf"))
            new_top = tl.maximum(top, score)
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp(top - safe) + tl.exp(score - safe)
            top = new_top
        best = tl.max(top, axis=0)  # [N]
        safe = tl.where(best == float("-inf"), 0.0, best)
        mass_sum = tl.sum(total * tl.exp(top - safe[None, :]), axis=0)
        lse = tl.where(mass_sum > 0, safe + tl.log(tl.where(mass_sum > 0, mass_sum, 1.0)), float("-inf"))
        lse_row = ((query_row * num_kv_heads + head) * num_splits + split) * GROUP_P + member
        tl.store(lse_ptr + lse_row, lse, mask=exists)
