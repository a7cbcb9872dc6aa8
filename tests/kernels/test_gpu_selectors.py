"""Device functions of every selector and feature map against their definitions, and those of a user's own."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton_cases import SELECTORS, Batch, make_batch

from spla_backend.algorithm.feature_maps import elu_plus_one
from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.selectors import RemSelector, get_selector, register_selector
from spla_backend.kernels.cpu.attention import is_compiled
from spla_backend.kernels.gpu import feature_maps
from spla_backend.kernels.gpu.check_selector import check_gpu_selector
from spla_backend.kernels.gpu.decode.fused import refusal
from spla_backend.kernels.gpu.selectors import GpuSelector, gpu_selector, gpu_selector_names, register_gpu_selector

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = {"num_heads": 4, "num_kv_heads": 2, "head_size": 32, "device": DEVICE, "by_kernels": True}
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "write_your_own_selector.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize(("head_size", "block", "fp8"), [(64, 32, False), (80, 48, True)], ids=["d64", "d80-fp8"])
def test_device_functions_say_what_the_class_says(name: str, head_size: int, block: int, fp8: bool) -> None:
    check_gpu_selector(name, head_size=head_size, block=block, fp8=fp8, device=DEVICE)


COMPILE = """
import runpy, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from spla_backend.kernels.gpu import check_selector as check
from spla_backend.kernels.gpu.selectors import gpu_selector, gpu_selector_names
from spla_backend.kernels.gpu.statistics import LOG2E

runpy.run_path(sys.argv[1])
types = {"slots_ptr": "*i64", "out_ptr": "*fp32", "scale": "fp32"}
shape = {"D": 16, "DP": 16, "UNIT": 48, "STRIDE": 80, "FP8": False}
for name in gpu_selector_names():
    functions = gpu_selector(name)
    tile = {"TILE": 64 if functions.whole_blocks else 16, "LIMIT": 65504.0}
    for kernel, constants in (
        (check.store_blocks_kernel, tile),
        *(
            (check.score_blocks_kernel, {"BLOCKS": 16, "QUERIES": 16, "ROWS": rows, "LOG_UNIT": 4.0, "NAT": nat})
            for rows, nat in ((False, 1.0), (True, LOG2E.value))
        ),
    ):
        constants = {"SELECTOR": functions, **constants, **{x: shape[x] for x in kernel.arg_names if x in shape}}
        signature = {x: "constexpr" if x in constants else types.get(x, "*fp16") for x in kernel.arg_names}
        triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    print("compiled", name)
"""


def test_device_functions_compile() -> None:
    """For a GPU that is not there, where the interpreter takes more than the compiler."""
    environment = ENVIRONMENT | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE, EXAMPLE]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert said.returncode == 0, said.stderr[-4000:]
    assert said.stdout.split() == [word for name in sorted([*SELECTORS, "ball"]) for word in ("compiled", name)]


def test_other_device_functions_are_noticed() -> None:
    class Mine(RemSelector):
        name = "mine"

    register_selector(Mine)
    right = gpu_selector("rem")
    for wrong, message in (
        (GpuSelector(gpu_selector("quest").store, right.prepare, right.score), "store, says"),
        (GpuSelector(right.store, right.prepare, gpu_selector("cumulant2").score), "score, of queries in columns"),
    ):
        register_gpu_selector(Mine, wrong)
        with pytest.raises(ValueError, match=message):
            check_gpu_selector("mine", head_size=32, block=16, device=DEVICE)


@pytest.fixture
def ball() -> str:
    """The selector of the example."""
    runpy.run_path(str(EXAMPLE))
    return "ball"


def test_example() -> None:
    said = subprocess.run([sys.executable, EXAMPLE], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    assert "say the same as its class" in said.stdout


@pytest.mark.parametrize("residual", ["none", "linear"])
def test_own_selector_in_decode(ball: str, residual: str) -> None:
    combine = "shared_normalizer" if residual == "none" else "double_rmsnorm"
    params = SplaParameters(32, 16, 5, selector=ball, residual=residual, combine=combine)
    batch = make_batch(params, [230, 81], **SHAPE)
    batch.check(batch.decode(), 2e-3)


def test_own_selector_in_prefill(ball: str) -> None:
    from test_triton_prefill import check

    batch = make_batch(SplaParameters(32, 16, 5, selector=ball, residual="none"), [130], **SHAPE)
    check(batch, [(92, 130)], 3e-3, sample=7)


def test_own_selector_is_left_to_the_general_kernels(ball: str) -> None:
    params = SplaParameters(64, 64, 5, selector=ball, residual="none")
    assert "'ball' is none of" in str(refusal(params, group=4, head_size=128, cache_dtype=torch.bfloat16))
    assert not is_compiled(params)


def test_another_class_under_a_name_does_not_take_its_kernels_over() -> None:
    class Mine(RemSelector):
        def score(self, q: torch.Tensor, statistics: torch.Tensor, block_size: int) -> torch.Tensor:
            return -super().score(q, statistics, block_size)

    params = SplaParameters(64, 64, 5)
    assert refusal(params, group=4, head_size=128, cache_dtype=torch.bfloat16) is None and is_compiled(params)
    register_selector(Mine)
    assert "'rem' is none of" in str(refusal(params, group=4, head_size=128, cache_dtype=torch.bfloat16))
    assert not is_compiled(params)
    with pytest.raises(ValueError, match="'rem' has no device functions: give it some by register_gpu_selector"):
        gpu_selector("rem")
    assert "rem" not in gpu_selector_names()


def test_registered_selectors_go_with_their_test() -> None:
    with pytest.raises(ValueError, match="unknown selector 'ball'"):
        get_selector("ball")
    assert gpu_selector("rem").score is not None


@triton.jit
def _elu_plus_one(every, some, AXIS: tl.constexpr):
    return tl.where(some > 0, some + 1.0, tl.exp(some))


def test_own_feature_map(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_triton_prefill import check

    params = SplaParameters(16, 16, 4, residual="linear", feature_map="elu1")

    def case() -> Batch:
        return make_batch(params, [116], **SHAPE)

    with pytest.raises(ValueError, match="'elu1' has no device function: give it one by register_gpu_feature_map"):
        case()
    monkeypatch.setattr(feature_maps, "REGISTERED", dict(feature_maps.REGISTERED))
    feature_maps.register_gpu_feature_map(elu_plus_one, _elu_plus_one)
    batch = case()
    batch.check(batch.decode(), 2e-3)
    check(batch, [(93, 116)], 3e-3, sample=7)
