"""The plot of a report, by its kind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw a report into an image file.

    Args:
        report: What `spla-eval`, `benchmarks/training.py` or `examples/continue_training.py` wrote.
        path: The image; its suffix names the format.

    Raises:
        ValueError: No report of this project, or one of tasks alone of trained models.
    """
    kinds = {"perplexity": _perplexity, "fidelity": _fidelity, "tasks": _tasks, "training": _training}
    if not isinstance(report, dict) or report.get("kind") not in kinds:
        raise ValueError(f"no report of spla-eval: 'kind' must be one of {', '.join(kinds)}")
    import matplotlib

    matplotlib.use("Agg")
    figure = kinds[report["kind"]](report)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(columns * width, rows * height), squeeze=False, layout="constrained")


def _styles(count: int) -> list[dict[str, Any]]:
    """Colour and marker of each of `count` variants."""
    import matplotlib

    colors = matplotlib.colormaps["tab20"]
    return [{"color": colors(i % 20), "marker": "osD^v*"[i % 6]} for i in range(count)]


def _kib(row: dict[str, Any]) -> float:
    return row["bytes"] / 1024


def _perplexity(report: dict[str, Any]) -> Any:
    """Difference to dense by position, and in the last bucket against the bytes read."""
    figure, ((left, right),) = _figure(1, 2, 7, 4.5)
    rows = [row for row in report["rows"] if row["file"] == "all"]
    last = max(row["end"] for row in rows)
    variants = list(dict.fromkeys(row["variant"] for row in rows if row["variant"] != "dense"))
    for variant, style in zip(variants, _styles(len(variants)), strict=True):
        mine = [row for row in rows if row["variant"] == variant]
        error = [row["difference_se"] or 0 for row in mine]
        centers = [(row["start"] + row["end"]) / 2 for row in mine]
        left.errorbar(centers, [row["difference"] for row in mine], error, capsize=3, **style)
        final = next(row for row in mine if row["end"] == last)
        points = {"x": _kib(final), "y": final["difference"], "yerr": final["difference_se"] or 0}
        right.errorbar(**points, capsize=3, label=variant, linestyle="", **style)
    first = max(row["start"] for row in rows)
    left.set(xlabel="position", ylabel="loss above dense (nats a token)", title="by position")
    right.set(xlabel="KiB read a token, layer and kv head", title=f"positions {first} to {last - 1}")
    for axes in (left, right):
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.grid(alpha=0.3)
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def _lines(axes: Any, rows: Sequence[dict[str, Any]], value: str) -> None:
    """One line through the budgets of each selector, block size and residual, against the bytes read."""
    keys = list(dict.fromkeys((row["selector"], row["block"], row["residual"]) for row in rows))
    selectors = list(dict.fromkeys(key[0] for key in keys))
    blocks = sorted({key[1] for key in keys})
    residuals = sorted({key[2] for key in keys}, key=["none", "regression", "linear"].index)
    for selector, block, residual in keys:
        mine = [row for row in rows if (row["selector"], row["block"], row["residual"]) == (selector, block, residual)]
        mine.sort(key=_kib)
        style = {
            "label": f"{selector}, b={block}" + (f", {residual}" if len(residuals) > 1 else ""),
            "color": f"C{selectors.index(selector)}",
            "marker": "osD^v"[blocks.index(block) % 5],
            "linestyle": ("-", "--", ":")[residuals.index(residual)],
        }
        axes.plot([_kib(row) for row in mine], [row[value] for row in mine], markersize=4, **style)
    axes.set(xlabel="KiB read a token, layer and kv head")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.02, 0.5))


