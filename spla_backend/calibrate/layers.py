"""Which layers are left dense, and the budgets of the others, by what they lose under SPLA."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..algorithm.parameters import SplaParameters
from .budgets import allocate, budget_grid
from .costs import Continued, layer_costs


@dataclass(frozen=True)
class FittedLayers:
    """What was chosen.

    Attributes:
        costs: Nats a token that each layer loses under the budget it had, the costliest first.
        dense: Layers to leave dense, in order; the first of `costs`.
        budgets: In blocks, of the other layers; empty where none were fitted.
    """

    costs: dict[int, float]
    dense: tuple[int, ...]
    budgets: dict[int, int]


def fit_layers(
    model: Continued,
    documents: Sequence[Sequence[int]],
    layers: Mapping[int, SplaParameters],
    *,
    num_dense: int,
    budgets: bool,
    tail: int,
    queries: int = 96,
    seed: int = 0,
    report: Callable[[], object],
) -> FittedLayers:
    """Fit layers to a model.

    Args:
        model: With its head.
        documents: Token ids.
        layers: What SPLA computes, by layer; alike but for the budgets.
        num_dense: Layers to leave dense, fewer than there are.
        budgets: Whether to fit budgets of the others, too, which keep the sum that they have.
        tail: As in `layer_costs`, like the rest.
        queries: Of every document.
        seed: Of all that is drawn.
        report: Called after every layer of every document.

    Returns:
        Costs of all layers, those to leave dense, and budgets of the others where asked for.
    """
    own = {i: params.budget_blocks for i, params in layers.items()}
    grid: list[int] = []
    if budgets:
        some = next(iter(layers.values()))
        shortest = min(map(len, documents)) // some.selection_block
        grid = budget_grid(sum(own.values()) / len(own), some.max_forced_blocks, shortest)
    tried = {i: {n, *grid} for i, n in own.items()}
    costs = layer_costs(model, documents, layers, tried, tail=tail, queries=queries, seed=seed, report=report)
    order = sorted(layers, key=lambda i: -costs[i][own[i]])
    dense, rest = tuple(sorted(order[:num_dense])), sorted(order[num_dense:])
    fitted: dict[int, int] = {}
    if budgets:
        cost = torch.tensor([[costs[i][n] for n in grid] for i in rest])
        fitted = dict(zip(rest, allocate(cost, grid, sum(own[i] for i in rest)).tolist(), strict=True))
    return FittedLayers({i: costs[i][own[i]] for i in order}, dense, fitted)
