"""Decode attention between matrix-vector products that push everything else out of the caches, as in a model.

    python benchmarks/experiments/cold_caches.py --out benchmarks/results/cold_caches_h200.json

A CUDA graph of eight layers, each with the products of an 8B Llama shape at batch 1 (436 MB of weights) and, between
the first and the second, nothing, `update_cache`, SPLA or FA3. Microseconds a layer, medians of 55 replays: the
products alone, what attention takes over them, and attention without the products.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import decode  # noqa: E402

from spla_backend.evaluate.report import hardware, versions  # noqa: E402
from spla_backend.kernels.gpu.store import Store  # noqa: E402

LAYERS = 8
HIDDEN, INTERMEDIATE = 4096, 14336
QKV = (decode.HEADS + 2 * decode.KV_HEADS) * decode.HEAD_SIZE
Attention = Callable[[decode.Rows], object]


def weights() -> list[tuple[torch.Tensor, ...]]:
    """Of queries, keys and values; of the output; of gate and up; of down."""
    shapes = ((QKV, HIDDEN), (HIDDEN, HIDDEN), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    return [tuple(0.02 * torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes) for _ in range(LAYERS)]


def microseconds(layers: list[tuple[torch.Tensor, ...]] | None, attend: Attention | None, steps: list) -> float:
    """A layer's time, with the products of `layers` or without any."""
    linear = torch.nn.functional.linear
    x = torch.randn(1, HIDDEN, device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        out = x
        for i in range(LAYERS):
            if layers:
                out = linear(out, layers[i][0])[:, :HIDDEN]
            if attend:
                attend(steps[i])
            if layers:
                out = linear(linear(linear(out, layers[i][1]), layers[i][2])[:, :INTERMEDIATE], layers[i][3])

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(60):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / LAYERS)
    return statistics.median(times[5:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[131072, 8192])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    layers, rows = weights(), []
    for context in args.contexts:
        shape = decode.Shape(1, context, budget=2048, page=64, block=64)
        op = shape.op()
        pool, store = decode.Pool(op.layer, context, LAYERS), Store(op.layer)
        steps = pool.steps(shape)[:LAYERS]
        spla, fa3 = decode.spla(op, pool, shape), decode.fa3(pool, shape)
        key, value = torch.randn(2, 1, decode.KV_HEADS, decode.HEAD_SIZE, device="cuda", dtype=torch.bfloat16)
        # A slot of the last page that does not complete it, as in nearly all steps.
        slots = {id(r): r.block_table[0, (context - 1) // 64].long().view(1) * 64 + 30 for r in steps}

        def update(r: decode.Rows) -> None:
            store.update_cache(key, value, pool.kv_cache, slots[id(r)])  # noqa: B023, called before the next context

        def update_and(attend: Attention) -> Attention:
            return lambda r: (update(r), attend(r))  # noqa: B023

        products = microseconds(layers, None, steps)
        for name, attend in (
            ("update_cache", update),
            ("spla", spla),
            ("update_cache + spla", update_and(spla)),
            ("fa3", fa3),
            ("update_cache + fa3", update_and(fa3)),
        ):
            row = {"context": context, "between": name, "products_us": round(products, 2)}
            row["over_products_us"] = round(microseconds(layers, attend, steps) - products, 2)
            row["warm_us"] = round(microseconds(None, attend, steps), 2)
            rows.append(row)
            print(row, flush=True)
    if args.out:
        about = {"command": " ".join(["python", *sys.argv]), "versions": versions(), "hardware": hardware()}
        args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
