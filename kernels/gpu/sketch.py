"""The sketch of keys (`algorithm/sketch.py`) on a GPU: made when a page completes, and read in the place of the keys.

A page's sketch stands behind its statistics: the codes of all tokens, then their scales (docs/design.md, 5). A logit by
it is the product with the mean key of the token's selection block, and over the chunks of 32 channels the product with
the codes times the chunk's scale. All chunks are one matrix product: queries have columns of their own for each, with 0
in the rows of the others. A byte has an even channel and an odd one, whose products are added.

Floor, bytes a token and kv head: 18 a chunk, and the mean key once a selection block. FLOP: `2 d` a head.
"""

import triton
import triton.language as tl

from .statistics import as_factor, block_keys, decode_e4m3

CHUNK = tl.constexpr(32)
CODES = tl.constexpr(16)  # bytes a chunk
SMALLEST = tl.constexpr(2.0**-24)  # float16
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken off again it leaves whole numbers, ties to even


@triton.jit
def store_sketch(block, SKETCH: tl.constexpr):
    """Make and store the sketch of a `Block` of at least 32 columns, whose statistics are stored and begin with the
    mean of its keys. `SKETCH`: bytes from the page's statistics to its sketch."""
    CHUNKS: tl.constexpr = (block.D + CHUNK - 1) // CHUNK
    CHUNKS_P: tl.constexpr = block.DP // CHUNK
    column = tl.arange(0, block.DP)
    centre = tl.load(block.area + column, mask=column < block.D, other=0)
    if block.FP8:
        centre = decode_e4m3(centre)
    codes = (block.base + block.PAGE * 2 * block.D).to(tl.pointer_type(tl.uint8)) + SKETCH
    scales = (codes + block.PAGE * CHUNKS * CODES).to(tl.pointer_type(tl.float16))
    chunk, byte = tl.arange(0, CHUNKS_P), tl.arange(0, CHUNKS_P * CODES)
    for first in tl.static_range(0, block.UNIT, block.TILE):
        keys, exists = block_keys(block, first)
        rest = tl.reshape(keys - centre.to(tl.float32)[None, :], [block.TILE, CHUNKS_P, CHUNK])
        high, low = tl.max(rest, axis=2), -tl.min(rest, axis=2)
        scale = tl.clamp(tl.where(high >= low, -0.125 * high, 0.125 * low), -65504.0, 65504.0).to(tl.float16)
        divisor = tl.where(scale == 0.0, 1.0, scale.to(tl.float32))  # without a scale all is next to 0
        multiple = tl.clamp(tl.div_rn(rest, divisor[:, :, None]), -8.0, 7.0) + MAGIC - MAGIC
        even, odd = tl.split(tl.reshape((multiple + 8.0).to(tl.int32), [block.TILE, CHUNKS_P * CODES, 2]))
        row = (block.first + first + tl.arange(0, block.TILE))[:, None]
        there = exists[:, None] & (byte < CHUNKS * CODES)[None, :]
        tl.store(codes + row * (CHUNKS * CODES) + byte[None, :], (even | odd << 4).to(tl.uint8), mask=there)
        there = exists[:, None] & (chunk < CHUNKS)[None, :]
        tl.store(scales + row * CHUNKS + chunk[None, :], scale, mask=there)


@triton.jit
def queries_by_chunk(query, head_stride, GROUP: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """A token's queries as `sketch_products` wants them; `query` points to the first of the `GROUP` heads.

    Even channels, and a 16th of the odd ones, `[bytes, chunks * N]` float16, saturated; and the product with what the
    codes have too much, `[chunks * N]`.
    """
    CHUNKS_P: tl.constexpr = (DP + CHUNK - 1) // CHUNK
    byte, column = tl.arange(0, CHUNKS_P * CODES)[:, None], tl.arange(0, CHUNKS_P * N)[None, :]
    there = (byte // CODES == column // N) & (column % N < GROUP) & (byte * 2 < D)
    even = query + column % N * head_stride + byte * 2
    odd = as_factor(tl.load(even + 1, mask=there, other=0.0).to(tl.float32) / 16, query, True)
    even = as_factor(tl.load(even, mask=there, other=0.0), query, True)
    total = tl.sum(even.to(tl.float32), axis=0) + tl.sum(odd.to(tl.float32), axis=0) * 16
    return even, odd, total * (8 * SMALLEST)


@triton.jit
def sketch_products(
    sketch, token, queries, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr
):
    """Products `[TILE, N]` of keys, less the mean of their selection block, with queries from `queries_by_chunk`.

    `sketch` points to the tokens' pages' sketches, and `token` are their rows in these: one, or `[TILE]` each. Codes
    are not converted: their bits are float16, too, that many 2^-24; those of the upper halves 16 times as many.
    """
    CHUNKS: tl.constexpr = (D + CHUNK - 1) // CHUNK
    CHUNKS_P: tl.constexpr = (DP + CHUNK - 1) // CHUNK
    chunk, byte = tl.arange(0, CHUNKS_P)[None, :], tl.arange(0, CHUNKS_P * CODES)[None, :]
    code_rows = (sketch + token * (CHUNKS * CODES))[:, None] + byte
    scales_of_page = (sketch + PAGE * CHUNKS * CODES).to(tl.pointer_type(tl.float16))
    scale_rows = (scales_of_page + token * CHUNKS)[:, None] + chunk
    if CHUNKS == CHUNKS_P:
        codes, scales = tl.load(code_rows), tl.load(scale_rows)
    else:
        codes = tl.load(code_rows, mask=byte < CHUNKS * CODES, other=0)
        scales = tl.load(scale_rows, mask=chunk < CHUNKS, other=0.0)
    even, odd, excess = queries
    products = tl.dot((codes & 0x0F).to(tl.uint16).to(tl.float16, bitcast=True), even)
    products = tl.dot((codes & 0xF0).to(tl.uint16).to(tl.float16, bitcast=True), odd, products) - excess[None, :]
    products = tl.reshape(products, [TILE, CHUNKS_P, N]) * scales.to(tl.float32)[:, :, None]
    return tl.sum(products, axis=1) / SMALLEST
