"""Score every complete page of a row for all heads of a group and all query tokens of the row.

Plain reference: `reference.selection_score` and `reference.mass_score`. Sources: `taylor2` SPLA (arXiv 2601.22379),
`cumulant2` COBS (arXiv 2607.09052), `quest` (arXiv 2406.10774), `rem` the log-mean-exp of a random energy model.

Floor, bytes a page and kv head: `width` elements of statistics, once for all heads and tokens of the group, and 4 bytes
of block table; written, 4 bytes (8 where the mass is another score) a head and token. FLOP: `2 width` a head and token.
The statistics of one page are one dense row, so this is a gather of 256 to 1024 byte pieces.
"""

import triton
import triton.language as tl

from .triton_cache import CUMULANT2, MEAN, QUEST, REM, TAYLOR2


@triton.jit
def log1p_small(x):
    """`log(1 + x)` for `x >= 0`, without losing the digits of a small x."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def second_order(s2, LOG_BLOCK: tl.constexpr, SELECTOR: tl.constexpr):
    """What the variance `s2` of `q . k` adds to the score; `LOG_BLOCK` is the log of the tokens in a block."""
    s2 = tl.maximum(s2, 0.0)
    if SELECTOR == TAYLOR2:
        term = log1p_small(0.5 * s2)
    elif SELECTOR == CUMULANT2:
        term = 0.5 * s2
    else:
        tl.static_assert(SELECTOR == REM)
        term = tl.where(s2 < 2 * LOG_BLOCK, 0.5 * s2, tl.sqrt(2 * LOG_BLOCK * s2) - LOG_BLOCK)
    return term


@triton.jit
def score_pages(
    row,
    head,
    split,
    num_splits,
    query_ptr,  # [tokens, H, D]
    kv_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    block_table_ptr,
    scores_ptr,  # [tokens, H, max_pages] float32
    mass_ptr,  # [tokens, H, max_pages] float32, where WRITE_MASS
    lse_ptr,  # [tokens, H, num_splits] float32: log sum exp of this split's scores
    query_token_stride,
    query_head_stride,
    page_stride,
    head_stride,
    block_table_stride,
    max_pages,
    num_heads,
    scale,
    GROUP: tl.constexpr,
    QUERY_LEN: tl.constexpr,  # the most query tokens of a row
    M: tl.constexpr,  # QUERY_LEN * GROUP, padded for the tensor cores
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    LOG_PAGE: tl.constexpr,
    BUDGET: tl.constexpr,
    CHUNK: tl.constexpr,  # pages at a time
    STAGES: tl.constexpr,
    SELECTOR: tl.constexpr,
    WRITE_MASS: tl.constexpr,
):
    """Pages of one split, for one (row, kv head)."""
    seq_len = tl.load(seq_lens_ptr + row)
    first_token = tl.load(query_start_loc_ptr + row)
    query_len = tl.load(query_start_loc_ptr + row + 1) - first_token
    num_pages = (tl.maximum(seq_len, 1) - 1) // PAGE  # complete pages of the row's last token
    # Where everything fits into the budget, selection takes everything and no score is needed.
    if num_pages + 1 > BUDGET:
        m = tl.arange(0, M)
        token = m // GROUP
        query_head = head * GROUP + m % GROUP
        exists = token < query_len
        complete = (seq_len - query_len + token) // PAGE  # [M], complete pages of each query token
        column = tl.arange(0, DP)
        in_head = column < D
        query_row = (first_token + token).to(tl.int64)
        q = tl.load(
            query_ptr + query_row[:, None] * query_token_stride + query_head[:, None] * query_head_stride
            + column[None, :],
            mask=exists[:, None] & in_head[None, :],
            other=0.0,
        )  # [M, DP] # fmt: skip
        dtype = kv_ptr.dtype.element_ty
        q = q.to(dtype)
        if SELECTOR == QUEST:
            left = tl.minimum(q, 0.0).to(dtype)
            right = tl.maximum(q, 0.0).to(dtype)
        elif SELECTOR != MEAN:
            # q^2 has twice the digits of q: as a sum of two numbers of the cache dtype it keeps them, and the tensor
            # cores can be used. Normalised to its largest element, because fp16 could not hold it otherwise.
            square = q.to(tl.float32) * q.to(tl.float32) * (scale * scale)
            peak = tl.maximum(tl.max(square, axis=1), 1e-30)  # [M]
            square = square * (1024.0 / peak)[:, None]
            square_high = square.to(dtype)
            square_low = (square - square_high.to(tl.float32)).to(dtype)
            restore = peak * (1.0 / 1024.0)

        per_split = tl.cdiv(tl.cdiv(num_pages, num_splits), CHUNK) * CHUNK
        start = split * per_split
        stop = tl.minimum(start + per_split, num_pages)
        pages = block_table_ptr + row.to(tl.int64) * block_table_stride
        area = kv_ptr + head * head_stride + PAGE * 2 * D
        score_row = (query_row * num_heads + query_head) * max_pages  # [M]
        top = tl.full([M, CHUNK], float("-inf"), dtype=tl.float32)
        total = tl.zeros([M, CHUNK], dtype=tl.float32)
        for first in tl.range(start, stop, CHUNK, num_stages=STAGES):
            index = first + tl.arange(0, CHUNK)
            inside = index < stop
            page = tl.maximum(tl.load(pages + index, mask=inside, other=0), 0).to(tl.int64)
            statistic = area + page * page_stride  # [CHUNK]
            mask = inside[None, :] & in_head[:, None]
            mean = tl.load(statistic[None, :] + column[:, None], mask=mask, other=0.0)  # [DP, CHUNK]
            if SELECTOR == MEAN:
                score = LOG_PAGE + tl.dot(q, mean) * scale
            else:
                second = tl.load(statistic[None, :] + D + column[:, None], mask=mask, other=0.0)  # [DP, CHUNK]
                if SELECTOR == QUEST:
                    score = tl.dot(right, second, tl.dot(left, mean)) * scale
                else:
                    linear = LOG_PAGE + tl.dot(q, mean) * scale
                    s2 = tl.dot(square_low, second, tl.dot(square_high, second)) * restore[:, None]
                    score = linear + second_order(s2, LOG_PAGE, SELECTOR)  # [M, CHUNK]
            stored = exists[:, None] & (index[None, :] < tl.minimum(complete, stop)[:, None])
            tl.store(scores_ptr + score_row[:, None] + index[None, :], score, mask=stored)
            if WRITE_MASS:
                mass = linear + second_order(s2, LOG_PAGE, TAYLOR2)
                tl.store(mass_ptr + score_row[:, None] + index[None, :], mass, mask=stored)
            score = tl.where(stored, score, float("-inf"))
            new_top = tl.maximum(top, score)
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp(top - safe) + tl.exp(score - safe)
            top = new_top
        row_top = tl.max(top, axis=1)  # [M]
        safe = tl.where(row_top == float("-inf"), 0.0, row_top)
        row_total = tl.sum(total * tl.exp(top - safe[:, None]), axis=1)
        lse = tl.where(row_total > 0, safe + tl.log(row_total), float("-inf"))
        tl.store(lse_ptr + (query_row * num_heads + query_head) * num_splits + split, lse, mask=exists)
