#!/usr/bin/env python3
"""The machine code of all Triton kernels for a GPU that need not be there, and what differs between two trees.

    python scripts/machine_code.py --arch 90 --output after.json
    PYTHONPATH=../before python scripts/machine_code.py --arch 90 --output before.json
    python scripts/machine_code.py --compare before.json after.json

It runs the project's own classes, on tensors without memory, through the steps of an engine: storing, decode, prefill,
training. Their launches compile as on a GPU, and are then noted down instead of made. A launch is known by its geometry
and step, its kernel's function and its number among those; not by files, so that two trees may be laid out differently.
Its code is the bytes that `ptxas` made of it, in which no name and no line number is.

The exit status is 1 where launches differ, where one needs more shared memory than the GPU has, or where one reduces
over lanes that are no neighbours (`scattered_reductions.py`).
"""

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # compiled, whatever the shell says
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"

import torch
import triton
from scattered_reductions import scattered_reductions
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget

import spla_backend
from spla_backend.algorithm.parameters import SplaParameters

GPUS = {80: (108, 163), 86: (84, 99), 89: (142, 99), 90: (132, 227), 100: (148, 227), 120: (188, 99)}
"""Multiprocessors of a GPU of a compute capability, and KiB of shared memory that a thread block may have."""

MAX_MODEL_LEN = 131072
DENSE_BELOW = 16384


