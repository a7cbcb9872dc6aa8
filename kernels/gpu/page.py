"""Store keys and values in the paged cache; make statistics and stamp of the pages that this completes.

Plain reference: `VectorisedAttention.update_cache` (`kernels/cpu/vectorised.py`), and for the statistics
`reference.block_statistics`. Layout: docs/design.md, 5. Sources: mean and diagonal variance, SPLA (arXiv 2601.22379,
second-order Taylor selection) and COBS (arXiv 2607.09052); kmin and kmax, Quest (arXiv 2406.10774); two clusters,
Lloyd's k-means. A page has one set of statistics for each of its selection blocks of `UNIT` tokens.

Floor, bytes a token and kv head: read and write `2 d` elements. Once in `B` tokens a page's `B d` key elements are read
too, and `width` elements a selection block and 16 bytes are written. FLOP: about `4 B d` a completed page (`40 B d` for
two clusters), nothing otherwise.
"""

import triton
import triton.language as tl

# Selectors, as the kernels know them. `tl.constexpr` so that jitted functions may refer to them.
MEAN = tl.constexpr(0)
TAYLOR2 = tl.constexpr(1)
CUMULANT2 = tl.constexpr(2)
REM = tl.constexpr(3)
QUEST = tl.constexpr(4)
KM2_REM = tl.constexpr(5)
SELECTOR_CODES = {"mean": 0, "taylor2": 1, "cumulant2": 2, "rem": 3, "quest": 4, "km2-rem": 5}

LLOYD_ITERATIONS = tl.constexpr(4)

E4M3_MAX = tl.constexpr(448.0)
E5M2_MAX = tl.constexpr(57344.0)


@triton.jit
def encode_e4m3(x):
    """Float32 as e4m3 bytes; `algorithm/statistics_format.py`. By float16, whose exponents reach as far once `x` is
    divided by 256: any GPU can, and so can the interpreter."""
    bits = (tl.clamp(x, -E4M3_MAX, E4M3_MAX) * (1.0 / 256.0)).to(tl.float16).to(tl.uint16, bitcast=True)
    magnitude = bits & 0x7FFF
    rounded = (magnitude + 0x3F + ((magnitude >> 7) & 1)) >> 7  # to nearest, ties to even
    return (rounded | ((bits >> 8) & 0x80)).to(tl.uint8)


@triton.jit
def encode_e5m2(x):
    """Float32, not negative, as e5m2 bytes: the upper half of a float16."""
    bits = tl.minimum(x, E5M2_MAX).to(tl.float16).to(tl.uint16, bitcast=True)
    return ((bits + 0x7F + ((bits >> 8) & 1)) >> 8).to(tl.uint8)


@triton.jit
def decode_e4m3(byte):
    """An e4m3 number as float16, exactly."""
    if tl.target_info.cuda_capability_geq(8, 9):
        x = byte.to(tl.float8e4nv, bitcast=True).to(tl.float16)  # two of them an instruction
    else:
        wide = byte.to(tl.uint16)  # the same bits in other places are a 256th of it
        x = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return x


