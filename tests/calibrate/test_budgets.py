"""Budgets that cost least: the allocation."""

import itertools

import pytest

torch = pytest.importorskip("torch")

from spla_backend.calibrate.budgets import allocate, budget_grid  # noqa: E402


def test_grid():
    assert budget_grid(16, 3, 40) == [3, 4, 6, 8, 12, 16, 24, 32]


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
