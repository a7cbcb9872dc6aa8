"""Store keys and values in the paged cache; make statistics, sketch and stamp of the pages that this completes.

Plain reference: `VectorisedAttention.update_cache` (`kernels/cpu/vectorised.py`). Layout: docs/design.md, 5. A page has
one set of statistics for each of its selection blocks of `UNIT` tokens, made by the selector (`selectors.py`).

Floor, bytes a token and kv head: read and write `2 d` elements. Once in `B` tokens a page's `B d` key elements are read
too, and `width` elements a selection block, the sketch and 16 bytes are written. FLOP: about `4 B d` a completed page
(`40 B d` for two clusters), nothing otherwise.
"""

import triton
import triton.language as tl

from .sketch import store_sketch
from .statistics import Block


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
    DP: tl.constexpr,  # D, padded to a power of two, with a sketch at least 32
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,  # tokens a selection block
    STRIDE: tl.constexpr,  # stored elements from the statistics of one selection block to the next
    FP8: tl.constexpr,  # statistics are bytes
    SKETCH: tl.constexpr,  # bytes from the statistics of a page to its sketch; 0: it has none
    TOKENS: tl.constexpr,  # a program's
    TILE: tl.constexpr,  # keys of a block at a time, see `Block`
    STAMP_WORD: tl.constexpr,  # first int32 of the stamp within a page's head
    LIMIT: tl.constexpr,  # largest finite value of the cache dtype
    SELECTOR: tl.constexpr,  # a GpuSelector
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
                    D, DP, PAGE, UNIT, STRIDE, FP8, SKETCH, TILE, STAMP_WORD, LIMIT, SELECTOR,
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
                D, DP, PAGE, UNIT, STRIDE, FP8, SKETCH, TILE, STAMP_WORD, LIMIT, SELECTOR,
            )  # fmt: skip
            here = tl.min(tl.where(completes > here, completes, TOKENS), axis=0)


@triton.jit
def _complete_page(
    key_ptr, slot_ptr, kv_ptr, kv_int_ptr, salt_ptr, counter_ptr, token, head, slot,
    key_token_stride, key_head_stride, page_stride, head_stride, int_page_stride, int_head_stride,
    D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, UNIT: tl.constexpr, STRIDE: tl.constexpr, FP8: tl.constexpr,
    SKETCH: tl.constexpr, TILE: tl.constexpr, STAMP_WORD: tl.constexpr, LIMIT: tl.constexpr, SELECTOR: tl.constexpr,
):  # fmt: skip
    """Statistics, sketch and stamp of the page whose last slot `token` has."""
    page = slot // PAGE
    base = kv_ptr + page * page_stride + head * head_stride
    for unit in tl.range(0, PAGE // UNIT):
        area = base + PAGE * 2 * D
        if FP8:
            area = area.to(tl.pointer_type(tl.uint8))
        area += unit * STRIDE
        _complete_block(Block(
            key_ptr, slot_ptr, base, token, head, slot, unit * UNIT, key_token_stride, key_head_stride, area,
            D, DP, PAGE, UNIT, TILE, FP8, LIMIT,
        ), SKETCH, SELECTOR)  # fmt: skip
    # Every (page, head) that completes takes a number of its own: no program has to wait for the others before
    # the counter may move, and a stamp still names one content of one page.
    count = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    stamp = kv_int_ptr + page * int_page_stride + head * int_head_stride + STAMP_WORD
    tl.store(stamp, tl.load(salt_ptr))
    tl.store(stamp + 1, tl.load(salt_ptr + 1))
    tl.store(stamp + 2, count)
    tl.store(stamp + 3, page.to(tl.int32))


@triton.jit
def _complete_block(block, SKETCH: tl.constexpr, SELECTOR: tl.constexpr):
    """Statistics of a block, and the sketch of its keys where pages have one."""
    SELECTOR.store(block)
    if SKETCH > 0:
        tl.debug_barrier()  # the mean is read back, by other threads than stored it
        store_sketch(block, SKETCH)
