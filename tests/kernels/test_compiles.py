"""Kernels compile for GPUs that are not there: those of Triton by `scripts/machine_code.py`, in a process of its own,
because in this one they are interpreted; the fused launch by NVRTC."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton_cases import limits

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.kernels.gpu import attention
from spla_backend.kernels.gpu.checks import check_capability
from spla_backend.kernels.gpu.decode.fused import (
    SCORED_GROUP,
    SHARED_LIMIT,
    THREADS,
    FusedDecode,
    compile_source,
    refusal,
)
from spla_backend.kernels.gpu.layer import GpuLayer
from spla_backend.kernels.gpu.store import Store
from spla_backend.kernels.interface import Layer

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/machine_code.py"
# What is compiled: each kernel once, with the most shared memory where that may matter (by what the script prints for
# 89 and 100), and for Hopper, on which the kernels run, what the report of differences is tried on. Sums of blocks in
# training are plain float32 arithmetic, the same on all GPUs whose tiles have one size: large heads are compiled for
# the GPU with the least shared memory of each size, 80 and 89.
EVERY_KERNEL = (
    r"^flashinfer: decode 8|^d256-group4: prefill dense|^two-levels-d256-km2-rem-fp8: (decode 8|prefill 64)"
    r"|^d64-group8-sketch-fp8-fp16: store 8"
)
SKETCH = "|^d64-group8-sketch-fp8-fp16: decode 8"
# Of these steps what others have in a larger form, and of `main` what is not needed for one launch.
SKIPPED = (
    r"^(flashinfer|d64-group8-sketch-fp8-fp16|main): decode .*: (prepare|attend|fine_select)_kernel"
    r"|^(flashinfer|d64-group8-sketch-fp8-fp16): decode .*: select_kernel"
)
COMPILED = {
    80: EVERY_KERNEL + "|^training: read blocks d128",
    89: EVERY_KERNEL + SKETCH + "|^training: read blocks d128",
    90: EVERY_KERNEL + "|^main: decode 8|^training: read blocks d64",
    100: EVERY_KERNEL + SKETCH + "|^training: read blocks d64",
    120: EVERY_KERNEL + "|^training: read blocks d64",
}


def load_script(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def machine_code(folder: Path, *arguments: str | Path, rc: int = 0) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "triton")}
    command = [sys.executable, SCRIPT, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == rc, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("arch", COMPILED)
def test_every_kernel_compiles_and_fits(arch: int, tmp_path: Path) -> None:
    """Into the shared memory of such a GPU, and reduces as every Triton can; the script's exit status says so."""
    output, changed = tmp_path / "a.json", tmp_path / "b.json"
    machine_code(tmp_path, "--arch", str(arch), "--only", COMPILED[arch], "--skip", SKIPPED, "--output", output)
    result = json.loads(output.read_text())
    launches = [launch for step in result["launches"].values() for launch in step]
    files = (ROOT / "kernels").rglob("*.py")  # kernels of check_selector.py are no step of an engine
    source = "".join(path.read_text() for path in files if path.name != "check_selector.py")
    assert set(re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)) < {launch["kernel"] for launch in launches}
    if arch == 90:
        result["launches"]["main: decode 8 rows"][0]["code"] |= {"digest": "0", "registers": 255}
        changed.write_text(json.dumps(result))
        said = machine_code(tmp_path, "--compare", output, changed, rc=1)
        assert re.search(r"main: decode 8 rows: \w+_kernel 1: the code differs: .*registers \d+ -> 255", said), said
        assert f"1 of {len(launches)} launches differ" in said


# Reductions ------------------------------------------------------------------------------------------------------

LANES = "[[0, 2], [0, 4], [1, 0], [0, 0], [2, 0]]"  # what Triton 3.6 gave the scores of fine blocks
TTGIR = """
#blocked = #ttg.blocked<{sizePerThread = [1, 1], threadsPerWarp = [1, 32], warpsPerCTA = [4, 1], order = [1, 0]}>
#linear = #ttg.linear<{register = [[0, 1], [4, 0]], lane = LANES, warp = [[0, 0], [0, 0]], block = []}>
#linear1 = #ttg.linear<{register = [], lane = [[0, 0, 2], [1, 0, 0], [0, 0, 4], [0, 1, 0], [0, 2, 0]], warp = []}>
module attributes {"ttg.num-warps" = 4 : i32} {
  tt.func public @kernel() {
      %1 = "tt.reduce"(%0) <{axis = AXIS : i32}> ({
      ^bb0(%2: f32 loc(unknown), %3: f32 loc(unknown)):
        %4 = arith.addf %2, %3 : f32 loc(#loc)
        tt.reduce.return %4 : f32 loc(#loc)
      }) : (TENSOR) -> tensor<8xf32, #ttg.slice<{dim = 0, parent = #linear}>> loc(#loc)
"""


def ttgir(tensor: str, axis: int, lanes: str = LANES) -> str:
    return TTGIR.replace("LANES", lanes).replace("AXIS", str(axis)).replace("TENSOR", tensor)


