"""The arithmetic of `benchmarks/experiments/statistics_and_budgets.py`."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from spla_backend.algorithm.selectors import get_selector


@pytest.fixture(scope="module")
def study() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "experiments" / "statistics_and_budgets.py"
    spec = importlib.util.spec_from_file_location("statistics_and_budgets", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("block", "rank"), [(16, 15), (16, 40), (48, 32)])
def test_full_rank_is_the_full_covariance(study, block, rank):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3, block, 32, generator=generator, dtype=torch.float64)
    q = torch.randn(5, 32, generator=generator, dtype=torch.float64)
    study.register(f"rem-lr{rank}")
    selector = get_selector(f"rem-lr{rank}")
    statistics = selector.statistics(keys)
    assert statistics.shape == (3, selector.width(32))
    mean, s2 = selector.moments(q, statistics)
    logits = q @ keys.mT  # [3, 5, block]
    torch.testing.assert_close(mean, logits.mean(-1).T)
    torch.testing.assert_close(s2, logits.var(-1, correction=0).T)


def test_low_rank_keeps_the_diagonal(study):
    keys = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    study.register("rem-lr2")
    _, rest, factors = get_selector("rem-lr2").statistics(keys).tensor_split((8, 16), -1)
    diagonal = rest + factors.unflatten(-1, (2, 8)).square().sum(-2)
    torch.testing.assert_close(diagonal, keys.var(-2, correction=0))


def test_fp8(study):
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(2)) * torch.logspace(-6, 6, 100)[:, None]
    largest = x.abs().amax(-1, keepdim=True)
    # Three bits of mantissa; 448 times the scale, itself rounded, stands for the largest; small ones become subnormal.
    assert ((study.fp8(x) - x).abs() <= x.abs() / 16 + largest / 448 / 500).all()
    assert not study.fp8(torch.zeros(2, 8)).any()
    study.register("km2-rem-fp8")
    keys = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(3))
    exact, rounded = (get_selector(name).statistics(keys) for name in ("km2-rem", "km2-rem-fp8"))
    assert torch.equal(exact[:, -2:], rounded[:, -2:])
    assert not torch.equal(exact[:, :-2], rounded[:, :-2])
    assert study.statistics_bytes("rem", 64, 64) == 256
    assert study.statistics_bytes("rem-lr2-fp8", 32, 64) == 2 * 4 * 66
