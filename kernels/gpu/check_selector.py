"""A selector's device functions against its class: what they store, and how they score in decode and in prefill.

For whoever writes a selector (`examples/write_your_own_selector.py`), and for the tests of the built-in ones. Without a
GPU it takes `TRITON_INTERPRET=1`, set before Triton is imported.
"""

import math

import torch
import triton
import triton.language as tl

from ...algorithm.selectors import get_selector
from ...algorithm.statistics_format import decode, encode
from .selectors import gpu_selector, largest_exponent, log_sum, sum_over
from .statistics import LOG2E, Block, Blocks

_BLOCKS, _QUERIES = 16, 16


@triton.jit
def store_blocks_kernel(
    keys_ptr,  # [blocks, UNIT + 1, 2 D]: blocks that are pages, as the cache has them, one row too many
    slots_ptr,  # [1] int64: -1, no token of a block is in the batch
    statistics_ptr,  # [blocks, STRIDE]
    SELECTOR: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    STRIDE: tl.constexpr,
    FP8: tl.constexpr,
    LIMIT: tl.constexpr,
):
    page = tl.program_id(0)
    base = keys_ptr + page * (UNIT + 1) * 2 * D
    area = statistics_ptr + page * STRIDE
    SELECTOR.store(Block(keys_ptr, slots_ptr, base, 0, 0, UNIT - 1, 0, 0, 0, area, D, DP, UNIT, UNIT, TILE, FP8, LIMIT))


@triton.jit
def score_blocks_kernel(
    query_ptr,  # [QUERIES, D]
    statistics_ptr,
    out_ptr,  # [3, blocks, QUERIES] float32: score, mass, product with the mean key
    scale,
    SELECTOR: tl.constexpr,
    BLOCKS: tl.constexpr,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    UNIT: tl.constexpr,
    STRIDE: tl.constexpr,
    FP8: tl.constexpr,
    ROWS: tl.constexpr,
    LOG_UNIT: tl.constexpr,
    NAT: tl.constexpr,
):
    index, n, column = tl.arange(0, BLOCKS), tl.arange(0, QUERIES), tl.arange(0, DP)
    in_head = column < D
    first = statistics_ptr + index * STRIDE
    rows = first[:, None] + column[None, :]
    out = out_ptr + index[:, None] * QUERIES + n[None, :]
    if ROWS:
        out = tl.trans(out)
        q = tl.load(query_ptr + n[:, None] * D + column[None, :], mask=in_head[None, :], other=0.0)
    else:
        q = tl.load(query_ptr + n[None, :] * D + column[:, None], mask=in_head[:, None], other=0.0)
    query = SELECTOR.prepare(q, scale, ROWS, NAT)
    score, mass, product = SELECTOR.score(
        query,
        Blocks(
            first, rows, in_head[None, :], scale * NAT, LOG_UNIT, D, DP, FP8, D != DP, ROWS, UNIT, LOG_UNIT, NAT
        ),
    )  # fmt: skip
    if ROWS:
        top = largest_exponent(score)
        tl.store(out, (top + tl.log2(sum_over(score, top))) / NAT)
    else:
        tl.store(out, log_sum(score))
    if len(mass) > 0:
        if ROWS:
            top = largest_exponent(mass)
            tl.store(out + BLOCKS * QUERIES, (top + tl.log2(sum_over(mass, top))) / NAT)
        else:
            tl.store(out + BLOCKS * QUERIES, log_sum(mass))
        tl.store(out + 2 * BLOCKS * QUERIES, product * scale)