@triton.jit
def decode_e5m2(byte):
    """An e5m2 number as float16, exactly."""
    if tl.target_info.cuda_capability_geq(8, 9):
        x = byte.to(tl.float8e5, bitcast=True).to(tl.float16)
    else:
        x = (byte.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    return x


@triton.jit
def load_vectors(rows, mask, MASKED: tl.constexpr, FP8: tl.constexpr, VARIANCE: tl.constexpr):
    """Stored statistics `[N, DP]` at `rows`, 0 where `mask` is not, for a matrix product: float16 where they are bytes,
    in the dtype of the cache otherwise."""
    if MASKED:
        x = tl.load(rows, mask=mask, other=0.0)
    else:
        x = tl.load(rows)
    if FP8:
        if VARIANCE:
            x = decode_e5m2(x)
        else:
            x = decode_e4m3(x)
    return x


@triton.jit
def as_factor(q, kv_ptr, FP8: tl.constexpr):
    """Queries in the dtype that `load_vectors` has, saturated: bf16 reaches further than float16."""
    if FP8:
        q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    else:
        q = q.to(kv_ptr.dtype.element_ty)
    return q


@triton.jit
def store_vector(to, x, in_head, LIMIT: tl.constexpr, FP8: tl.constexpr, VARIANCE: tl.constexpr):
    """Store statistics `[DP]` at `to [DP]`, saturated: as bytes where `FP8`, in the dtype of the pointers otherwise."""
    if FP8:
        if VARIANCE:
            stored = encode_e5m2(x)
        else:
            stored = encode_e4m3(x)
    else:
        stored = tl.clamp(x, -LIMIT, LIMIT).to(to.dtype.element_ty)
    tl.store(to, stored, mask=in_head)


@triton.jit(do_not_specialize=["num_tokens"])
def update_cache_kernel(
    key_ptr,  # [tokens, G, D]
    value_ptr,  # [tokens, G, D]
    slot_ptr,  # [tokens] int64, -1 for padding
    kv_ptr,  # [pages, G, rows, 2 D] cache dtype
    kv_int_ptr,  # the same memory as int32
    salt_ptr,  # [2] int32
    counter_ptr,  # [1] int32
    num_tokens,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    page_stride,  # elements of the cache dtype
    head_stride,
    int_page_stride,  # int32 words
    int_head_stride,
    D: tl.constexpr,
    DP: tl.constexpr,  # D, padded to a power of two
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,  # tokens a selection block
    STRIDE: tl.constexpr,  # stored elements from the statistics of one selection block to the next
    FP8: tl.constexpr,  # statistics are bytes
    TOKENS: tl.constexpr,  # a program's
    TILE: tl.constexpr,  # tokens at a time, a power of two that divides UNIT; for KM2_REM at least UNIT
    STAMP_WORD: tl.constexpr,  # first int32 of the stamp within a page's head
    LIMIT: tl.constexpr,  # largest finite value of the cache dtype
    SELECTOR: tl.constexpr,
    DEPENDENT: tl.constexpr,  # launched before the one ahead has ended
):
    """Grid (tokens / TOKENS, G)."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        # Behind the wait: what may start now knows that everything but this launch has ended.
        tl.extra.cuda.gdc_launch_dependents()
    first = tl.program_id(0).to(tl.int64) * TOKENS
    head = tl.program_id(1)
    of_head = kv_ptr + head * head_stride
    key_head, value_head = key_ptr + head * key_head_stride, value_ptr + head * value_head_stride
    dtype = kv_ptr.dtype.element_ty
    columns = tl.arange(0, DP)
    in_head = columns < D
    if TOKENS == 1:
        slot = tl.load(slot_ptr + first)
        if slot >= 0:
            row = of_head + slot // PAGE * page_stride + slot % PAGE * 2 * D
            key = tl.load(key_head + first * key_token_stride + columns, mask=in_head)  # [DP]
            value = tl.load(value_head + first * value_token_stride + columns, mask=in_head)
            tl.store(row + columns, key.to(dtype), mask=in_head)
            tl.store(row + D + columns, value.to(dtype), mask=in_head)
            if slot % PAGE == PAGE - 1:
                _complete_page(
                    key_ptr, slot_ptr, kv_ptr, kv_int_ptr, salt_ptr, counter_ptr, first, head, slot,
                    key_token_stride, key_head_stride, page_stride, head_stride, int_page_stride, int_head_stride,
                    D, DP, PAGE, UNIT, STRIDE, FP8, TILE, STAMP_WORD, LIMIT, SELECTOR,
                )  # fmt: skip
    else:
        # A program has many registers for the few that complete a page, so that few run at once: each stores several.
        token = first + tl.arange(0, TOKENS)
        slot = tl.load(slot_ptr + token, mask=token < num_tokens, other=-1)
        stored = (slot >= 0)[:, None] & in_head[None, :]
        row = of_head + (slot // PAGE * page_stride + slot % PAGE * 2 * D)[:, None] + columns[None, :]
        key = tl.load(key_head + (token * key_token_stride)[:, None] + columns[None, :], mask=stored)  # [TOKENS, DP]
        value = tl.load(value_head + (token * value_token_stride)[:, None] + columns[None, :], mask=stored)
        tl.store(row, key.to(dtype), mask=stored)
        tl.store(row + D, value.to(dtype), mask=stored)
        place = tl.arange(0, TOKENS)
        completes = tl.where((slot >= 0) & (slot % PAGE == PAGE - 1), place, TOKENS)
        here = tl.min(completes, axis=0)
        while here < TOKENS:
            one = tl.max(tl.where(place == here, slot, -1), axis=0)
            _complete_page(
                key_ptr, slot_ptr, kv_ptr, kv_int_ptr, salt_ptr, counter_ptr, first + here, head, one,
                key_token_stride, key_head_stride, page_stride, head_stride, int_page_stride, int_head_stride,
                D, DP, PAGE, UNIT, STRIDE, FP8, TILE, STAMP_WORD, LIMIT, SELECTOR,
            )  # fmt: skip
            here = tl.min(tl.where(completes > here, completes, TOKENS), axis=0)


@triton.jit
def _complete_page(
    key_ptr, slot_ptr, kv_ptr, kv_int_ptr, salt_ptr, counter_ptr, token, head, slot,
    key_token_stride, key_head_stride, page_stride, head_stride, int_page_stride, int_head_stride,
    D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, UNIT: tl.constexpr, STRIDE: tl.constexpr, FP8: tl.constexpr,
    TILE: tl.constexpr, STAMP_WORD: tl.constexpr, LIMIT: tl.constexpr, SELECTOR: tl.constexpr,
):  # fmt: skip
    """Statistics and stamp of the page whose last slot `token` has."""
    page = slot // PAGE
    base = kv_ptr + page * page_stride + head * head_stride
    columns = tl.arange(0, DP)
    in_head = columns < D
    # Other programs of this launch may still be storing keys of this page. A token of the page that is in this
    # batch stands as far before this one as its slot does, so its key is taken from the batch, not the cache.
    for unit in tl.range(0, PAGE // UNIT):
        area = base + PAGE * 2 * D
        if FP8:
            area = area.to(tl.pointer_type(tl.uint8))
        area += unit * STRIDE
        if SELECTOR == KM2_REM:
            keys, exists = _page_keys(
                key_ptr, slot_ptr, base, token, head, slot, unit * UNIT, unit * UNIT + UNIT,
                key_token_stride, key_head_stride, D, DP, PAGE, TILE,
            )  # fmt: skip
            in_second = two_means(keys, exists, UNIT)
            for cluster in tl.static_range(2):
                member = exists & (in_second == (cluster == 1))
                count = tl.sum(member.to(tl.float32), axis=0)
                scaled = 1.0 / tl.maximum(count, 1.0)
                mean = tl.sum(tl.where(member[:, None], keys, 0.0), axis=0) * scaled  # [DP]
                deviation = tl.where(member[:, None], keys - mean[None, :], 0.0)
                variance = tl.sum(deviation * deviation, axis=0) * scaled
                statistic = area + cluster * 2 * D + columns
                store_vector(statistic, mean, in_head, LIMIT, FP8, False)
                store_vector(statistic + D, variance, in_head, LIMIT, FP8, True)
                tl.store(area + 4 * D + cluster, count.to(area.dtype.element_ty))
        else:
            total = tl.zeros([DP], dtype=tl.float32)
            low = tl.full([DP], float("inf"), dtype=tl.float32)
            high = tl.full([DP], float("-inf"), dtype=tl.float32)
            for first in tl.static_range(0, UNIT, TILE):
                keys, _ = _page_keys(
                    key_ptr, slot_ptr, base, token, head, slot, unit * UNIT + first, PAGE,
                    key_token_stride, key_head_stride, D, DP, PAGE, TILE,
                )  # [TILE, DP] # fmt: skip
                if SELECTOR == QUEST:
                    low = tl.minimum(low, tl.min(keys, axis=0))
                    high = tl.maximum(high, tl.max(keys, axis=0))
                else:
                    total += tl.sum(keys, axis=0)
            if SELECTOR == QUEST:
                statistic, second = low, high
            else:
                statistic = total / UNIT
                second = tl.zeros([DP], dtype=tl.float32)
            if (SELECTOR != QUEST) & (SELECTOR != MEAN):
                # Two passes: the difference of large sums would cost the variance its digits.
                for first in tl.static_range(0, UNIT, TILE):
                    keys, _ = _page_keys(
                        key_ptr, slot_ptr, base, token, head, slot, unit * UNIT + first, PAGE,
                        key_token_stride, key_head_stride, D, DP, PAGE, TILE,
                    )  # fmt: skip
                    deviation = keys - statistic[None, :]
                    second += tl.sum(deviation * deviation, axis=0)
                second = second / UNIT
            store_vector(area + columns, statistic, in_head, LIMIT, FP8, False)
            if SELECTOR != MEAN:
                store_vector(area + D + columns, second, in_head, LIMIT, FP8, SELECTOR != QUEST)
    # Every (page, head) that completes takes a number of its own: no program has to wait for the others before
    # the counter may move, and a stamp still names one content of one page.
    count = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    stamp = kv_int_ptr + page * int_page_stride + head * int_head_stride + STAMP_WORD
    tl.store(stamp, tl.load(salt_ptr))
    tl.store(stamp + 1, tl.load(salt_ptr + 1))
    tl.store(stamp + 2, count)
    tl.store(stamp + 3, page.to(tl.int32))


@triton.jit
def _key_at(keys, index):
    """Row `index` `[DP]` of `keys`."""
    row = tl.arange(0, keys.shape[0])
    return tl.sum(tl.where((row == index)[:, None], keys, 0.0), axis=0)


@triton.jit
def _squared_distance(keys, point):
    difference = keys - point[None, :]
    return tl.sum(difference * difference, axis=1)


@triton.jit
def two_means(keys, exists, UNIT: tl.constexpr):
    """Which of the keys `[ROWS, DP]` belong to the second of two clusters, `[ROWS]`; `reference.two_means`.

    Lloyd's algorithm from the two most distant keys (the outlier first); ties fall to the first cluster. Rows that do
    not exist are 0.
    """
    from_mean = _squared_distance(keys, tl.sum(keys, axis=0) / UNIT)
    first = _key_at(keys, tl.argmax(tl.where(exists, from_mean, -1.0), axis=0))
    from_first = _squared_distance(keys, first)
    second = _key_at(keys, tl.argmax(tl.where(exists, from_first, -1.0), axis=0))
    for _ in tl.range(0, LLOYD_ITERATIONS):
        in_second = exists & (_squared_distance(keys, second) < _squared_distance(keys, first))
        count = tl.sum(in_second.to(tl.float32), axis=0)
        of_second = tl.sum(tl.where(in_second[:, None], keys, 0.0), axis=0)
        of_first = tl.sum(tl.where(in_second[:, None], 0.0, keys), axis=0)
        second = tl.where(count > 0, of_second / tl.maximum(count, 1.0), second)
        first = tl.where(count < UNIT, of_first / tl.maximum(UNIT - count, 1.0), first)
    return exists & (_squared_distance(keys, second) < _squared_distance(keys, first))


@triton.jit
def _page_keys(
    key_ptr, slot_ptr, base, token, head, slot, first, stop,
    key_token_stride, key_head_stride,
    D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Keys `[TILE, DP]` float32, as the cache stores them, of rows `first ..` of the page that `token` completes, and
    which of them lie before `stop` `[TILE]`; the others are 0."""
    columns = tl.arange(0, DP)
    rows = first + tl.arange(0, TILE)
    back = PAGE - 1 - rows
    source = token - back
    exists = rows < stop
    in_batch = exists & (source >= 0)
    in_batch &= tl.load(slot_ptr + source, mask=in_batch, other=-1) == slot - back
    in_head = columns[None, :] < D
    new = tl.load(
        key_ptr + source[:, None] * key_token_stride + head * key_head_stride + columns[None, :],
        mask=in_batch[:, None] & in_head,
        other=0.0,
    )
    dtype = base.dtype.element_ty
    in_cache = (exists & ~in_batch)[:, None] & in_head
    old = tl.load(base + rows[:, None] * 2 * D + columns[None, :], mask=in_cache, other=0.0)
    return tl.where(in_batch[:, None], new.to(dtype).to(tl.float32), old.to(tl.float32)), exists
