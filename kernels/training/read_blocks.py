"""What every query of a sequence reads from the sums of the blocks that are chosen for it, differentiable (training).

Plain reference: `Residual.read_blocks` without a reader, `sum over chosen b of phi(q) S_b`. That writes what every
query reads of every block, `N blocks E` float32, and reads it again to sum it, several times over with the backward
pass. Here it stays in registers: a program multiplies a tile of queries with one block's sums after another, leaving
out blocks that none of the tile reads. The gradient of the queries is the same with transposed sums; that of the sums
is a second kernel, a program for a block, which goes over the queries. Sums are in float32, products in TF32 where
torch's are.

FLOP: `2 N D E` a block that is read, for each of the three products.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ..gpu.capability import is_narrow

TILE = 128
SMALL_TILE = 64
"""Queries at a time; the second where one block's sums of `MOST` leave no room for more in shared memory."""
MOST = 128
"""The most features, and elements of a value, of which a block's sums fit registers."""


@triton.jit
def _read(
    q_ptr,  # [rows, N, D]
    s_ptr,  # [rows, blocks, D, E], any strides
    chosen_ptr,  # [rows, N, blocks]
    out_ptr,  # [rows, N, E]
    n_queries,
    n_blocks,
    s_row_stride,
    s_block_stride,
    s_d_stride,
    s_e_stride,
    D: tl.constexpr,
    E: tl.constexpr,
    DP: tl.constexpr,
    EP: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out[n] = sum over chosen b of q[n] S[b]`."""
    row = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0) * TILE + tl.arange(0, TILE)
    d, e = tl.arange(0, DP), tl.arange(0, EP)
    exists = query < n_queries
    q = tl.load(
        q_ptr + (row * n_queries + query[:, None]) * D + d[None, :], mask=exists[:, None] & (d < D)[None, :], other=0.0
    )
    s_ptrs = s_ptr + row * s_row_stride + d[:, None] * s_d_stride + e[None, :] * s_e_stride
    s_mask = (d < D)[:, None] & (e < E)[None, :]
    chosen_ptrs = chosen_ptr + (row * n_queries + query) * n_blocks
    acc = tl.zeros((TILE, EP), tl.float32)
    for block in range(n_blocks):
        chosen = tl.load(chosen_ptrs + block, mask=exists, other=0).to(tl.int32)  # [TILE]
        if tl.max(chosen, axis=0) > 0:
            s = tl.load(s_ptrs + block * s_block_stride, mask=s_mask, other=0.0)
            part = tl.where((chosen > 0)[:, None], q, 0.0)
            acc = tl.dot(part, s, acc, input_precision=PRECISION)
    tl.store(
        out_ptr + (row * n_queries + query[:, None]) * E + e[None, :], acc, mask=exists[:, None] & (e < E)[None, :]
    )


@triton.jit
def _sum_outer(
    q_ptr,  # [rows, N, D]
    g_ptr,  # [rows, N, E]
    chosen_ptr,  # [rows, N, blocks]
    out_ptr,  # [rows, blocks, D, E]
    n_queries,
    n_blocks,
    D: tl.constexpr,
    E: tl.constexpr,
    DP: tl.constexpr,
    EP: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out[b] = sum over the n that chose b of outer(q[n], g[n])`."""
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    query = tl.arange(0, TILE)
    d, e = tl.arange(0, DP), tl.arange(0, EP)
    acc = tl.zeros((DP, EP), tl.float32)
    for first in range(0, n_queries, TILE):
        n = row * n_queries + first + query
        exists = first + query < n_queries
        chosen = tl.load(chosen_ptr + n * n_blocks + block, mask=exists, other=0).to(tl.int32)  # [TILE]
        if tl.max(chosen, axis=0) > 0:
            wanted = chosen > 0
            q = tl.load(q_ptr + n[None, :] * D + d[:, None], mask=wanted[None, :] & (d < D)[:, None], other=0.0)
            g = tl.load(g_ptr + n[:, None] * E + e[None, :], mask=wanted[:, None] & (e < E)[None, :], other=0.0)
            acc = tl.dot(q, g, acc, input_precision=PRECISION)
    tl.store(
        out_ptr + ((row * n_blocks + block) * D + d[:, None]) * E + e[None, :],
        acc,
        mask=(d < D)[:, None] & (e < E)[None, :],
    )


def _constants(d: int, e: int, device: torch.device) -> dict[str, Any]:
    small = device.type != "cpu" and is_narrow(torch.cuda.get_device_capability(device))
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    padded = {"DP": max(16, triton.next_power_of_2(d)), "EP": max(16, triton.next_power_of_2(e))}
    warps = 4 if max(d, e) <= 64 else 8  # registers
    tile = SMALL_TILE if small else TILE
    return {"D": d, "E": e, **padded, "TILE": tile, "PRECISION": precision, "num_warps": warps, "num_stages": 2}


def _launch_read(q: torch.Tensor, s: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    rows, n, d = q.shape
    blocks, e = s.shape[1], s.shape[3]
    out = torch.empty(rows, n, e, dtype=q.dtype, device=q.device)
    constants = _constants(d, e, q.device)
    with torch.cuda.device_of(q):
        _read[(triton.cdiv(n, constants["TILE"]), rows)](
            q_ptr=q,
            s_ptr=s,
            chosen_ptr=chosen,
            out_ptr=out,
            n_queries=n,
            n_blocks=blocks,
            s_row_stride=s.stride(0),
            s_block_stride=s.stride(1),
            s_d_stride=s.stride(2),
            s_e_stride=s.stride(3),
            **constants,
        )
    return out


class _ReadChosenSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, s: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q, s, chosen)
        return _launch_read(q, s, chosen)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        q, s, chosen = ctx.saved_tensors
        gradient = gradient.contiguous()
        for_q = for_s = None
        if ctx.needs_input_grad[0]:
            for_q = _launch_read(gradient, s.mT, chosen)
        if ctx.needs_input_grad[1]:
            rows, blocks, d, e = s.shape
            for_s = torch.empty(rows, blocks, d, e, dtype=s.dtype, device=s.device)
            with torch.cuda.device_of(q):
                _sum_outer[(blocks, rows)](
                    q_ptr=q,
                    g_ptr=gradient,
                    chosen_ptr=chosen,
                    out_ptr=for_s,
                    n_queries=q.shape[1],
                    n_blocks=blocks,
                    **_constants(d, e, q.device),
                )
        return for_q, for_s, None


def read_chosen_sums(q: torch.Tensor, s: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Sum of `q S_b` over the blocks that are chosen for each query.

    Args:
        q: Features of queries `[rows, N, D]` float32, D at most `MOST`.
        s: Sums of each block `[rows, blocks, D, E]` float32, E likewise.
        chosen: `[rows, N, blocks]` bool.

    Returns:
        `[rows, N, E]` float32.
    """
    return _ReadChosenSums.apply(q.contiguous(), s, chosen.contiguous())
