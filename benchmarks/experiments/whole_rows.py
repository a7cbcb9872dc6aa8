"""Up to which length rows are better attended to whole than by two levels of selection, by the number of rows.

    python benchmarks/experiments/whole_rows.py benchmarks/results/whole_rows_h200.json

Both by the fused launch at its defaults, as `benchmarks/decode.py` measures. `as_built` is what the launch does of
itself (`FusedDecode.whole_blocks`).
"""

import json
import platform
import sys
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import decode

LENGTHS = (4096, 6144, 8192, 12288, 16384)
BATCHES = (1, 2, 4, 8, 16, 32)


def main() -> None:
    rows = []
    largest = decode.Shape(max(BATCHES), max(LENGTHS), 2048, 64, 64, fine_block=16, candidates=8192, fine_source="int4")
    layer = decode.GpuLayer(largest.params, decode.LAYER, decode.DEVICE)
    pool = decode.Pool(layer, max(LENGTHS), 512, decode.MAX_STEPS * max(BATCHES), layer.state_layout.num_blocks)
    for batch in BATCHES:
        for length in LENGTHS:
            shape = decode.replace(largest, batch=batch, context=length)
            steps, row = pool.steps(shape), {"batch": batch, "context": length}
            op = shape.op()
            for name, whole in (("whole", 1 << 20), ("two_levels", 0), ("as_built", None)):
                if whole is not None:
                    op.fused.whole_blocks = lambda _, whole=whole: whole
                else:
                    del op.fused.whole_blocks
                    row["whole_tokens"] = op.fused.whole_blocks(batch) * 64
                us, spread, _, _ = decode.time_steps(decode.spla(op, pool, shape), steps)
                row |= {name: round(us, 2), f"{name}_spread": round(spread, 2)}
            rows.append(row)
            print(row, flush=True)
    about = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "hardware": torch.cuda.get_device_name(),
    }
    Path(sys.argv[1]).write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
