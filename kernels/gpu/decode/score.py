"""Score every selection block of the complete pages of a row for all heads of a group and all query tokens of the row.

A page has one or several selection blocks of `UNIT` tokens; here and in the kernels that follow they are the units.

Plain reference: `reference.selection_score` and `reference.mass_score`. What a unit scores is the selector's
(`gpu/selectors`).

Floor, bytes a unit and kv head: `width` elements of statistics, once for all heads and tokens of the group, and 4 bytes
of block table; written, 4 bytes (8 where the mass is another score) a head and token. FLOP: `2 width` a head and token.
The statistics of one page are one dense row, so this is a gather of 256 to 1024 byte pieces (with finer units, more).

Statistics that are bytes (`algorithm/statistics_format.py`) come into shared memory as they are and become float16 in
registers, exactly; so do the queries, whatever the dtype of the cache.
"""

import triton
import triton.language as tl

from ..selectors import log_sum
from ..statistics import Blocks, as_factor
from .running_sum import add_exponentials, log_of_columns


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
    UNSCORED: tl.constexpr,  # units of a row up to which none needs a score
    CHUNK: tl.constexpr,  # units at a time
    STAGES: tl.constexpr,
    SELECTOR: tl.constexpr,  # a GpuSelector
    WRITE_MASS: tl.constexpr,  # as it is another number than the score
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
    if position // UNIT + 1 > UNSCORED:
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
        query = SELECTOR.prepare(q, scale, False, 1.0)

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
            estimate, mass, _ = SELECTOR.score(query, Blocks(
                statistic, rows, in_head[None, :], scale, LOG_UNIT, D, DP, FP8, D != DP, False, UNIT, LOG_UNIT, 1.0
            ))  # fmt: skip
            score = log_sum(estimate)  # [CHUNK, N]
            stored = exists[None, :] & (index[:, None] < tl.minimum(complete, stop)[None, :])
            out = (out_row[None, :] + index[:, None]) * GROUP_P + member[None, :]
            tl.store(scores_ptr + out, score, mask=stored)
            if WRITE_MASS:
                tl.store(mass_ptr + out, log_sum(mass), mask=stored)
            score = tl.where(stored, score, float("-inf"))
            top, total = add_exponentials(top, total, score)
        lse = log_of_columns(top, total)  # [N]
        lse_row = ((query_row * num_kv_heads + head) * num_splits + split) * GROUP_P + member
        tl.store(lse_ptr + lse_row, lse, mask=exists)
