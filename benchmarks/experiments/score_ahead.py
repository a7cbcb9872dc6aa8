"""Decode of one layer with the scores made by a launch of their own, by how many thread blocks share a row.

    python benchmarks/experiments/score_ahead.py --out benchmarks/results/score_ahead_h200.json

Protocol, data and shapes of `benchmarks/decode.py`: budget 2048 tokens, pages of 64, a graph of steady steps, medians.
Every number of thread blocks is compared with what the clusters make of their own scores (`score_blocks` 0), head by
head. `spla_score` is the launch that scores alone, `spla_rest` the one behind it alone. Rows as those of `decode.py`,
and `score_blocks`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import decode  # noqa: E402

from spla_backend.evaluate.report import hardware, versions  # noqa: E402
from spla_backend.kernels.gpu.decode.fused import Module  # noqa: E402

CASES = ((524288, 1), (524288, 2), (393216, 1), (262144, 1), (131072, 1))
SCORE_BLOCKS = (0, 33, 66, 100, 120, 132, 150, 198)


def nothing(*_: object) -> None:
    """In place of a launch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--statistics", default="auto,fp8", help="how statistics are stored")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    bandwidth = decode.copy_bandwidth()
    rows = []
    for statistics_dtype in args.statistics.split(","):
        torch.cuda.empty_cache()
        pool = None
        for context, batch in CASES:
            shape = decode.Shape(batch, context, 2048, 64, 64, "rem", statistics_dtype)
            op = shape.op()
            if op.fused is None or not op.fused.pays(batch):
                continue
            if pool is None:
                row_bytes = context * decode.KV_HEADS * op.layer.page_layout.rows // 64 * 4 * decode.HEAD_SIZE
                num_rows = min(int((torch.cuda.mem_get_info()[0] - 8e9) / row_bytes), 64)
                pool = decode.Pool(op.layer, context, num_rows, num_states=64)
            steps = pool.steps(shape)
            about = {
                "batch": batch,
                "context": context,
                "budget": 2048,
                "page": 64,
                "statistics_dtype": statistics_dtype,
            }

            def note(impl: str, us: float, score_blocks: int | None = None, about: dict[str, Any] = about) -> None:
                rows.append({"impl": impl, **about, "us": round(us, 2)})
                if score_blocks is not None:
                    rows[-1]["score_blocks"] = score_blocks
                print(json.dumps(rows[-1]), flush=True)

            note("fa3", decode.time_steps(decode.fa3(pool, shape), steps)[0])
            note("floor", batch * decode.spla_bytes(shape) / bandwidth * 1e6)
            run = decode.spla(op, pool, shape)
            expected = None
            for score_blocks in SCORE_BLOCKS:
                if batch * score_blocks > 264:
                    continue
                op.fused.fixed_score_blocks = score_blocks
                for step in steps:
                    step.output.fill_(float("nan"))
                    run(step)
                output = torch.cat([step.output for step in steps]).unflatten(1, (decode.KV_HEADS, decode.GROUP))
                expected = output.clone() if expected is None else expected
                # Blocks that are level may change places: another order of sums.
                wrong = float((decode.relative_error(output, expected) > decode.TOLERANCE).double().mean())
                if wrong > 0.02:
                    sys.exit(f"{shape}, {score_blocks} thread blocks: {wrong:.1%} of the heads differ")
                note("spla", decode.time_steps(run, steps)[0], score_blocks)
            with mock.patch.object(Module, "decode", nothing):
                note("spla_score", decode.time_steps(run, steps)[0], op.fused.fixed_score_blocks)
            with mock.patch.object(Module, "score", nothing):
                note("spla_rest", decode.time_steps(run, steps)[0], op.fused.fixed_score_blocks)
    about_run = {"command": " ".join(["python", *sys.argv]), "versions": versions(), "hardware": hardware()}
    args.out.write_text(json.dumps(about_run | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
