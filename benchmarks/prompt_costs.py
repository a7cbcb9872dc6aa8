"""What prompts in tiles would take on an H200, by arithmetic: products, other instructions and bytes at stated rates.

Nothing here is measured but the constants that say so. A tile of `tile` tokens and a kv head are `tile * H / G` rows of
a tensor-core tile. Of each tile from the position on where selecting is cheaper than attending to everything count

* coarse: scores of all blocks of complete pages, twice, because a score is shared only when its normaliser is known, of
  the tokens that are scored; with a residual also the masses of these blocks, of all tokens. Tiles whose pages are all
  candidates need only the masses.
* fine: with two levels, products with the keys of the candidates, and an exponential for each.
* attention: products with keys and values of the budget (the logits of the fine stage are not kept).
* residual: the product that takes the selected tokens from the state, and the reading of the state.
* other: choosing, states, queries and outputs.

Tiles that share their candidates score blocks and candidates together: what these stages read is read once, the rows of
all of the tiles fill a tensor-core tile, and candidates are chosen once. A tile counts its part of that.

Everything before that position is dense attention as FlashAttention 3 does it. There are two figures. `ms`: of a stage,
products at the rate that FlashAttention 3 reaches among exponentials, other instructions and copies from the
second-level cache go on side by side, and the longest counts. `in_turn`: products at the rate they reach alone, and
the other instructions after them; only copies go on beside. By that rule FlashAttention 3 would take 262 ms, not 227.
"""

from dataclasses import dataclass

import numpy as np

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.selectors import get_selector

HEADS, KV_HEADS, HEAD_SIZE, ITEM = 32, 8, 128, 2
"""The 8B shape, and bytes an element: bf16."""
PROMPTS = {"128k": 131072, "32k": 32768}

TENSOR = 550e12
"""FLOP/s of products in 16 bits. Assumed: 10% less than FlashAttention 3 in `DENSE_SECONDS`, for tiles that are
gathered. Measured since: 532 to 571 by FlashAttention 3 over block tables (NOTES.md, prompts by tiles)."""
TENSOR_ALONE = 750e12
"""FLOP/s of products and nothing else. Measured: 746 and 789 on two cards (NOTES.md, version 8)."""
TENSOR_FP8 = 900e12
"""FLOP/s in e4m3, alone more by the same factor. Assumed: FlashAttention 3 reports 1 to 1.2 PFLOP/s at head sizes of
128 and 256 (arXiv 2407.08608)."""
DENSE_SECONDS = 0.2269
"""FlashAttention 3, 131072 tokens of this shape. Measured (NOTES.md, version 6): 620 TFLOP/s."""
L2 = 6e12
"""Bytes a second from the second-level cache. Measured: 6.3 TB/s in page attend (NOTES.md, what bounds it)."""
MEMORY = 4.2e12
"""Bytes a second from memory. Measured by copying: 4.25 TB/s (NOTES.md, statistics in fp8)."""
CLOCK = 1.755e9
"""Assumed under load; 1.98 at most by the H200's data sheet."""
LANES = 132 * 128 * CLOCK
"""Instructions a second, one of a lane each: 128 a multiprocessor and clock (CUDA programming guide, compute
capability 9.0)."""
SPECIAL = 132 * 16 * CLOCK
"""Exponentials and roots a second: 16 a multiprocessor and clock (the same table)."""
SCORE_INSTRUCTIONS = {"rem": 21, "mean": 6}
"""Of a row and block. `rem`: from the machine code of the shared scores (NOTES.md, version 2). `mean`: assumed, a
scale, a subtraction, an exponential, a sum and their masks."""
SCORE_SPECIALS = {"rem": 2, "mean": 1}
"""Of a row and block: an exponential, and a root above the freezing point."""
MASS_INSTRUCTIONS, MASS_SPECIALS = 5, 1
"""Of a row and block, beside what its score takes. Assumed."""
FINE_INSTRUCTIONS, FINE_SPECIALS = 4, 1
"""Of a row and candidate token: multiply and add, exponential, sum, largest. Assumed."""
ATTENTION_INSTRUCTIONS, ATTENTION_SPECIALS = 5, 1
"""Of a row and selected token: those, and half a conversion. Assumed."""
RESIDUAL_INSTRUCTIONS = 2
"""Of a row and selected token: mask and conversion of the logit. Assumed."""
CONVERT_INSTRUCTIONS = 1.5
"""Of an element of a key that becomes fp8: half a load, half a conversion, half a store. Assumed."""
SELECT_SECONDS = 5.2e-3 / (114688 * 8)
"""Choosing once for a tile and kv head. Measured for a token, kv head and 2048 pages (NOTES.md, version 6: 5.2 ms)."""
STATE_SECONDS = 1.1e-3 / 2048
"""States, of a page of all kv heads. Measured (NOTES.md, version 6: 1.1 ms)."""
PASSES = 2
"""Over the coarse scores: normalisers, then the tile's."""
ROWS = 64
"""Rows that a `wgmma` has at least: what is below is multiplied all the same."""


@dataclass(frozen=True)
class Stage:
    """Seconds of each tile `[tiles]`."""

    products: np.ndarray
    instructions: np.ndarray
    copies: np.ndarray

    def overlapped(self) -> np.ndarray:
        return np.maximum.reduce([self.products, self.instructions, self.copies])

    def in_turn(self) -> np.ndarray:
        return np.maximum(self.products * TENSOR / TENSOR_ALONE + self.instructions, self.copies)


def elementwise(elements: np.ndarray, instructions: float, specials: float) -> np.ndarray:
    """Seconds of instructions, of which the special ones have a unit of their own."""
    return elements * max(instructions / LANES, specials / SPECIAL)


