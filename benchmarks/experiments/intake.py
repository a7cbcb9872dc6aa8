"""What a multiprocessor takes in: scattered rows and larger pieces, by asynchronous copies, bulk copies and loads.

    python benchmarks/experiments/intake.py --out benchmarks/results/intake_h200.json

`intake.cu`, a thread block a multiprocessor, half of the multiprocessors or nearly all; pieces at random places of
8 GiB, read for the first time (`memory`) or again (`l2`). Medians over blocks and ten runs, in microseconds at the
clock named.
"""

import argparse
import ctypes
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from spla_backend.evaluate.report import hardware, versions

SOURCE = Path(__file__).with_suffix(".cu")
WAYS = (("async", 0, 512), ("async", 0, 8192), ("bulk", 1, 512), ("bulk", 1, 2048), ("bulk", 1, 8192), ("load", 2, 512))
BYTES = 8 << 30
SHARED = 216 << 10


def checked(result: tuple) -> Any:
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(str(error))
    return values[0] if values else None


def kernel() -> Any:
    from cuda.bindings import driver, nvrtc

    program = checked(nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), SOURCE.name.encode(), 0, [], []))
    checked(nvrtc.nvrtcCompileProgram(program, 1, [b"--gpu-architecture=sm_90a"]))
    cubin = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    module = checked(driver.cuModuleLoadData(cubin))
    function = checked(driver.cuModuleGetFunction(module, b"intake"))
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver.cuFuncSetAttribute(function, limit, SHARED))
    return module, function


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ghz", type=float, default=1.755, help="clock of the multiprocessors (%(default)s)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from cuda.bindings import driver

    base = torch.empty(BYTES, dtype=torch.uint8, device="cuda").random_()
    clocks = torch.zeros(200000, dtype=torch.int64, device="cuda")
    _module, function = kernel()

    def clocks_of(way: int, piece: int, total: int, blocks: int, again: bool) -> float:
        times = []
        for run in range(12):
            if run == 0 or not again:
                places = torch.randint(0, BYTES // piece - 1, (blocks * total // 512,), device="cuda")
                at = (places * (piece // 512)).to(torch.int32)
                torch.cuda.synchronize()
            values = [ctypes.c_void_p(x.data_ptr()) for x in (base, at, clocks)]
            values += [ctypes.c_int(x) for x in (way, piece, total)]
            pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
            stream = torch.cuda.current_stream().cuda_stream
            checked(
                driver.cuLaunchKernel(function, blocks, 1, 1, 256, 1, 1, SHARED, stream, ctypes.addressof(pointers), 0)
            )
            torch.cuda.synchronize()
            times.append(float(clocks[:blocks].float().median()))
        return statistics.median(times[2:])

    rows = []
    for blocks in (64, 128):
        for again in (False, True):
            for total in (65536, 131072):
                for name, way, piece in WAYS:
                    us = clocks_of(way, piece, total, blocks, again) / args.ghz * 1e-3
                    row = {"blocks": blocks, "from": "l2" if again else "memory", "bytes": total, "way": name}
                    rows.append(row | {"piece": piece, "us": round(us, 2)})
                    print(rows[-1], flush=True)
    if args.out:
        about = {"command": " ".join(["python", *sys.argv]), "versions": versions(), "hardware": hardware()}
        args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
