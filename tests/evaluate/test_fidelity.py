"""Captured mass and output error against the float64 reference, on small random tensors."""

import math
from dataclasses import replace

import pytest
import torch

from spla_backend.algorithm import reference
from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.selectors import get_selector
from spla_backend.algorithm.statistics_format import decode, encode
from spla_backend.evaluate.capture import AttentionInputs
from spla_backend.evaluate.fidelity import Point, measure, sample_positions, summary

HEADS, KV_HEADS, SIZE, LENGTH = 6, 2, 16, 300


@pytest.fixture(scope="module")
def inputs() -> AttentionInputs:
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> torch.Tensor:
        return torch.randn(heads, LENGTH, SIZE, generator=generator)

    return AttentionInputs(0, random(HEADS), random(KV_HEADS), random(KV_HEADS))


def expected(inputs: AttentionInputs, position: int, params: SplaParameters) -> tuple[list[float], list[float]]:
    """Captured mass and relative error of each head from the reference."""
    q = inputs.q[:, position].double()
    k, v = (x[:, : position + 1].transpose(0, 1).double() for x in (inputs.k, inputs.v))
    statistics = None
    if params.statistics_dtype == "fp8":
        formats = get_selector(params.selector).formats(SIZE)
        statistics = decode(encode(reference.complete_statistics(k, params), formats), formats).double()
    result = reference.spla_token(q, k, v, params, statistics=statistics)
    masses, errors = [], []
    for h in range(HEADS):
        g = h // (HEADS // KV_HEADS)
        dense, lse = reference.exact_attention(q[h], k[:, g], v[:, g])
        masses.append(math.exp(float(result.lse[h]) - lse))
        errors.append(float((result.output[h] - dense).norm() / dense.norm()))
    return masses, errors


@pytest.mark.parametrize(
    "options",
    [
        {"selector": "mean", "residual": "none"},
        {"selector": "rem", "residual": "regression"},
        {"selector": "taylor2", "residual": "linear"},
        {"selector": "quest", "residual": "none"},
        {"selector": "rem", "residual": "regression", "statistics_dtype": "fp8"},
        {"selector": "km2-rem", "residual": "regression", "selection_block": 16},
        {"selector": "rem", "residual": "none", "top_p": 0.6},
        {"selector": "rem", "residual": "linear", "combine": "double_rmsnorm"},
        {"selector": "mean", "residual": "regression", "first_blocks": 0, "last_blocks": 3},
        {"fine_block": 8},
        {"fine_block": 8, "fine_source": "int4", "statistics_dtype": "fp8"},
        {"fine_block": 8, "residual": "none", "top_p": 0.4},
    ],
    ids=lambda o: "-".join(str(x) for x in o.values()),
)
def test_as_the_reference(inputs, options):
    block = options.get("selection_block", 32)
    params = SplaParameters(**{"page_size": 32, "selection_block": block, "budget_blocks": 128 // block} | options)
    positions = torch.tensor([20, 127, 128, 160, 299])  # within the budget, its edges, page edges, the last token
    for position in positions.tolist():
        mass, error = measure(inputs, torch.tensor([position]), [Point(params)])
        masses, errors = expected(inputs, position, params)
        torch.testing.assert_close(mass[0], torch.tensor(masses), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(error[0], torch.tensor(errors), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("fine", [0, 8])
def test_nothing_captures_more_than_the_oracle(inputs, fine):
    def mass(selector: str, oracle: bool = False) -> torch.Tensor:
        sizes = {"page_size": 32, "selection_block": 16, "budget_blocks": 7, "fine_block": fine}
        params = SplaParameters(**sizes, selector=selector, residual="none")
        return measure(inputs, positions, [Point(params, oracle, output=False)])[0].mean()

    positions = sample_positions(100, LENGTH, 50)
    best = mass("mean", oracle=True)
    masses = [mass(selector) for selector in reference.SELECTORS]
    assert best < 0.999
    assert max(masses) <= best
    assert max(masses) > 0.5 * best  # a selector that finds nothing would pass the line above


def test_points_of_both_dtypes_side_by_side(inputs):
    """Neither is given the other's statistics or scores, nor is either's selection without the residual."""
    params = SplaParameters(page_size=32, selection_block=16, budget_blocks=7)
    points = [Point(replace(params, statistics_dtype=dtype)) for dtype in ("auto", "fp8")]
    positions = sample_positions(100, LENGTH, 50)
    mass, error = measure(inputs, positions, points)
    for i, point in enumerate(points):
        alone = measure(inputs, positions, [point])
        assert torch.equal(mass[i], alone[0][0]) and torch.equal(error[i], alone[1][0])
    assert not torch.equal(mass[0], mass[1])


def test_budget_that_holds_everything(inputs):
    params = SplaParameters(page_size=32, selection_block=32, budget_blocks=10)
    mass, error = measure(inputs, torch.tensor([LENGTH - 1]), [Point(params)])
    torch.testing.assert_close(mass, torch.ones_like(mass))
    assert error.max() < 1e-5


def test_positions():
    positions = sample_positions(100, 200, 30)
    assert len(set(positions.tolist())) == 30
    assert positions.tolist() == sorted(positions.tolist())
    assert positions.min() >= 100 and positions.max() < 200
    assert torch.equal(positions, sample_positions(100, 200, 30))
    assert sample_positions(100, 110, 30).tolist() == list(range(100, 110))


def test_summary():
    mass = torch.tensor([[[0.5] * 10, [0.9] * 10], [[0.7] * 10, [0.9] * 10]])  # [documents, layers, heads]
    mass[:, 0, 0] = torch.tensor([0.1, 0.3])
    result = summary(mass, torch.full_like(mass, math.nan))
    assert result["mass"] == pytest.approx(mass.mean().item(), abs=1e-5)
    assert result["mass_worst_decile"] == pytest.approx((0.2 + 0.6) / 2, abs=1e-5)  # 2 of 20 heads
    means = [mass[0].mean().item(), mass[1].mean().item()]
    assert result["mass_se"] == pytest.approx(abs(means[0] - means[1]) / 2, abs=1e-5)
    assert "error" not in result