def _fidelity(report: dict[str, Any]) -> Any:
    """Mass and error against bytes; mass by layer and head at the budget in the middle, one map a selector."""
    rows = [row for row in report["rows"] if row["selector"] != "oracle"]
    budgets = sorted({row["budget"] for row in rows})
    budget = budgets[len(budgets) // 2]
    block = max(row["block"] for row in rows)
    shown = {
        row["selector"]: row for row in report["rows"] if row["budget"] == budget and row["block"] == block
    }  # one a selector, whatever the residual: it does not change the selection
    errors = [row for row in rows if "error" in row]
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(max(14, 2.2 * len(shown)), 10), layout="constrained")
    halves: Any = figure.subfigures(2, 1)
    above, below = halves
    panels = above.subplots(1, 2 if errors else 1, squeeze=False)[0]
    # The residual does not change the selection.
    first = {(row["selector"], row["block"], row["budget"]): {**row, "residual": "none"} for row in rows}
    _lines(panels[0], list(first.values()), "mass")
    panels[0].set(ylabel="attention mass captured")
    if errors:
        _lines(panels[1], errors, "error")
        panels[1].set(ylabel="relative L2 error of the output", yscale="log")
    maps = below.subplots(1, len(shown), squeeze=False)[0]
    for axes, (selector, row) in zip(maps, shown.items(), strict=True):
        image = axes.imshow(row["mass_by_layer_and_head"], vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set(title=selector, xlabel="head", ylabel="layer")
    below.suptitle(f"attention mass captured, b={block}, budget {budget}")
    below.colorbar(image, ax=list(maps))
    return figure


def _tasks(report: dict[str, Any]) -> Any:
    """Score by length, a panel a task, and the mean over tasks against the bytes read at the greatest length."""
    rows, tasks = report["rows"], report["settings"]["tasks"]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    figure, grid = _figure(2, -(-(len(tasks) + 1) // 2), 3.6, 3)
    panels = list(grid.flat)
    longest = max(report["settings"]["lengths"])
    styles = _styles(len(variants))
    for axes, task in zip(panels, tasks, strict=False):
        for variant, style in zip(variants, styles, strict=True):
            mine = sorted(
                (row for row in rows if row["variant"] == variant and row["task"] == task),
                key=lambda row: row["length"],
            )
            axes.errorbar(
                [row["length"] for row in mine], [row["score"] for row in mine],
                [row["score_se"] or 0 for row in mine], capsize=3, **style,
            )  # fmt: skip
        axes.set(title=task, ylim=(-0.05, 1.05), xlabel="tokens", ylabel="score")
        axes.grid(alpha=0.3)
    axes = panels[len(tasks)]
    for variant, style in zip(variants, styles, strict=True):
        mine = [row for row in rows if row["variant"] == variant and row["length"] == longest]
        mean = sum(row["score"] for row in mine) / len(mine)
        axes.plot(_kib(mine[0]), mean, linestyle="", label=variant, **style)
    axes.set(title=f"mean at {longest} tokens", xlabel="KiB read a token, layer and kv head", ylim=(-0.05, 1.05))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6)
    for axes in panels[len(tasks) + 1 :]:
        axes.remove()
    return figure


def _training(report: dict[str, Any]) -> Any:
    """Trained models in the last bucket of positions: loss above dense and above sparse attention alone by budget; a
    row of panels a text."""
    rows = [row for row in report["rows"] if "text" in row and row["trained"] != "start" and row["budget"] is not None]
    if not rows:
        raise ValueError("nothing to draw: this report has no perplexity of a trained model under SPLA")
    last = max(row["end"] for row in rows)
    rows = [row for row in rows if row["end"] == last]
    texts = list(dict.fromkeys(row["text"] for row in rows))
    pairs = list(dict.fromkeys((row["trained"], row["attention"]) for row in rows))
    values = {"difference": "above dense", "sparse_difference": "above sparse attention alone"}
    budgets = sorted({row["budget"] for row in rows})
    figure, grid = _figure(len(texts), 2, 6, 3.6)
    for text, panels in zip(texts, grid, strict=True):
        for axes, (value, against) in zip(panels, values.items(), strict=True):
            for pair, style in zip(pairs, _styles(len(pairs)), strict=True):
                of_pair = [row for row in rows if (row["trained"], row["attention"], row["text"]) == (*pair, text)]
                mine = sorted((row for row in of_pair if value in row), key=lambda row: row["budget"])
                trained, attention = pair
                axes.errorbar(
                    [row["budget"] for row in mine], [row[value] for row in mine],
                    [row[f"{value}_se"] or 0 for row in mine], capsize=3, **style,
                    label=trained if attention in ("trained", trained) else f"{trained}, served with {attention}",
                )  # fmt: skip
            axes.axhline(0, color="grey", linewidth=0.8)
            axes.set(xscale="log", title=f"{text}, {against}", xlabel="budget (tokens)", ylabel="nats a token")
            axes.set_xticks(budgets, [str(budget) for budget in budgets])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    grid[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure
