"""What a selector's device functions read and write: the keys of a block that is complete, the statistics of blocks.

Numbers are stored in the dtype of the cache, or as bytes (`algorithm/statistics_format.py`); they are computed with in
float32, and multiplied by queries in the dtype of the cache, or in float16 where they are bytes.

A selector's functions (`selectors.py`) are given a `Block` or `Blocks`, tuples of tensors and of constants, and hand
them on to the functions below. Constants stay known at compile time only while nothing assigns the tuple to a variable.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# Stored numbers


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
def as_factor(q, kv_ptr, FP8: tl.constexpr):
    """Queries in the dtype that `load_vectors` has, saturated: bf16 reaches further than float16."""
    if FP8:
        q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    else:
        q = q.to(kv_ptr.dtype.element_ty)
    return q


# Making statistics


class Block(NamedTuple):
    """A selection block of a page that a token completes: its keys, and where its statistics go."""

    key_ptr: Any  # of the batch, [tokens, G, D]
    slot_ptr: Any  # [tokens] int64
    base: Any  # the page's kv head in the cache
    token: Any  # of the batch, which completes the page
    head: Any
    slot: Any  # its
    first: Any  # row of the page where the block begins
    key_token_stride: Any
    key_head_stride: Any
    area: Any  # where the block's statistics begin
    D: tl.constexpr
    DP: tl.constexpr  # D, padded to a power of two
    PAGE: tl.constexpr
    UNIT: tl.constexpr  # tokens of the block
    TILE: tl.constexpr  # keys at a time, a power of two that divides UNIT; of `whole_blocks`, at least UNIT
    FP8: tl.constexpr  # statistics are bytes
    LIMIT: tl.constexpr  # largest finite value of the cache dtype


@triton.jit
def block_keys(block, FIRST: tl.constexpr):
    """Keys `[TILE, DP]` float32, as the cache stores them, of a block's tokens `FIRST ..`, and which of them the block
    has `[TILE]`; the others are 0, as are columns from `D` on.

    Other programs of the launch may still be storing keys of this page. A token of the page that is in the batch stands
    as far before the one that completes it as its slot does, so its key is taken from the batch, not the cache.
    """
    columns = tl.arange(0, block.DP)
    rows = block.first + FIRST + tl.arange(0, block.TILE)
    back = block.PAGE - 1 - rows
    source = block.token - back
    exists = rows < block.first + block.UNIT
    in_batch = exists & (source >= 0)
    in_batch &= tl.load(block.slot_ptr + source, mask=in_batch, other=-1) == block.slot - back
    in_head = columns[None, :] < block.D
    new = tl.load(
        block.key_ptr
        + source[:, None] * block.key_token_stride
        + block.head * block.key_head_stride
        + columns[None, :],
        mask=in_batch[:, None] & in_head,
        other=0.0,
    )
    dtype = block.base.dtype.element_ty
    in_cache = (exists & ~in_batch)[:, None] & in_head
    old = tl.load(block.base + rows[:, None] * 2 * block.D + columns[None, :], mask=in_cache, other=0.0)
    return tl.where(in_batch[:, None], new.to(dtype).to(tl.float32), old.to(tl.float32)), exists


@triton.jit
def block_mean(block):
    """Mean `[DP]` of a block's keys, of which `TILE` divides the number."""
    total = tl.zeros([block.DP], dtype=tl.float32)
    for first in tl.static_range(0, block.UNIT, block.TILE):
        keys, _ = block_keys(block, first)
        total += tl.sum(keys, axis=0)
    return total / block.UNIT


@triton.jit
def block_variance(block, mean):
    """Population variance `[DP]` of a block's keys, of which `TILE` divides the number.

    Read again: the difference of large sums would cost the variance its digits.
    """
    total = tl.zeros([block.DP], dtype=tl.float32)
    for first in tl.static_range(0, block.UNIT, block.TILE):
        keys, _ = block_keys(block, first)
        deviation = keys - mean[None, :]
        total += tl.sum(deviation * deviation, axis=0)
    return total / block.UNIT


@triton.jit
def store_vector(block, AT: tl.constexpr, x, VARIANCE: tl.constexpr = False):
    """Store `x` `[DP]` as the `D` numbers of a block's statistics from number `AT` on, saturated; bytes are e5m2 where
    `VARIANCE`, e4m3 otherwise."""
    columns = tl.arange(0, block.DP)
    if block.FP8:
        if VARIANCE:
            stored = encode_e5m2(x)
        else:
            stored = encode_e4m3(x)
    else:
        stored = tl.clamp(x, -block.LIMIT, block.LIMIT).to(block.area.dtype.element_ty)
    tl.store(block.area + AT + columns, stored, mask=columns < block.D)


