"""The road that prefill did not take: a tile of neighbouring tokens over the union of the pages they select.

    python benchmarks/experiments/tile_union.py --out tile_union.json

The shipped road (`kernels/gpu/prefill/attend.py`) goes page by page: a page gathers the tokens that selected it, and
their parts are merged. Here a tile of 32 tokens attends to every page that any of them selected, each token masked to
its own; nothing is gathered, written apart or merged, but a page costs the whole tile. Both compute the same
selection, tail and state, by the package's kernels, and both are checked against the float64 reference. `union` is
how many times one token's freely chosen pages the union of a tile is. Lists of pages are made by torch operations
here, timed apart: a kernel would take a small part of that.
"""

import argparse
import contextlib
import functools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from prefill import HEAD_SIZE, TOLERANCE, Pool, check, inputs, make_op, numbers, stored, union

from spla_backend.kernels.gpu.launch import Launch, current_stream
from spla_backend.kernels.gpu.prefill.passes import Pass, PrefillPasses
from spla_backend.kernels.gpu.prefill.select import LOG2E, tile_queries


@triton.jit
def tile_union_kernel(
    query_ptr,
    kv_ptr,
    block_table_ptr,
    tiles_ptr,  # [tiles, 4] int32: row, first token, tokens, position of the first token
    tile_state_ptr,  # [tiles] int32
    count_ptr,  # [tiles, heads, TQ] int32: complete pages that a token selected
    tail_ptr,  # [tiles, heads, 2, TQ * GROUP_P] float32
    state_ptr,  # [states, G, D + 2, D] float32
    page_ptr,  # [tiles, heads, width] int32: pages of the union, places in the cache
    bits_ptr,  # [tiles, heads, width] int32: a bit for each token that selected the page
    number_ptr,  # [tiles, heads] int32: pages of the union
    output_ptr,
    query_token_stride,
    query_head_stride,
    output_token_stride,
    output_head_stride,
    page_stride,
    head_stride,
    num_kv_heads,
    first_head,
    width,
    scale,
    residual_scale,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    TQ: tl.constexpr,
    D: tl.constexpr,  # a power of two
    PAGE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (heads, tiles): `regression` residual, `shared_normalizer`, one row of the batch."""
    M: tl.constexpr = TQ * GROUP_P
    dtype = kv_ptr.dtype.element_ty
    local = tl.program_id(0)
    head = first_head + local
    tile = tl.program_id(1).to(tl.int64)
    first_token = tl.load(tiles_ptr + tile * 4 + 1)
    num_tokens = tl.load(tiles_ptr + tile * 4 + 2)
    position = tl.load(tiles_ptr + tile * 4 + 3)
    num_pages = position // PAGE
    pair = tile * tl.num_programs(0) + local
    m = tl.arange(0, M)
    member = m % GROUP_P
    token = m // GROUP_P
    exists = (token < num_tokens) & (member < GROUP)
    column = tl.arange(0, D)
    t = tl.arange(0, PAGE)
    q = tile_queries(
        query_ptr, head, first_token, num_tokens, token, member, query_token_stride, query_head_stride, GROUP, D, D
    ).to(dtype)  # [M, D]
    taken = tl.load(count_ptr + pair * TQ + token, mask=exists, other=0)
    has_rest = exists & (num_pages > taken)
    tail_row = tail_ptr + pair * 2 * M + token * GROUP_P + member
    log_mean = tl.load(tail_row, mask=has_rest, other=float("-inf"))
    center = tl.load(tail_row + M, mask=has_rest, other=0.0)
    unit = scale * LOG2E
    # The current page first: after it every row has a finite maximum.
    page = tl.load(block_table_ptr + num_pages).to(tl.int64)
    there = position // PAGE * PAGE + t < position + num_tokens
    rows = kv_ptr + page * page_stride + head * head_stride + (t * 2 * D)[:, None] + column[None, :]
    k = tl.load(rows, mask=there[:, None], other=0.0)
    v = tl.load(rows + D, mask=there[:, None], other=0.0)
    seen = there[None, :] & ((num_pages * PAGE + t)[None, :] <= (position + token)[:, None])
    logit = tl.where(seen, tl.dot(q, tl.trans(k)) * unit, float("-inf"))
    top = tl.maximum(log_mean, tl.max(logit, axis=1))
    weight = tl.exp2(logit - top[:, None])
    total = tl.sum(weight, axis=1)
    out = tl.dot(weight.to(dtype), v)  # [M, D]
    number = tl.load(number_ptr + pair)
    where = page_ptr + pair * width
    next_page = tl.load(where)
    next_bits = tl.load(bits_ptr + pair * width)
    for item in tl.range(0, number, num_stages=STAGES):
        # Fetched a step ahead, as in the package's kernels; the pipeline also looks behind the end.
        base = kv_ptr + tl.maximum(next_page, 0).to(tl.int64) * page_stride + head * head_stride
        bits = next_bits
        ahead = tl.minimum(item + 1, number - 1)
        next_page = tl.load(where + ahead)
        next_bits = tl.load(bits_ptr + pair * width + ahead)
        place = base + (t * 2 * D)[:, None] + column[None, :]
        k = tl.load(place)
        v = tl.load(place + D)
        mine = ((bits >> token) & 1) == 1  # [M]
        product = tl.dot(q, tl.trans(k))  # [M, PAGE]
        new_top = tl.maximum(top, tl.where(mine, tl.max(product, axis=1) * unit, float("-inf")))
        decay = tl.exp2(top - new_top)
        weight = tl.where(mine[:, None], tl.exp2(product * unit - new_top[:, None]), 0.0)
        total = total * decay + tl.sum(weight, axis=1)
        level = tl.where(mine, tl.exp2(log_mean - new_top), 0.0)
        slope = level * (residual_scale * scale)
        weight -= product * slope[:, None] + (level * (1.0 - residual_scale * center))[:, None]
        out = tl.dot(weight.to(dtype), v, out * decay[:, None])
        top = new_top
    # The state's share, as in `prefill_merge_kernel`.
    state = state_ptr + (tl.load(tile_state_ptr + tile).to(tl.int64) * num_kv_heads + head) * (D + 2) * D
    read = tl.zeros([M, D], dtype=tl.float32)
    query = query_ptr + (first_token + token).to(tl.int64) * query_token_stride
    query += (head * GROUP + member) * query_head_stride
    for begin in tl.static_range(0, D, 32):
        f = begin + tl.arange(0, 32)
        features = tl.load(query[:, None] + f[None, :], mask=exists[:, None], other=0.0).to(dtype).to(tl.float32)
        s = tl.load(state + f[:, None] * D + column[None, :])
        s_high = (s.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        read = tl.dot(features, s_high, read, input_precision="tf32")
        read = tl.dot(features, s - s_high, read, input_precision="tf32")
    num_rest = ((num_pages - taken) * PAGE).to(tl.float32)
    level = tl.exp2(log_mean - top)
    sum_v = tl.load(state + D * D + column)
    tail = residual_scale * scale * read + (1.0 - residual_scale * center)[:, None] * sum_v[None, :]
    out += tl.where(has_rest[:, None], level[:, None] * tail, 0.0)
    total += level * num_rest
    result = out / tl.where(exists, total, 1.0)[:, None]
    output = output_ptr + (first_token + token).to(tl.int64) * output_token_stride
    output += (head * GROUP + member) * output_head_stride
    tl.store(output[:, None] + column[None, :], result.to(output_ptr.dtype.element_ty), mask=exists[:, None])


def union_lists(
    op: PrefillPasses, step: Pass, block_table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pages and token bits `[tiles, heads, width]` int32 of every tile, and how many there are `[tiles, heads]`."""
    pairs, tokens = len(step.tiles) * step.heads, op.tile_tokens
    table = op.scratch["table"].flatten()[: pairs * tokens * op.slots].view(pairs, tokens, op.slots).long()
    count = op.scratch["count"][: pairs * tokens].view(pairs, tokens)
    exists = torch.arange(tokens, device=table.device) < step.tiles[:, 2:3]  # [tiles, tokens]
    exists = exists[:, None].expand(-1, step.heads, -1).reshape(pairs, tokens)
    valid = (torch.arange(op.slots, device=table.device) < count[..., None]) & exists[..., None]
    bit = (1 << torch.arange(tokens, device=table.device))[None, :, None].expand_as(table)
    # What is not valid goes to a place of its own.
    place = torch.where(valid, table, step.max_complete).flatten(1)
    bits = torch.zeros(pairs, step.max_complete + 1, dtype=torch.int64, device=table.device)
    bits.scatter_add_(1, place, (bit * valid).flatten(1))
    bits = bits[:, :-1]
    number = (bits != 0).sum(1)
    pages = (bits == 0).to(torch.int8).sort(dim=1, stable=True).indices[:, : int(number.max())]
    bits = bits.gather(1, pages)
    bits = torch.where(bits >= 2**31, bits - 2**32, bits)
    shape = len(step.tiles), step.heads, -1
    return block_table[0][pages].view(shape), bits.int().view(shape), number.int().view(shape[:2])


class Clock:
    """Milliseconds of the parts of a run, summed."""

    def __init__(self) -> None:
        self._events: dict[str, list] = defaultdict(list)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events[name].append((begin, end))

    def times(self) -> dict[str, float]:
        torch.cuda.synchronize()
        return {name: round(sum(a.elapsed_time(b) for a, b in x), 3) for name, x in self._events.items()}


def launch_all(tensors: dict[str, torch.Tensor], stream: int | None, launches: list[Launch]) -> None:
    addresses = {name: x.data_ptr() for name, x in tensors.items()}
    for launch in launches:
        launch(addresses, lambda: tensors, stream)


def run_both(
    op: PrefillPasses, pool: Pool, query: torch.Tensor, shipped: torch.Tensor, united: torch.Tensor, start: int
) -> tuple[dict[str, float], list[float]]:
    """All passes of the tokens `query` from `start` on, by both roads; times, and the unions of some passes."""
    layer, clock, overlaps = op.layer, Clock(), []
    cache, stream = pool.kv_cache, current_stream(op.device)
    own = {"query": query, "kv": cache, "state": cache, "block_table": pool.block_table,
           "state_table": pool.state_table, "output": shipped}  # fmt: skip
    for step in op.plan(0, [0, len(query)], [start + len(query)]).passes:
        states, *launches = op.bind(step, own, ())
        tensors = own | op.weights | {"kv_int": cache.view(torch.int32), "state_int": cache.view(torch.int32),
                                       "state": cache.view(torch.float32)}  # fmt: skip
        launch = functools.partial(launch_all, tensors, stream)
        launch([states])
        for index, first_head in enumerate(range(0, layer.num_kv_heads, step.heads)):
            score, share, select, work, lists, attend, merge = launches[7 * index : 7 * index + 7]
            with clock.part("scores and selection"):
                launch([score, share, select])
            with clock.part("page by page: lists"):
                launch([work, lists])
            with clock.part("page by page: attention"):
                launch([attend])
            with clock.part("page by page: merge"):
                launch([merge])
            with clock.part("union: lists, torch"):
                pages, bits, number = union_lists(op, step, pool.block_table)
            overlaps.append(union(op, step))
            with clock.part("union: attention"):
                tile_union_kernel[(step.heads, len(step.tiles))](
                    query_ptr=query,
                    kv_ptr=cache,
                    block_table_ptr=pool.block_table,
                    tiles_ptr=step.tiles,
                    tile_state_ptr=step.tile_state,
                    count_ptr=op.scratch["count"],
                    tail_ptr=op.scratch["tail"],
                    state_ptr=op.scratch["states"],
                    page_ptr=pages,
                    bits_ptr=bits,
                    number_ptr=number,
                    output_ptr=united,
                    query_token_stride=query.stride(0),
                    query_head_stride=query.stride(1),
                    output_token_stride=united.stride(0),
                    output_head_stride=united.stride(1),
                    page_stride=cache.stride(0),
                    head_stride=cache.stride(1),
                    num_kv_heads=layer.num_kv_heads,
                    first_head=first_head,
                    width=pages.shape[-1],
                    scale=layer.scale,
                    residual_scale=layer.params.residual_scale,
                    GROUP=layer.group,
                    GROUP_P=layer.group_p,
                    TQ=op.tile_tokens,
                    D=HEAD_SIZE,
                    PAGE=layer.params.page_size,
                    STAGES=2,
                    num_warps=8,
                )
    return clock.times(), overlaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="32768,131072")
    parser.add_argument("--kinds", default="uniform,drifting,captured")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict] = []
    for context in numbers(args.contexts):
        op = make_op(context, 2048, context, dense_below=2048)
        pool = Pool(op.layer, context, 1)
        start = 16384  # where the backend begins to select
        for kind in args.kinds.split(","):
            query = inputs(pool, context, kind)[start:]
            shipped, united = (torch.full_like(query, float("nan")) for _ in range(2))
            run_both(op, pool, query, shipped, united, start)
            known = stored(pool)
            errors = [check(op, known, query, x, start)[0] for x in (shipped, united)]
            if not max(errors) < TOLERANCE or bool(united.isnan().any()):
                raise RuntimeError(f"{context}, {kind}: NaN, or relative errors {errors}")
            times, overlaps = run_both(op, pool, query, shipped, united, start)
            rows.append({"context": context, "from": start, "kind": kind, "gpu": torch.cuda.get_device_name(),
                         "union": round(sum(overlaps) / len(overlaps), 2), "ms": times,
                         "errors": [round(e, 5) for e in errors]})  # fmt: skip
            print(rows[-1], flush=True)
            if args.out:
                args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