def check_gpu_selector(
    name: str,
    *,
    head_size: int = 64,
    block: int = 32,
    dtype: torch.dtype = torch.float16,
    fp8: bool = False,
    device: torch.device | str = "cpu",
    tolerance: float = 2e-3,
) -> None:
    """Compare on random keys and queries.

    Args:
        name: Of the selector.
        head_size: `d`.
        block: Tokens a selection block.
        dtype: Of keys and queries, and of statistics unless `fp8`.
        fp8: Whether statistics are bytes.
        device: `cpu` where kernels are interpreted.
        tolerance: The largest error of a number, over 1 and its size.

    Raises:
        ValueError: The selector has no device functions, or one of them says something else than its class.
    """
    selector, functions = get_selector(name), gpu_selector(name)
    formats = selector.formats(head_size) if fp8 else None
    if fp8 and formats is None:
        raise ValueError(f"selector {name!r} does not say how its statistics are stored in bytes: override formats")
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    keys = draw(_BLOCKS, block + 1, 2 * head_size)
    keys[:, :, :head_size] += draw(_BLOCKS, 1, head_size)
    # From logits that hardly differ to such as few keys decide.
    queries = draw(_QUERIES, head_size) * torch.linspace(0.25, 5, _QUERIES, device=device, dtype=dtype)[:, None]
    scale = head_size**-0.5
    width = selector.width(head_size)
    stride = -(-width // 16) * 16
    statistics = torch.zeros(_BLOCKS, stride, dtype=torch.uint8 if fp8 else dtype, device=device)
    padded = triton.next_power_of_2(head_size)
    constants = {"D": head_size, "DP": padded, "UNIT": block, "STRIDE": stride, "FP8": fp8}
    tile = triton.next_power_of_2(block) if functions.whole_blocks else min(64, block & -block)
    none = torch.full((1,), -1, dtype=torch.int64, device=device)
    store_blocks_kernel[(_BLOCKS,)](
        keys_ptr=keys,
        slots_ptr=none,
        statistics_ptr=statistics,
        SELECTOR=functions,
        TILE=tile,
        LIMIT=torch.finfo(dtype).max,
        **constants,
    )
    exact = selector.statistics(keys[:, :block, :head_size].double().cpu())  # [blocks, width]
    stored = statistics[:, :width].cpu()
    if formats is None:
        read = stored.double()
        _compare(name, "store", read, exact, tolerance)
    else:
        read = decode(stored, formats).double()
        off = (stored.int() - encode(exact.float(), formats).int()).abs()  # a tie may be rounded otherwise
        if int(off.max()) > 1 or float((off > 0).double().mean()) > 0.01:
            raise ValueError(f"selector {name!r}: its device function store rounds other numbers than its class makes")

    q = queries.double().cpu() * scale
    score = selector.score(q, read, block).T  # [blocks, queries]
    for rows, nat in ((False, 1.0), (True, LOG2E.value)):
        out = torch.full((3, _BLOCKS, _QUERIES), float("nan"), device=device)
        score_blocks_kernel[(1,)](
            query_ptr=queries,
            statistics_ptr=statistics,
            out_ptr=out,
            scale=scale,
            SELECTOR=functions,
            BLOCKS=_BLOCKS,
            QUERIES=_QUERIES,
            ROWS=rows,
            LOG_UNIT=math.log(block) * nat,
            NAT=nat,
            **constants,
        )
        got = out.double().cpu()
        where = f"score, of queries in {'rows' if rows else 'columns'}"
        if not selector.has_mass:  # which may leave a constant out
            _compare(name, where, got[0] - got[0].mean(0), score - score.mean(0), tolerance)
            continue
        _compare(name, where, got[0], score, tolerance)
        mass = selector.mass(q, read, block).T
        _compare(name, f"{where}, as to the mass", got[1], mass, tolerance)
        mean = keys[:, :block, :head_size].double().cpu().mean(1)
        if not fp8:  # rounded to bytes a mean is another
            _compare(name, f"{where}, as to the mean key", got[2], mean @ q.T, 5 * tolerance)


def _compare(name: str, function: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    error = (got - want).abs() / (1 + want.abs())
    worst = float(error.max())  # NaN where there is one
    if not worst < tolerance:
        at = tuple(torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape))
        raise ValueError(
            f"selector {name!r}: its device function {function}, says {float(got[at]):.5g} where its class says "
            f"{float(want[at]):.5g} (block {int(at[0])}, number {int(at[1])})"
        )
