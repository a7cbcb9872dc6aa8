"""Sequences whose answers are known: `python -m tests.engine.fuzz.layer --seed 0 --minutes 60`.

As `python -m tests.engine.fuzz`, but requests read and go on with texts of `texts.py`, and every output is compared in
the very step that made it. Options are drawn each by itself (`combinations.py`).
"""

import os
import random
import sys
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # before vLLM is imported

import numpy as np
import torch

from .alone import Alone
from .cli import main
from .combinations import Combination
from .driver import Run
from .settings import NUM_HEADS
from .texts import Library, Text
from .worker import Computed, Row, Sequence, Worker
from .world import World

_REJECTED = 0.05  # share of rejected drafts, which are in no text, whose outputs are computed again


@dataclass
class Reader(Sequence):
    """A request that goes on as its text does."""

    text: Text

    def token(self, position: int) -> int:
        """See `Sequence.token`."""
        return self.text.tokens[position]

    def knows(self, row: Row) -> bool:
        """Whether the row's tokens are the text's: none of them is a wrong draft."""
        return self.hashes.tokens[row.known : row.end] == self.text.tokens[row.known : row.end]


class ReadingWorker(Worker):
    """A worker whose requests read texts.

    Attributes:
        texts: Of requests that were not scheduled yet, by name.
    """

    def __init__(self, world: World, seed: int, counts: Counter[str]) -> None:
        super().__init__(world, seed, counts)
        self.texts: dict[str, Text] = {}
        self._known: list[tuple[Computed, Text]] = []  # of rows of a step, as far as texts know them

    def _sequence(self, name: str, prompt: list[int], blocks: tuple[list[int], ...]) -> Reader:
        return Reader(**vars(super()._sequence(name, prompt, blocks)), text=self.texts.pop(name))

    def _vectors_of(self, rows: list[Row], layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the texts have ready; only wrong drafts are looked up."""
        parts = [
            [x[row.start : row.end] for x in row.sequence.text.joint]
            if row.sequence.knows(row)
            else self.vectors.of(row.sequence.hashes[row.start : row.end], layer)
            for row in rows
        ]
        query, key, value = (torch.cat(x) for x in zip(*parts, strict=True))
        return query, key, value

    def _hand_over(self, name: str) -> None:
        """Everything is compared already."""

    def _keep(self, row: Row, stop: int, out: torch.Tensor, step: int, as_prompt: bool) -> None:
        super()._keep(row, stop, out, step, as_prompt)
        count = stop - row.start
        if count > 0:
            tokens, positions = row.sequence.text.tokens[:stop], np.arange(row.start, stop)
            steps, prompt = np.full(count, step), np.full(count, as_prompt)
            computed = Computed(row.name, tokens, positions, out[:count], steps, prompt)
            self._known.append((computed, row.sequence.text))

    def compare(self, alone: Alone) -> None:
        """What the last step computed with the texts' answers.

        Raises:
            WrongAnswer: Something differs by more than rounding.
        """
        if not self._known:
            return
        known, texts = zip(*self._known, strict=True)
        self._known.clear()
        spans = [slice(c.positions[0], c.positions[-1] + 1) for c in known]
        got = torch.cat([c.outputs for c in known])[:, 0].float()  # [tokens, H, d], of the only layer
        expected = torch.cat([text.answers[span] for text, span in zip(texts, spans, strict=True)])
        lengths = torch.cat([text.lengths[span] for text, span in zip(texts, spans, strict=True)])
        error = (got - expected).norm(dim=-1) / lengths  # [tokens, H]
        wrong = ~(error < alone.tolerance)
        self.counts["outputs_compared"] += error.numel()
        beyond = sum(int((c.positions >= alone.ops[0].params.whole_tokens).sum()) for c in known)
        self.counts["outputs_beyond_the_budget"] += beyond * NUM_HEADS
        alone.worst["texts"] = max(alone.worst["texts"], float(error.where(~wrong, 0.0).max()))
        if bool(wrong.any()):
            for computed, of_row in zip(known, wrong.split([len(c.positions) for c in known]), strict=True):
                alone.excuse(computed, of_row)


class ReadingRun(Run):
    """A world whose requests read texts, from its first step to the last request's end."""

    module: ClassVar[str] = "tests.engine.fuzz.layer"
    report: ClassVar[str] = "fuzz layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        settings = self.settings
        params = self.world.layers[0].impl.options.parameters(settings.page_size, 0)
        length = settings.max_model_len + settings.num_drafts + 1
        self._library = Library(self.seed, length, self._cut, self.worker.vectors, params)

    @staticmethod
    def settings_of(seed: int) -> Combination:
        return Combination.draw(seed)

    def _make_worker(self) -> ReadingWorker:
        return ReadingWorker(self.world, self.seed, self.counts)

    def _prompt(self, draw: random.Random, index: int) -> list[int]:
        text = self._library.choose(draw, index)
        self.worker.texts[f"request {index}"] = text
        # Mostly long ones, beyond the budget: the sooner they end, the sooner others get their blocks.
        return text.tokens[: max(1, self._cut(draw), self._cut(draw))]

    def _check(self) -> None:
        self.worker.compare(self.alone)
        if self.worker.unchecked:
            draw = random.Random(f"{self.seed}, drafts to check in step {self.step}")
            self.worker.unchecked = [c for c in self.worker.unchecked if draw.random() < _REJECTED]
        super()._check()


if __name__ == "__main__":
    sys.exit(main(ReadingRun))
