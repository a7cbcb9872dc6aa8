"""Budgets of layers: the estimate of what a changed output costs, the allocation, and `spla-calibrate --budgets`."""

import itertools

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from spla_backend.algorithm.parameters import SplaParameters  # noqa: E402
from spla_backend.algorithm.sequence import spla_attention  # noqa: E402
from spla_backend.calibrate.budgets import (  # noqa: E402
    Continued,
    allocate,
    fit_budgets,
    gradients,
    head_groups,
    loss_of,
)
from spla_backend.evaluate.variants import ModelShape  # noqa: E402

from ..evaluate.test_capture import save  # noqa: E402
from ..evaluate.test_reports import model, text  # noqa: E402, F401 - fixtures
from .test_calibrate import calibrated, random_tokens  # noqa: E402

PARAMS = SplaParameters(page_size=16, selection_block=16, budget_blocks=5)


def test_estimate_is_the_divergence(tmp_path):
    """Of a small random change in the outputs of the first layer, at all positions of a document's end."""
    model, tokens, start = Continued(save(tmp_path), head=True), random_tokens(400, 0), 80  # noqa: F811
    model.begin(tokens[:start])
    change = 0.02 * torch.randn(4, len(tokens) - start, 32, generator=torch.Generator().manual_seed(0))
    whole = SplaParameters(16, 16, 400 // 16, residual="none")

    def changed(inputs):
        q, k, v = (x[None] for x in (inputs.q, inputs.k, inputs.v))
        return spla_attention(q, k, v, whole)[0] + change if inputs.layer == 0 else None

    with torch.no_grad():
        dense, other = (model.go_on(tokens[start:], visit).log_softmax(-1) for visit in (None, changed))
    divergence = (dense.exp() * (dense - other)).sum(-1).mean().item()
    positions = torch.arange(start, len(tokens))
    torch.manual_seed(0)
    estimates = []
    for _ in range(6):
        inputs, gradient = gradients(model, tokens, start, 16)[0]
        assert inputs.layer == 0 and inputs.k.shape[1] == len(tokens)
        by_group = change.unflatten(0, (2, 2)).transpose(1, 2)  # [kv_heads, queries, group, head_size]
        pairs = zip(by_group, head_groups(inputs, gradient, positions), strict=True)
        estimates.append(sum(loss_of(mine, own).item() for mine, (_, own) in pairs))
    assert sum(estimates) / len(estimates) == pytest.approx(divergence, rel=0.25)


def test_allocation_is_the_best():
    grid, generator = (2, 3, 5), torch.Generator().manual_seed(0)
    cost = torch.rand(3, 4, generator=generator).sort(-1, descending=True).values  # what one more block saves
    cost = cost.flip(-1).cumsum(-1).flip(-1)[:, [0, 1, 3]]  # falls less and less
    for total in range(6, 16):
        budgets = allocate(cost, grid, total).tolist()
        assert sum(budgets) == total
        found = sum(_at(row, grid, n) for row, n in zip(cost.tolist(), budgets, strict=True))
        every = itertools.product(range(2, 6), repeat=3)
        best = min(
            sum(_at(row, grid, n) for row, n in zip(cost.tolist(), ns, strict=True)) for ns in every if sum(ns) == total
        )
        assert found == pytest.approx(best)


def _at(cost, grid, n):
    if n in grid:
        return cost[grid.index(n)]
    return (cost[1] + cost[2]) / 2


def test_layer_that_does_not_matter_gets_least(tmp_path):
    model, seen = Continued(save(tmp_path), head=True), []  # noqa: F811
    with torch.no_grad():
        model._model.model.layers[0].self_attn.o_proj.weight.zero_()
    documents = [random_tokens(300, seed) for seed in range(2)]
    budgets = fit_budgets(
        model, documents, PARAMS, [0, 1], 11, tail=64, queries=24, report=lambda: seen.append(1)
    )  # fmt: skip
    assert budgets == {0: 3, 1: 8} and len(seen) == 4


def test_command(model, text, tmp_path, capsys):  # noqa: F811
    arguments = ["--length", "192", "--budgets", "1", "--page-size", "16"]
    arguments += ["--options", '{"budget": 96, "selection_block_size": 16}']
    output, result = calibrated(model, text, tmp_path, capsys, *arguments)
    shape = ModelShape.of(model)
    options = shape.options({"parameters_file": str(output)})
    assert options.budget == 96 and sorted(options.layer_budgets) == [0, 1]
    assert sum(options.layer_budgets.values()) == 2 * 96 and min(options.layer_budgets.values()) >= 48
    assert shape.options({"parameters_file": str(output), "budget": 128}).layer_budgets == {}
    layers = shape.learned({"parameters_file": str(output)})
    assert all(bool((layer.gain == 1).all()) for layer in layers.values())  # no steps: gains stay
    assert result["layer_budgets"] == {str(i): n for i, n in options.layer_budgets.items()}
    rows = {(row["variant"], row["end"]): row for row in result["rows"] if row["file"] == "all"}
    assert rows["after", 200]["bytes"] == rows["before", 200]["bytes"]
