"""What a world of the fuzzer is: sizes, options and load, all drawn from its seed."""

import random
from dataclasses import asdict, dataclass
from typing import Any

NUM_HEADS, NUM_KV_HEADS = 4, 2

ONE_LEVEL = {"fine_block_size": 0, "statistics_dtype": "auto"}
# What fits into few pages: fine blocks of 8 tokens, and no more candidates than two budgets.
TWO_LEVELS = {"fine_block_size": 8, "candidates": 1, "statistics_dtype": "auto"}
# By name: SPLA's options beside the budget. All pages hold blocks of 16 tokens.
OPTIONS: dict[str, dict[str, Any]] = {
    "one level": ONE_LEVEL,
    "no residual": {**ONE_LEVEL, "residual": "none"},
    "linear residual": {**ONE_LEVEL, "residual": "linear"},
    "two RMSNorms": {**ONE_LEVEL, "residual": "linear", "combine": "double_rmsnorm"},
    "defaults": {},
    "few candidates": {"candidates": 1},
    "two levels by keys": {**TWO_LEVELS, "fine_source": "keys"},
    "two levels by sketches": {**TWO_LEVELS, "candidates": 192},
    "sketches of small blocks": {**TWO_LEVELS, "statistics_dtype": "fp8", "selection_block_size": 16},
    "fp8 statistics": {**ONE_LEVEL, "statistics_dtype": "fp8", "selector": "km2-rem", "selection_block_size": 16},
    "small blocks": {**ONE_LEVEL, "selection_block_size": 16, "selector": "taylor2"},
    "upper bounds": {**ONE_LEVEL, "selector": "quest", "residual": "none"},
    "top-p": {**ONE_LEVEL, "top_p": 0.8},
    "top-p of two levels": {**TWO_LEVELS, "top_p": 0.8, "fine_source": "keys"},
    "dense layer": {**ONE_LEVEL, "dense_layers": [0]},
    "budgets of layers": {**ONE_LEVEL, "layer_budgets": "twice"},  # the first layer has twice the budget
    "dense prompts": {**ONE_LEVEL, "prefill_dense_below": 200},
}


@dataclass(frozen=True)
class Settings:
    """One world."""

    options: str  # a name in `OPTIONS`
    page_size: int
    head_size: int
    dtype: str
    budget: int  # tokens
    num_layers: int
    max_model_len: int
    spare_pages: int  # of the pool, beyond those that one request of `max_model_len` tokens takes
    max_num_seqs: int
    max_num_batched_tokens: int
    num_drafts: int
    prefix_caching: bool
    asynchronous: bool  # a step is scheduled before the output of the one before is known
    live: int  # requests that wait or run at most
    arrivals: float  # a step
    aborts: float  # share of requests
    resets: float  # of the prefix cache, a step
    poison: float  # share of freed blocks that are filled with NaN

    @classmethod
    def draw(cls, seed: int) -> "Settings":
        draw = random.Random(f"settings of {seed}")
        options = draw.choice(list(OPTIONS))
        page_size = draw.choice((16, 32, 64))
        selection_block = OPTIONS[options].get("selection_block_size") or page_size
        budget = page_size + selection_block * draw.choice((2, 3, 4))
        return cls(
            options=options,
            page_size=page_size,
            head_size=draw.choice((32, 64, 64, 128)),
            dtype=draw.choice(("float32", "float32", "bfloat16", "float16")),
            budget=budget,
            num_layers=2 if options in ("dense layer", "budgets of layers") else 1,
            max_model_len=int(budget * draw.choice((1.5, 2.1, 3.3, 5))),
            spare_pages=draw.choice((0, 3, 10, 40)),
            max_num_seqs=draw.choice((1, 3, 6, 10)),
            max_num_batched_tokens=draw.choice((64, 200, 1000)),
            num_drafts=draw.choice((0, 0, 1, 3, 5)),
            prefix_caching=draw.random() < 0.85,
            asynchronous=draw.random() < 0.4,
            live=draw.choice((2, 6, 16)),
            arrivals=draw.choice((0.1, 0.3, 1.0)),
            aborts=draw.choice((0.0, 0.1, 0.4)),
            resets=draw.choice((0.0, 0.01, 0.05)),
            poison=draw.choice((0.0, 0.3, 1.0)),
        )

    def spla(self) -> dict[str, Any]:
        """SPLA's options, as a user gives them."""
        options = {"budget": self.budget, **OPTIONS[self.options]}
        if "layer_budgets" in options:
            options["layer_budgets"] = {0: 2 * self.budget}
        return options

    def groups(self) -> list[str]:
        """What a report counts steps by."""
        return [self.options]

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in asdict(self).items())