def stages_of(params: SplaParameters, positions: np.ndarray) -> dict[str, Stage]:
    """What one sparse tile of one kv head takes, at each of some last positions."""
    tiles = params.coarse_tile // params.tile  # that share their candidates
    rows = params.tile * HEADS // KV_HEADS
    multiplied = -(-rows // ROWS) * ROWS
    voters = rows // params.tile_step
    # A tile's part of what all of them multiply together: of all their rows, and of those that are scored.
    multiplied_together, multiplied_voters = (-(-tiles * n // ROWS) * ROWS / tiles for n in (rows, voters))
    complete = positions // params.page_size * params.page_size  # tokens of complete pages
    blocks = complete / params.selection_block
    zero = np.zeros(len(positions))
    has_tail = params.residual != "none"

    candidates = params.candidate_blocks * params.selection_block or params.budget_tokens
    ranks = complete > candidates
    passes = np.where(ranks, PASSES, 0)
    width = get_selector(params.selector).width(HEAD_SIZE)
    row_passes = passes * multiplied_voters
    if has_tail:  # masses are wanted of all rows; those of rows that are scored come with the first pass
        row_passes = row_passes + np.where(ranks, multiplied_together - multiplied_voters, multiplied_together)
    reads = np.maximum(passes, 1 if has_tail else 0) / tiles
    instructions = passes * elementwise(
        voters * blocks, SCORE_INSTRUCTIONS[params.selector], SCORE_SPECIALS[params.selector]
    )
    if has_tail:
        instructions = instructions + elementwise(rows * blocks, MASS_INSTRUCTIONS, MASS_SPECIALS)
    stages = {
        "coarse": Stage(2 * row_passes * blocks * width / TENSOR, instructions, reads * blocks * width * ITEM / L2)
    }
    if params.fine_block:
        tokens = np.minimum(complete, candidates)
        in_fp8 = params.fine_dtype == "fp8"
        rate = TENSOR_FP8 if in_fp8 else TENSOR
        instructions = elementwise(voters * tokens, FINE_INSTRUCTIONS, FINE_SPECIALS)
        if in_fp8:
            instructions = instructions + elementwise(tokens * HEAD_SIZE / tiles, CONVERT_INSTRUCTIONS, 0)
        stages["fine"] = Stage(
            2 * multiplied_voters * tokens * HEAD_SIZE / rate, instructions, tokens * HEAD_SIZE * ITEM / L2 / tiles
        )
    selected = np.minimum(positions + 1, params.budget_tokens)
    stages["attention"] = Stage(
        4 * multiplied * selected * HEAD_SIZE / TENSOR,
        elementwise(rows * selected, ATTENTION_INSTRUCTIONS, ATTENTION_SPECIALS),
        2 * selected * HEAD_SIZE * ITEM / L2,
    )
    if has_tail:
        state = HEAD_SIZE * (HEAD_SIZE + 1)
        stages["residual"] = Stage(
            2 * multiplied * (selected * HEAD_SIZE + state) / TENSOR,
            elementwise(rows * selected, RESIDUAL_INSTRUCTIONS, 0),
            zero + 4 * state / L2,
        )
    choices = 1 / tiles + (1 if params.fine_block else 0)
    read_and_written = 2 * rows * HEAD_SIZE * ITEM / MEMORY
    stages["other"] = Stage(zero, zero + choices * SELECT_SECONDS, zero + read_and_written)
    return stages


def dense_seconds(tokens: int) -> float:
    """Of the first tokens, which attend to everything, all heads."""
    return DENSE_SECONDS * (tokens / 131072) ** 2


def seconds_of(params: SplaParameters, positions: np.ndarray, in_turn: bool) -> np.ndarray:
    """Of one sparse tile of one kv head, at each of some last positions."""
    stages = stages_of(params, positions).values()
    return np.add.reduce([stage.in_turn() if in_turn else stage.overlapped() for stage in stages])


def selects_from(params: SplaParameters, in_turn: bool = False) -> int:
    """The first multiple of 512 from which a tile takes less than dense attention."""
    starts = np.arange(-(-params.whole_tokens // 512) * 512, PROMPTS["128k"], 512)
    ends = starts + params.tile - 1
    dense = np.array([dense_seconds(start + params.tile) - dense_seconds(start) for start in starts]) / KV_HEADS
    cheaper = seconds_of(params, ends, in_turn) < dense
    return int(starts[cheaper.argmax()]) if cheaper.any() else PROMPTS["128k"]


def milliseconds(params: SplaParameters, tokens: int, start: int, in_turn: bool) -> dict[str, float]:
    """A prompt of one layer by stages, whose tokens select from `start` on; `all` is their sum."""
    start = min(start, tokens)
    ends = np.arange(start, tokens, params.tile) + params.tile - 1
    found = {"dense": 1e3 * dense_seconds(start)}
    if len(ends):
        for name, stage in stages_of(params, ends).items():
            seconds = stage.in_turn() if in_turn else stage.overlapped()
            found[name] = 1e3 * KV_HEADS * float(seconds.sum())
        found["other"] += 1e3 * STATE_SECONDS * tokens / params.page_size
    return {"all": sum(found.values()), **found}


def predicted(params: SplaParameters, dense_below: int = 0) -> dict[str, object]:
    """Fields of a report's row: where tiles begin to select, milliseconds of both prompts, and of what they consist."""
    start = dense_below or selects_from(params)
    row: dict[str, object] = {"selects_from": start}
    for name, tokens in PROMPTS.items():
        parts = milliseconds(params, tokens, start, False)
        row[f"ms_{name}"] = round(parts["all"], 1)
        row[f"in_turn_ms_{name}"] = round(milliseconds(params, tokens, start, True)["all"], 1)
        row[f"parts_{name}"] = {part: round(ms, 2) for part, ms in parts.items() if part != "all"}
    return row