@dataclass(frozen=True)
class Geometry:
    """A layer, as `dispatch.make` takes it."""

    options: dict[str, Any] = field(default_factory=dict)  # of SplaParameters
    page: int = 64
    block: int = 64
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    dtype: torch.dtype = torch.bfloat16
    executor: str = "spla"
    sinks: bool = False  # learned ones of attention

    @property
    def params(self) -> SplaParameters:
        return SplaParameters(self.page, self.block, 2048 // self.block, **self.options)


SKETCH = {"fine_block": 16, "fine_source": "int4"}
GEOMETRIES = {
    "main": Geometry(),
    "quest": Geometry({"selector": "quest", "residual": "none"}),
    "km2-rem": Geometry({"selector": "km2-rem"}),
    "linear": Geometry({"residual": "linear", "combine": "double_rmsnorm"}),
    "fp8": Geometry({"statistics_dtype": "fp8"}),
    "d64-group3-fp16": Geometry(heads=9, kv_heads=3, head_size=64, dtype=torch.float16),
    "d256-group4": Geometry(heads=16, kv_heads=4, head_size=256),
    "blocks16": Geometry(block=16),
    "page16-top_p": Geometry({"top_p": 0.9}, page=16, block=16),
    "flashinfer": Geometry(executor="flashinfer"),
    "mean": Geometry({"selector": "mean"}),
    "taylor2": Geometry({"selector": "taylor2"}),
    "cumulant2": Geometry({"selector": "cumulant2"}),
    "km2-rem-fp8": Geometry({"selector": "km2-rem", "statistics_dtype": "fp8"}),
    "quest-fp8": Geometry({"selector": "quest", "residual": "none", "statistics_dtype": "fp8"}),
    "linear-shared": Geometry({"residual": "linear"}),
    "d256-km2-rem": Geometry({"selector": "km2-rem"}, heads=16, kv_heads=4, head_size=256),
    "d80-group1": Geometry(heads=32, kv_heads=32, head_size=80),
    "two-levels": Geometry({"fine_block": 16}),
    "sketch": Geometry(SKETCH),
    "sketch-block32": Geometry(SKETCH, block=32),
    "sketch-d256": Geometry(SKETCH, heads=4, kv_heads=1, head_size=256),
    "d64-group8-sketch-fp8-fp16": Geometry(
        SKETCH | {"statistics_dtype": "fp8"}, heads=64, head_size=64, dtype=torch.float16
    ),
    "sketch-d80-fp8": Geometry(SKETCH | {"statistics_dtype": "fp8"}, block=16, head_size=80, dtype=torch.float16),
    "two-levels-d256-km2-rem-fp8": Geometry(
        {"fine_block": 16, "selector": "km2-rem", "statistics_dtype": "fp8"}, heads=16, kv_heads=4, head_size=256
    ),
    "two-levels-d256": Geometry({"fine_block": 16}, heads=4, kv_heads=1, head_size=256),
    "gpt-oss-sketch-top_p": Geometry(SKETCH | {"top_p": 0.9}, heads=64, head_size=64, sinks=True),
    "two-levels-top_p": Geometry({"fine_block": 32, "top_p": 0.9}, page=32, block=32, heads=16, kv_heads=1),
}

# The project's classes: what changes with their names and arguments -----------------------------------------------


def make_operator(geometry: Geometry) -> Any:
    """The GPU implementation of a layer, without the fused CUDA kernel: its steps fall to the Triton kernels."""
    from spla_backend.kernels import dispatch
    from spla_backend.kernels.gpu.decode import steps as decode
    from spla_backend.kernels.interface import Layer, Limits

    decode.refusal = lambda *_, **__: "it is not compiled by Triton"
    device = torch.device("cuda:0")
    dense_below = DENSE_BELOW if geometry.executor == "spla" else MAX_MODEL_LEN
    limits = Limits(64, 4, MAX_MODEL_LEN, 8192, dense_below, geometry.params.budget_blocks)
    shape = {
        "num_heads": geometry.heads,
        "num_kv_heads": geometry.kv_heads,
        "head_size": geometry.head_size,
        "cache_dtype": geometry.dtype,
        "scale": geometry.head_size**-0.5,
    }
    if geometry.sinks:
        shape["sinks"] = torch.empty(geometry.heads, dtype=geometry.dtype)
    return dispatch.make(device, geometry.params, Layer(**shape), limits, executor=geometry.executor)


def run_step(operator: Any, geometry: Geometry, rows: int, query_len: int, prompts: list[tuple[int, int]]) -> None:
    """Decode rows of `query_len` tokens, then prompts of so many tokens that are so long now."""
    from spla_backend.kernels.interface import Step

    starts = [rows * query_len]
    for tokens, _ in prompts:
        starts.append(starts[-1] + tokens)
    num_rows, layout = rows + len(prompts), operator.page_layout
    cache = torch.empty(4096, geometry.kv_heads, layout.rows, 2 * geometry.head_size, dtype=geometry.dtype)
    query = torch.empty(starts[-1], geometry.heads, geometry.head_size, dtype=geometry.dtype)

    def integers(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32)

    batch = integers(num_rows + 1), integers(num_rows), integers(num_rows, MAX_MODEL_LEN // geometry.page + 16)
    known = {
        "num_decodes": rows,
        "num_decode_tokens": starts[0],
        "decode_query_len": query_len,
        "prefill_starts": starts if prompts else [],
        "prefill_lens": [length for _, length in prompts],
    }
    plan = operator.plan(Step(*batch, **known))
    states = integers(num_rows, max(1, operator.state_layout.num_blocks))
    operator.run(plan, query, cache, cache, states, torch.empty_like(query))


def store(operator: Any, geometry: Geometry, tokens: int) -> None:
    """Keys and values of so many tokens."""
    shape = 4096, geometry.kv_heads, operator.page_layout.rows, 2 * geometry.head_size
    key = torch.empty(tokens, geometry.kv_heads, geometry.head_size, dtype=geometry.dtype)
    slots = torch.empty(tokens, dtype=torch.int64)
    operator.update_cache(key, torch.empty_like(key), torch.empty(shape, dtype=geometry.dtype), slots)


def read_blocks(head_size: int) -> None:
    """A training step's reading of blocks, and its gradients."""
    from spla_backend.kernels.training.read_blocks import read_chosen_sums

    q = torch.empty(8, 4096, head_size, requires_grad=True)
    s = torch.empty(8, 64, head_size, head_size, requires_grad=True)
    read_chosen_sums(q, s, torch.empty(8, 4096, 64, dtype=torch.bool)).sum().backward()


def steps(name: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is compiled of a geometry, by name."""
    if name == "training":
        yield "read blocks d64", lambda: read_blocks(64)
        yield "read blocks d128", lambda: read_blocks(128)
        return
    geometry = GEOMETRIES[name]
    with Stand.nothing_compiled():
        operator = make_operator(geometry)
    run = functools.partial(run_step, operator, geometry)
    yield "store 8 tokens", lambda: store(operator, geometry, 8)
    yield "store 4096 tokens", lambda: store(operator, geometry, 4096)
    yield "decode 8 rows", lambda: run(8, 1, [])
    yield "decode 4 rows of 4 tokens", lambda: run(4, 4, [])
    if name in ("main", "two-levels"):
        yield "decode 1 row", lambda: run(1, 1, [])
        yield "decode 64 rows", lambda: run(64, 1, [])
    if geometry.executor != "spla":
        return
    yield "prefill 64 tokens at 40000", lambda: run(0, 1, [(64, 40000)])
    yield "prefill 8192 tokens at 40000", lambda: run(0, 1, [(8192, 40000)])
    yield "prefill dense, 2000 tokens", lambda: run(0, 1, [(500, 500), (1500, 16000)])


# A GPU that is not there -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Code:
    """A compiled kernel."""

    digest: str
    instructions: int
    registers: int
    local: int  # bytes a thread, of spilled registers and arrays
    shared: int  # bytes a thread block


@dataclass(frozen=True)
class Launched:
    """A launch and the code that it runs."""

    kernel: str
    grid: tuple[int, int, int]
    warps: int
    code: Code
    scattered: list[str] = field(default_factory=list)  # reductions, where the launch is the kernel's first


class Stand:
    """In the place of Triton's driver: compiles for a target, and notes launches down."""

    launches: list[Launched] = []  # noqa: RUF012
    sass: Path | None = None
    compiling = True
    step = ""  # "GEOMETRY: STEP"
    skipped = ""  # regular expression of launches

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)
        self.utils = types.SimpleNamespace(
            load_binary=self._load, unload_module=lambda _: None,
            get_device_properties=lambda _: {"max_shared_mem": 1 << 30},
        )  # fmt: skip

    @classmethod
    @contextlib.contextmanager
    def nothing_compiled(cls) -> Iterator[None]:
        """Layers that are made warm up by launching every kernel: not here."""
        cls.compiling = False
        yield
        cls.compiling = True

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda:0")

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, code: Code, *rest: Any) -> None:
            Stand.launches.append(Launched(source.fn.__name__, (x, y, z), metadata.num_warps, code))

        return launch

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[None, Code, int, int, int]:
        code = read_binary(binary, shared, self.sass)
        return None, code, code.registers, code.local // 4, 1024


@functools.cache
def read_binary(binary: bytes, shared: int, folder: Path | None) -> Code:
    """The code of a kernel, and what `cuobjdump` says of it."""
    text = sections(binary, ".text.")
    code = text + sections(binary, ".nv.constant2") + sections(binary, ".nv.constant4")  # numbers beside instructions
    digest = hashlib.sha256(code).hexdigest()[:16]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        what = ["-res-usage"] if folder is None else ["-res-usage", "-sass"]  # to disassemble takes a while
        result = subprocess.run([tool, *what, file.name], capture_output=True, text=True, check=True)
    said = result.stdout + result.stderr
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    if folder is not None:
        lines = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/.*;.*$", said, re.MULTILINE)
        (folder / f"{digest}.sass").write_text("\n".join(line.split(";")[0].strip() for line in lines) + "\n")
    return Code(digest, len(text) // 16, numbers["REG"], numbers["STACK"] + numbers["LOCAL"], shared)


def sections(binary: bytes, name: str) -> bytes:
    """The contents of the sections of an ELF file (64 bits, little endian) whose names begin with `name`."""
    headers, size, count, of_names = *struct.unpack_from("<Q", binary, 40), *struct.unpack_from("<3H", binary, 58)
    table = [struct.unpack_from("<I20xQQ", binary, headers + i * size) for i in range(count)]  # name, start, length
    found = []
    for begin, start, length in table:
        begin += table[of_names][1]
        if binary.startswith(name.encode(), begin):
            found.append(binary[start : start + length])
    return b"".join(found)


class Wrapper:
    """FlashInfer's, as far as planning goes."""

    _float_workspace_buffer = None

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def workspace_size(self, *_: Any, **__: Any) -> tuple[int, int]:
        return 1024, 1024

    def reset_workspace_buffer(self, *_: Any) -> None: ...

    def plan(self, *_: Any, **__: Any) -> None: ...

    def run(self, *_: Any, **__: Any) -> None: ...


class NoMemory(TorchFunctionMode):
    """Tensors of all devices have shapes and dtypes only."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def elsewhere(value: Any) -> Any:
            return torch.device("meta") if isinstance(value, torch.device) else value

        if function is torch.device:  # `dispatch` and layers ask what kind of device they are on
            return function(*args, **kwargs or {})
        if function is torch.Tensor.cpu:
            return args[0]
        kwargs = {name: elsewhere(value) for name, value in (kwargs or {}).items() if name != "pin_memory"}
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        return function(*map(elsewhere, args), **kwargs)


def stand_in(arch: int, sass: Path | None) -> None:
    """Have this process believe in a GPU."""
    multiprocessors = GPUS[arch][0]
    triton.runtime.driver.set_active(Stand(arch))
    Stand.sass = sass
    torch.cuda.get_device_capability = lambda *_: divmod(arch, 10)
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=multiprocessors)
    torch.cuda.current_device = lambda: 0
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.device_of = torch.cuda.stream = lambda *_: contextlib.nullcontext()
    torch.cuda.Stream = torch.cuda.current_stream = lambda *_: types.SimpleNamespace(
        cuda_stream=0, wait_stream=lambda _: None
    )
    torch.Tensor.data_ptr = lambda self: 4096 + self.storage_offset() * self.dtype.itemsize
    torch.Tensor.__int__ = lambda self: 1
    torch.set_default_device("meta")
    NoMemory().__enter__()

    flashinfer = types.ModuleType("flashinfer")
    flashinfer.__spec__ = ModuleSpec("flashinfer", None)
    flashinfer.BatchDecodeWithPagedKVCacheWrapper = Wrapper
    attention = types.ModuleType("vllm.v1.attention.backends.fa_utils")
    attention.flash_attn_varlen_func = lambda q, **_: (q, torch.empty(q.shape[1], len(q)))
    attention.get_flash_attn_version = lambda **_: 3
    sys.modules |= {"flashinfer": flashinfer, attention.__name__: attention}

    launch = triton.runtime.jit.JITFunction.run

    def run(self: Any, *args: Any, **options: Any) -> Any:
        left_out = Stand.skipped and re.search(Stand.skipped, f"{Stand.step}: {self.fn.__name__}")
        if left_out or not Stand.compiling:
            return None
        kernel = launch(self, *args, **options)
        if found := scattered_reductions(kernel.asm["ttgir"]):
            Stand.launches[-1] = replace(Stand.launches[-1], scattered=found)
        return kernel

    triton.runtime.jit.JITFunction.run = run


def compile_geometry(name: str, only: str, skip: str) -> dict[str, list[dict[str, Any]]]:
    """The launches of every step of a geometry whose name has the pattern `only` in it, but for those that have `skip`
    in theirs."""
    found = {}
    Stand.skipped = skip
    for step, launch in steps(name):
        Stand.step = f"{name}: {step}"
        if re.search(only, Stand.step):
            Stand.launches.clear()
            launch()
            found[Stand.step] = [asdict(launched) for launched in Stand.launches]
    return found


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    """Print launches, step by step."""
    for step, launches in found.items():
        print(step)
        for launch in launches:
            code = launch["code"]
            print(
                f"  {launch['kernel']:24} {code['digest']}  {code['instructions']:6} instructions  "
                f"{code['registers']:3} registers  {code['local']:5} B local  {code['shared']:6} B shared  "
                f"{launch['warps']:2} warps  grid {launch['grid']}"
            )
    sys.stdout.flush()


# Comparison ------------------------------------------------------------------------------------------------------


def differences(before: dict[str, list[dict]], after: dict[str, list[dict]]) -> Iterator[str]:
    """A line for every launch that is not the same in both."""
    for step in [*before, *(step for step in after if step not in before)]:
        if step not in before or step not in after:
            yield f"{step}: only {'before' if step in before else 'after'}"
            continue
        old, new = numbered(before[step]), numbered(after[step])
        if list(old) != list(new):
            yield f"{step}: launches {', '.join(old)} before and {', '.join(new)} after"
        for launch in old:
            a, b = old[launch], new.get(launch)
            if b is None or a == b:
                continue
            said = [
                f"{key} {x}" if x == y else f"{key} {x} -> {y}"
                for key, x, y in [
                    *((key, a["code"][key], b["code"][key]) for key in a["code"] if key != "digest"),
                    *((key, a[key], b[key]) for key in ("warps", "grid") if a[key] != b[key]),
                ]
            ]
            what = "the launch" if a["code"] == b["code"] else "the code"
            yield f"{step}: {launch}: {what} differs: {', '.join(said)} ({a['code']['digest']}, {b['code']['digest']})"


def numbered(launches: list[dict]) -> dict[str, dict]:
    """Launches by function and number."""
    count: collections.Counter[str] = collections.Counter()
    found = {}
    for launch in launches:
        count[launch["kernel"]] += 1
        found[f"{launch['kernel']} {count[launch['kernel']]}"] = launch
    return found


def compare(before: Path, after: Path) -> int:
    """Print what differs between two outputs."""
    a, b = (json.loads(path.read_text()) for path in (before, after))
    for key in ("arch", "triton"):
        if a[key] != b[key]:
            sys.exit(f"{before} is for {key} {a[key]}, {after} for {b[key]}: compile both for the same")
    lines = list(differences(a["launches"], b["launches"]))
    for line in lines:
        print(line)
    total = sum(map(len, b["launches"].values()))
    print(f"{len(lines)} of {total} launches differ")
    return bool(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, choices=GPUS, help="compute capability, times ten")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument(
        "--only", default="", help="regular expression: 'GEOMETRY: STEP' that have it, e.g. '^main: decode'"
    )
    parser.add_argument(
        "--skip", default="", help="regular expression: not 'GEOMETRY: STEP: KERNEL' that have it, e.g. ': pack_kernel'"
    )
    parser.add_argument("--sass", type=Path, help="folder for the instructions of every kernel, by digest")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="compare two outputs instead"
    )
    args = parser.parse_args()
    if args.compare:
        return compare(*args.compare)
    if args.sass:
        args.sass.mkdir(parents=True, exist_ok=True)
    known = {parameter.name for parameter in fields(SplaParameters)}  # a tree of before may not know all
    names = [name for name, geometry in GEOMETRIES.items() if known.issuperset(geometry.options)]
    names, compiled = [*names, "training"], functools.partial(compile_geometry, only=args.only, skip=args.skip)
    launches: dict[str, list[dict]] = {}
    with contextlib.ExitStack() as stack:
        if args.jobs == 1:
            stand_in(args.arch, args.sass)
            results = map(compiled, names)
        else:
            context = multiprocessing.get_context("spawn")
            pool = concurrent.futures.ProcessPoolExecutor(args.jobs, context, stand_in, (args.arch, args.sass))
            results = stack.enter_context(pool).map(compiled, names)
        for found in results:
            launches |= found
            show(found)
    if args.output:
        tree = str(Path(spla_backend.__file__).parent)
        result = {"arch": args.arch, "triton": triton.__version__, "tree": tree, "launches": launches}
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    limit = GPUS[args.arch][1] << 10
    large = sorted({
        f"{step}: {launch['kernel']}: {launch['code']['shared']} bytes of shared memory exceed {limit}"
        for step, some in launches.items() for launch in some if launch["code"]["shared"] > limit
    })  # fmt: skip
    scattered = sorted({
        f"{step}: {launch['kernel']}: {found}, which Triton 3.6 sums wrongly"
        for step, some in launches.items() for launch in some for found in launch["scattered"]
    })  # fmt: skip
    print(*large, *scattered, sep="\n", end="\n" if large or scattered else "")
    return bool(large or scattered)


if __name__ == "__main__":
    sys.exit(main())
