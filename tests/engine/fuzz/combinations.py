"""A world whose options are each drawn by itself, where `settings.py` draws one of a list of combinations."""

import random
from dataclasses import dataclass, field
from typing import Any

from spla_backend.algorithm.selectors import get_selector
from spla_backend.options import SplaOptions

from .settings import Settings

# Those of the algorithm's: the tests of options may have registered others.
SELECTORS = ("mean", "taylor2", "cumulant2", "rem", "rem", "rem", "rem", "quest", "km2-rem")


def _draw_spla(draw: random.Random, page_size: int, dtype: str) -> dict[str, Any]:
    """SPLA's options beside the budget: any combination that it takes."""
    selector = get_selector(draw.choice(SELECTORS))
    block = draw.choice([size for size in (16, 32, 64) if page_size % size == 0])
    options: dict[str, Any] = {
        "selector": selector.name,
        "selection_block_size": block,
        # What 16 bits hold of statistics, `texts.py` does not round: there they are bytes.
        "statistics_dtype": draw.choice(("auto", "fp8")) if dtype == "float32" else "fp8",
        "fine_block_size": draw.choice((0, 0, 8, 8, 16)),
        "first_blocks": draw.choice((0, 1, 1, 2)),
        "last_blocks": draw.choice((1, 2, 2, 3)),
        "top_p": draw.choice((None, None, None, 0.6, 0.9)),
    }
    if options["fine_block_size"]:
        options["candidates"] = draw.choice((1, 1, 8 * block, 8192))
        options["fine_source"] = draw.choice(("keys", "int4")) if selector.mean_first else "keys"
    residuals = (
        (*["regression"] * 6, "linear", "two RMSNorms", "none") if selector.has_mass else ("none", "two RMSNorms")
    )
    options["residual"] = draw.choice(residuals)
    if options["residual"] == "two RMSNorms":
        options |= {"residual": "linear", "combine": "double_rmsnorm"}
    elif options["residual"] == "regression":
        options["residual_scale"] = draw.choice((0.0, 0.5, 0.5, 1.0))
    return options


@dataclass(frozen=True)
class Combination(Settings):
    """One world, and SPLA's options in it."""

    drawn: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def draw(cls, seed: int) -> "Combination":
        draw = random.Random(f"combination of {seed}")
        page_size = draw.choice((16, 32, 64))
        dtype = draw.choice(("float32", "float32", "float32", "bfloat16", "float16"))
        drawn = _draw_spla(draw, page_size, dtype)
        block, first, last = (drawn[name] for name in ("selection_block_size", "first_blocks", "last_blocks"))
        least = first + max(last, page_size // block)  # `SplaParameters.max_forced_blocks`, without tiles
        budget = block * (least + draw.choice((0, 0, 1, 2, 4)))
        SplaOptions.from_sources(drawn, {"budget": budget}).parameters(page_size)
        # With two levels sequences within two budgets are dense.
        sparse_from = budget * (2 if drawn["fine_block_size"] else 1)
        return cls(
            options="drawn",
            page_size=page_size,
            head_size=draw.choice((32, 64, 64)),
            dtype=dtype,
            budget=budget,
            num_layers=1,
            max_model_len=min(640, int(sparse_from * draw.choice((1.5, 2.1, 3.3))) + draw.randint(0, page_size)),
            spare_pages=draw.choice((0, 2, 5, 20)),
            max_num_seqs=draw.choice((1, 2, 4, 8)),
            max_num_batched_tokens=draw.choice((64, 200, 640)),
            num_drafts=draw.choice((0, 0, 1, 3)),
            prefix_caching=draw.random() < 0.9,
            asynchronous=draw.random() < 0.4,
            live=draw.choice((2, 4, 8)),
            arrivals=draw.choice((0.1, 0.3, 1.0)),
            aborts=draw.choice((0.0, 0.1, 0.4)),
            resets=draw.choice((0.0, 0.01, 0.05)),
            poison=draw.choice((0.0, 0.0, 0.3, 1.0)),
            drawn=drawn,
        )

    def spla(self) -> dict[str, Any]:
        """See `Settings.spla`."""
        return {"budget": self.budget, **self.drawn}

    def groups(self) -> list[str]:
        """See `Settings.groups`."""
        drawn = self.drawn
        levels = (
            f"fine blocks of {drawn['fine_block_size']} by {drawn['fine_source']}" if "fine_source" in drawn else ""
        )
        return [
            f"pages of {self.page_size}",
            f"selection blocks of {drawn['selection_block_size']}",
            f"heads of {self.head_size}",
            f"{self.dtype}, statistics {drawn['statistics_dtype']}",
            levels or "one level",
            f"selector {drawn['selector']}",
            drawn.get("combine") or f"residual {drawn['residual']}",
            f"top_p {drawn['top_p']}",
            f"{self.num_drafts} drafts",
            f"asynchronous scheduling {'on' if self.asynchronous else 'off'}",
            f"prefix caching {'on' if self.prefix_caching else 'off'}",
        ]
