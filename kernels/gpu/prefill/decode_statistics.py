"""Statistics that are bytes, as float16 side by side: a pass multiplies them with queries again and again.

Bytes would have to pass through registers before each product. Plain reference: `algorithm/statistics_format.decode`.
Floor: 3 bytes a number.
"""

import triton
import triton.language as tl

from ....algorithm.statistics_format import COUNT, E4M3, E5M2
from ..statistics import decode_e4m3, decode_e5m2

KINDS = {E4M3: 0, E5M2: 1, COUNT: 2}
_E4M3, _E5M2 = tl.constexpr(0), tl.constexpr(1)


@triton.jit(do_not_specialize=["block_table_stride", "last_page", "num_places"])
def prompt_statistics_kernel(
    kv_ptr,
    block_table_ptr,
    groups_ptr,  # [groups, 4] int32
    runs_ptr,  # [runs, 3] int32: first group, groups, row
    group_place_ptr,  # [groups] int32: place of the first unit of a group's row
    decoded_ptr,  # [G, num_places, STRIDE] float16
    page_stride,
    head_stride,
    block_table_stride,
    last_page,
    num_places,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    STRIDE: tl.constexpr,  # numbers from the statistics of one unit to the next
    KINDS: tl.constexpr,  # of consecutive numbers, and how many of them
    SIZES: tl.constexpr,
    SIZE_P: tl.constexpr,  # a power of two, at least each of SIZES
    UNITS: tl.constexpr,  # a program
):
    """Grid (units / UNITS, G, runs)."""
    head = tl.program_id(1)
    run = tl.program_id(2)
    first_group = tl.load(runs_ptr + run * 3)
    last_group = first_group + tl.load(runs_ptr + run * 3 + 1) - 1
    row = tl.load(runs_ptr + run * 3 + 2).to(tl.int64)
    PER_PAGE: tl.constexpr = PAGE // UNIT
    num_units = tl.load(groups_ptr + last_group * 4 + 3) // PAGE * PER_PAGE
    index = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    exists = index < num_units
    page = tl.load(block_table_ptr + row * block_table_stride + index // PER_PAGE, mask=exists, other=0)
    page = tl.minimum(tl.maximum(page, 0), last_page).to(tl.int64)
    area = kv_ptr + page * page_stride + head * head_stride + PAGE * 2 * D
    source = area.to(tl.pointer_type(tl.uint8)) + index % PER_PAGE * STRIDE  # [UNITS]
    place = head.to(tl.int64) * num_places + tl.load(group_place_ptr + first_group) + index
    target = decoded_ptr + place * STRIDE
    column = tl.arange(0, SIZE_P)
    AT = 0
    for i in tl.static_range(len(KINDS)):
        mask = exists[:, None] & (column < SIZES[i])[None, :]
        byte = tl.load(source[:, None] + AT + column[None, :], mask=mask, other=0)
        if KINDS[i] == _E4M3:
            number = decode_e4m3(byte)
        elif KINDS[i] == _E5M2:
            number = decode_e5m2(byte)
        else:
            number = byte.to(tl.float16)
        tl.store(target[:, None] + AT + column[None, :], number, mask=mask)
        AT += SIZES[i]