@pytest.mark.parametrize(
    ("tensor", "axis", "scattered"),
    [
        ("tensor<8x8xf32, #linear>", 0, True),
        ("tensor<8x8xf32, #linear>, tensor<8x8xi32, #linear>", 0, True),  # as `argmax` has them
        ("tensor<8x8xf32, #linear>", 1, False),
        ("tensor<2x8xf32, #linear>", 0, False),  # the second of the axis's bits is beyond the tensor
        ("tensor<8x8xf32, #blocked>", 0, False),
        ("tensor<8x8xf32, #ttg.slice<{dim = 0, parent = #linear1}>>", 0, False),
        ("tensor<8x8xf32, #ttg.slice<{dim = 0, parent = #linear1}>>", 1, True),  # the bit of a sliced axis between
        ("tensor<8x8xf32, #ttg.slice<{dim = 1, parent = #linear1}>>", 1, True),  # of two axes
        ("tensor<8xf32, #ttg.slice<{dim = 1, parent = #ttg.slice<{dim = 2, parent = #linear1}>}>>", 0, False),
        ("tensor<8xf32, #ttg.slice<{dim = 0, parent = #ttg.slice<{dim = 0, parent = #linear1}>}>>", 0, True),
    ],
)
def test_scattered_lanes_are_found(tensor: str, axis: int, scattered: bool) -> None:
    found = load_script("scattered_reductions").scattered_reductions(ttgir(tensor, axis))
    assert len(found) == scattered, found
    if tensor == "tensor<8x8xf32, #linear>" and scattered:
        assert found == [f"reduction over axis 0 of 8x8: lane = {LANES}"]


def test_a_duplicate_behind_the_lanes_of_an_axis_is_no_gap() -> None:
    text = ttgir("tensor<8x8xf32, #linear>", 0, "[[0, 2], [0, 4], [1, 0], [2, 0], [0, 0]]")
    assert load_script("scattered_reductions").scattered_reductions(text) == []


@pytest.mark.parametrize("tensor", ["tensor<8x8xf32, #mystery>", "tensor<*xf32>"])
def test_what_cannot_be_read_does_not_pass(tensor: str) -> None:
    with pytest.raises(ValueError, match=r"not known|cannot be read"):
        load_script("scattered_reductions").scattered_reductions(ttgir(tensor, 0))


# The fused launch ------------------------------------------------------------------------------------------------


def nvrtc_missing() -> str | None:
    """Why NVRTC cannot be had."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # RuntimeError: the library is not found
        return f"needs cuda-bindings and nvidia-cuda-nvrtc: {error}"
    return None


@dataclass(frozen=True)
class Fused:
    options: dict[str, Any] = field(default_factory=dict)
    group: int = 4
    head_size: int = 128
    dtype: torch.dtype = torch.bfloat16


@pytest.mark.parametrize(
    "case",
    [
        Fused(),
        Fused({"selector": "quest", "residual": "none"}, group=8, head_size=64, dtype=torch.float16),
        Fused({"fine_block": 16, "fine_source": "int4", "statistics_dtype": "fp8"}, group=8),
    ],
    ids=["main", "quest-d64-group8-fp16", "sketch-fp8-group8"],
)
def test_fused_launch_compiles_for_hopper(case: Fused, tmp_path: Path) -> None:
    """Alone and behind the launch that scores ahead, with registers for all its threads; and some cluster fits."""
    if missing := nvrtc_missing():
        pytest.skip(missing)
    params = SplaParameters(64, 64, 32, **case.options)
    assert refusal(params, group=case.group, head_size=case.head_size, cache_dtype=case.dtype) is None
    layer = GpuLayer(params, Layer(8 * case.group, 8, case.head_size, case.dtype, 1.0), "cpu")
    fused = FusedDecode(layer, 131072)
    blocks = next(blocks for blocks in (1, 2, 4, 8, 16) if fused.shared_bytes(blocks) <= SHARED_LIMIT)
    for scored in {False, case.group <= SCORED_GROUP}:
        functions = {"spla_fused_decode", "spla_score_units"} if scored else {"spla_fused_decode"}
        file = tmp_path / "fused.cubin"
        file.write_bytes(compile_source(fused._defines(blocks, scored).items(), (9, 0)))
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        said = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
        registers = dict(re.findall(r"Function (\w+):\s+REG:(\d+)", said.stdout + said.stderr))
        assert registers.keys() >= functions, said
        assert int(registers["spla_fused_decode"]) * THREADS <= 65536


# Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)])
def test_gpus_that_are_taken(capability: tuple[int, int]) -> None:
    check_capability(capability)


def test_an_older_gpu_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^SPLA has no kernels for a GPU of compute capability 7\.5, .*: use a GPU of 8"
    ):
        check_capability((7, 5))


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def warm_up(self: Store) -> None:
        raise triton.runtime.errors.OutOfResources(131072, 101376, "shared memory")

    monkeypatch.setattr(Store, "warm_up", warm_up)
    layer = Layer(4, 1, 128, torch.bfloat16, 1.0)
    with pytest.raises(ValueError, match=r"^SPLA's kernels for heads of 128 .* needs 131072 of shared memory and gets"):
        attention.GpuAttention(SplaParameters(16, 16, 5), layer, limits(1, 256), torch.device("cpu"))
