"""What fp8 statistics lose where keys have huge components: keys of SmolLM2 shifted by a constant.

    python benchmarks/experiments/fp8_of_shifted_keys.py

A constant that is added to all keys changes no attention weight, and so nothing but the rounding of statistics is seen.
Two pairs of coordinates that RoPE hardly turns are shifted, as biases of keys shift them. On the three kv heads and 64
queries of tests/data/smollm2_qkv.safetensors, budget 512 of 1536 tokens, without a residual. Statistics are rounded to
bfloat16, as a bfloat16 cache holds them, or to fp8. Prints captured mass and output error.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.selectors import block_statistics
from spla_backend.evaluate.fidelity import HeadGroup, Point

COORDINATES, SIGNS = [30, 31, 62, 63], torch.tensor([1.0, 1.0, -1.0, -1.0])
BUDGET = 512


def main() -> None:
    data = load_file(Path(__file__).parents[2] / "tests" / "data" / "smollm2_qkv.safetensors")
    queries, keys, v = (data[name].float().transpose(0, 1) for name in ("q", "k", "v"))
    length, num_queries, d = keys.shape[1], queries.shape[1], keys.shape[2]
    positions = torch.arange(length - num_queries, length)
    for shift in (0, 16, 50, 100, 200, 400):
        k = keys.clone()
        k[:, :, COORDINATES] += shift * SIGNS
        for selector, block in (("rem", 64), ("rem", 16), ("km2-rem", 16)):
            row: dict[str, object] = {"shift": shift, "selector": selector, "block": block}
            for dtype in ("auto", "fp8"):
                params = SplaParameters(
                    64, block, BUDGET // block, selector=selector, residual="none", statistics_dtype=dtype
                )
                mass, error = [], []
                for g in range(len(k)):
                    statistics = block_statistics(k[g].unflatten(0, (-1, block)), params)
                    stored = {
                        (selector, block, dtype): statistics.bfloat16().float() if dtype == "auto" else statistics
                    }
                    q = queries.unflatten(0, (len(k), -1))[g].transpose(0, 1) * d**-0.5
                    group = HeadGroup(q, k[g], v[g], positions, stored)
                    rest = group.select(Point(params))
                    mass.append(group.captured_mass(rest, block).mean())
                    error.append(group.output_error(rest, params).mean())
                name = "bfloat16" if dtype == "auto" else dtype
                row[name] = [round(torch.stack(x).mean().item(), 4) for x in (mass, error)]
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
