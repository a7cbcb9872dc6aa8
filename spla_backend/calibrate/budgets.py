"""Budgets of layers, of a given sum, that cost the least: which to try, and how to share the sum out.

Measured in docs/quality.md, beside budgets by head and by captured mass.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch

_STEPS = (1 / 4, 3 / 8, 1 / 2, 3 / 4, 1, 3 / 2, 2, 3, 4)  # budgets that are tried, in mean ones


def budget_grid(mean: float, least: int, most: int) -> list[int]:
    """Budgets to try, in blocks, ascending: some around the mean, and the least, none greater than `most`."""
    steps = {least, *(round(step * mean) for step in _STEPS)}
    return sorted(n for n in steps if least <= n <= most)


def _convex(grid: Sequence[int], cost: Sequence[float]) -> list[float]:
    """Costs at `grid[0] .. grid[-1]` on the lower convex hull of the points: what one more block saves only falls."""
    hull: list[tuple[int, float]] = []
    for x, y in zip(grid, itertools.accumulate(cost, min), strict=True):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    at, costs = zip(*hull, strict=True)
    return np.interp(range(grid[0], grid[-1] + 1), at, costs).tolist()


def allocate(cost: torch.Tensor, grid: Sequence[int], total: int) -> torch.Tensor:
    """Budgets that cost least.

    Args:
        cost: `[n, len(grid)]`, of each of `n` at the budgets `grid`.
        grid: Ascending budgets, in blocks.
        total: Sum of all budgets.

    Returns:
        `[n]` int64: the least sum of costs on their convex hulls. All but one at most are in `grid`.
    """
    hulls = torch.tensor([_convex(grid, row) for row in cost.tolist()], dtype=torch.float64)
    saved = hulls[:, :-1] - hulls[:, 1:]  # [n, blocks]
    chosen = saved.flatten().sort(descending=True, stable=True).indices[: total - grid[0] * len(cost)]
    return grid[0] + torch.zeros(len(cost), dtype=torch.int64).index_add_(
        0, chosen // max(1, saved.shape[1]), torch.ones_like(chosen)
    )