@triton.jit
def store_number(block, AT: tl.constexpr, x):
    """Store the scalar `x` as number `AT` of a block's statistics, saturated; as a byte it is e4m3."""
    if block.FP8:
        stored = encode_e4m3(x)
    else:
        stored = tl.clamp(x, -block.LIMIT, block.LIMIT).to(block.area.dtype.element_ty)
    tl.store(block.area + AT, stored)


@triton.jit
def store_count(block, AT: tl.constexpr, x):
    """Store the scalar `x`, a whole number, as number `AT` of a block's statistics."""
    tl.store(block.area + AT, x.to(block.area.dtype.element_ty))


# Reading statistics


class Blocks(NamedTuple):
    """The statistics of some selection blocks, for queries that stand in columns (decode) or in rows (prefill).

    A matrix is `[blocks, queries]` where queries stand in columns, `[queries, blocks]` in rows. Logits are in nats, or
    in powers of two, which is what the hardware raises.
    """

    first: Any  # [blocks] pointers to the first number
    rows: Any  # [blocks, DP] pointers to the first D numbers
    mask: Any  # which of them to read, where MASKED
    scale: Any  # softmax scale, in units of the logits
    offset: Any  # to add to every logit; broadcasts to a matrix
    D: tl.constexpr
    DP: tl.constexpr  # D, padded to a power of two
    FP8: tl.constexpr  # statistics are bytes
    MASKED: tl.constexpr
    QUERY_ROWS: tl.constexpr  # queries are rows of matrices
    UNIT: tl.constexpr  # tokens of a block
    LOG_UNIT: tl.constexpr  # its log, in units of the logits
    NAT: tl.constexpr  # one nat, in units of the logits


@triton.jit
def load_vectors(blocks, AT: tl.constexpr, VARIANCE: tl.constexpr = False):
    """The `D` numbers from number `AT` on, `[blocks, DP]`, 0 where there are none, for `multiply`; bytes are e5m2 where
    `VARIANCE`, e4m3 otherwise."""
    if blocks.MASKED:
        x = tl.load(blocks.rows + AT, mask=blocks.mask, other=0.0)
    else:
        x = tl.load(blocks.rows + AT)
    if blocks.FP8:
        if VARIANCE:
            x = decode_e5m2(x)
        else:
            x = decode_e4m3(x)
    return x


@triton.jit
def load_numbers(blocks, AT: tl.constexpr):
    """Number `AT` of each block, float32, in a matrix of one query; bytes are e4m3."""
    x = tl.load(blocks.first + AT)
    if blocks.FP8:
        x = decode_e4m3(x)
    return each(x.to(tl.float32), blocks)


@triton.jit
def load_two_counts(blocks, AT: tl.constexpr):
    """Numbers `AT`, which is even, and `AT + 1` of each block, which are counts, float32, in matrices of one query.

    In one load of four bytes: one of less is not pipelined.
    """
    pair = blocks.first + AT
    dtype = pair.dtype.element_ty
    both = tl.load(pair.to(tl.pointer_type(tl.int32)))
    if blocks.FP8:
        first = (both & 0xFF).to(tl.float32)
        second = ((both >> 8) & 0xFF).to(tl.float32)
    else:
        first = (both & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        second = (both >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return each(first, blocks), each(second, blocks)


@triton.jit
def each(x, blocks):
    """What `x` `[blocks]` says of each block, in a matrix of one query."""
    if blocks.QUERY_ROWS:
        x = x[None, :]
    else:
        x = x[:, None]
    return x


@triton.jit
def multiply(vectors, q, blocks, more=None):
    """Products, a matrix, of `vectors` `[blocks, DP]` with queries (`[DP, queries]`, or `[queries, DP]` in rows); and
    `more`, to which they are added."""
    if blocks.QUERY_ROWS:
        product = tl.dot(q, tl.trans(vectors), more)
    else:
        product = tl.dot(vectors, q, more)
    return product


@triton.jit
def logarithm(x, blocks):
    """Log of `x` in units of the logits."""
    if blocks.NAT == 1.0:
        x = tl.log(x)
    else:
        x = tl.log2(x)
    return x
