"""Draw the README's two pictures into docs/images: how it works, and the headline figures.

    python docs/pictures.py

Needs matplotlib.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
DENSE, SPLA, GREY, INK = "#8c96a3", "#1f6feb", "#e8ebef", "#20262e"
STATE, MUTED = "#d97b29", "#5b6570"


def box(axes: pyplot.Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    """A rounded box with text in its middle."""
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor="white", edgecolor=color, linewidth=1.6)
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9.5, color=INK)


def arrow(axes: pyplot.Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=12, linewidth=1.4, color=color, shrinkA=0, shrinkB=0
        )
    )


def how_it_works(path: Path) -> None:
    """One decode step of one kv head: what is read, and what becomes of it."""
    figure, axes = pyplot.subplots(figsize=(10.4, 5.6))
    axes.set_xlim(0, 20.8)
    axes.set_ylim(0, 11.2)
    axes.axis("off")

    pages, selected, width = 14, {0, 4, 9, 12, 13}, 1.1
    left, top = 3.4, 8.6
    axes.text(left - 0.25, top + 0.62, "keys and values,\nin pages of 64 tokens", ha="right", va="center", fontsize=9.5)
    axes.text(left - 0.25, top - 0.62, "summary of each\npage's keys", ha="right", va="center", fontsize=9.5)
    for i in range(pages):
        x = left + i * width
        chosen = i in selected
        axes.add_patch(Rectangle((x, top), width - 0.12, 1.3, facecolor=SPLA if chosen else GREY, edgecolor="none"))
        axes.add_patch(Rectangle((x, top - 0.85), width - 0.12, 0.45, facecolor="#9cc3ff", edgecolor="none"))
    above: dict[str, Any] = {"y": top + 1.55, "fontsize": 8.5, "va": "bottom"}
    axes.text(left, s="first page:\nalways selected", color=SPLA, **above)
    axes.text(left + pages * width - 0.12, s="newest pages:\nalways selected", ha="right", color=SPLA, **above)
    axes.text(
        left + 6.5 * width,
        s="grey: no block of it selected,\nkeys and values not read",
        ha="center",
        color=MUTED,
        **above,
    )

    box(axes, 0.2, 5.0, 2.4, 1.3, "query of the\nnew token", INK)
    box(axes, 4.0, 5.0, 4.4, 1.3, "1  score every page\nby its summary", SPLA)
    box(axes, 9.3, 5.0, 4.8, 1.3, "2  of the best pages, select\nthe best blocks of 16 tokens", SPLA)
    box(axes, 15.1, 5.0, 4.6, 1.3, "3  exact attention over\nthe selected blocks", SPLA)
    box(axes, 4.0, 1.7, 4.4, 1.5, "state: one sum over\nall complete pages", STATE)
    box(axes, 9.3, 1.7, 4.8, 1.5, "4  subtract what the\nselected blocks put in:\nestimate of the rest", STATE)
    box(axes, 15.1, 1.7, 4.6, 1.5, "5  combine, weighed by\nestimated attention mass", INK)

    arrow(axes, (2.6, 5.65), (4.0, 5.65))
    arrow(axes, (6.2, top - 0.9), (6.2, 6.3), SPLA)
    arrow(axes, (8.4, 5.65), (9.3, 5.65))
    arrow(axes, (14.1, 5.65), (15.1, 5.65))
    arrow(axes, (17.64, top - 0.05), (17.64, 6.3), SPLA)
    arrow(axes, (8.4, 2.45), (9.3, 2.45), STATE)
    arrow(axes, (11.7, 5.0), (11.7, 3.2), SPLA)
    arrow(axes, (14.1, 2.45), (15.1, 2.45), STATE)
    arrow(axes, (17.4, 5.0), (17.4, 3.2), SPLA)
    arrow(axes, (17.4, 1.7), (17.4, 0.75))
    axes.text(17.4, 0.35, "output", ha="center", va="center", fontsize=9.5)
    axes.text(6.2, 1.35, "updated once per completed page", ha="center", va="top", fontsize=8.5, color=MUTED)
    figure.savefig(path, dpi=140, bbox_inches="tight", pad_inches=0.08, facecolor="white")


def headline(path: Path) -> None:
    """Many requests at once, dense and SPLA (benchmarks/results/serving_h200.json)."""
    report = json.loads((ROOT / "benchmarks" / "results" / "serving_h200.json").read_text())
    rows = {(row["backend"], row["scenario"]): row for row in report["rows"]}
    scenarios = {
        "document": "16 questions on a\ncached document\nof 100K tokens",
        "5x128K": "5 new prompts\nof 128K tokens",
        "24x32K": "24 new prompts\nof 32K tokens",
    }
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.5))
    for axes, key, title in zip(
        panels,
        ("wall_s", "tpot_last_ms"),
        ("seconds for all answers (256 tokens each)", "milliseconds per token, once all prompts are read"),
        strict=True,
    ):
        for offset, backend, color, name in (
            (-0.2, "dense", DENSE, "dense attention"),
            (0.2, "spla", SPLA, "SPLA, selection in one level"),
        ):
            values = [rows[backend, scenario][key] for scenario in scenarios]
            bars = axes.bar([i + offset for i in range(len(scenarios))], values, 0.38, color=color, label=name)
            axes.bar_label(bars, [f"{value:.1f}" for value in values], fontsize=8.5)
        axes.set_xticks(range(len(scenarios)), list(scenarios.values()), fontsize=8.5)
        axes.set_title(title, fontsize=10.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.12)
    panels[0].legend(frameon=False, loc="upper right", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130, facecolor="white")


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    how_it_works(IMAGES / "how_it_works.png")
    headline(IMAGES / "headline.png")


if __name__ == "__main__":
    main()
