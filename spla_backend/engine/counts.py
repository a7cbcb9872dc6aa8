"""What a finished request read, from its lengths alone: nothing is counted where tokens are computed.

A request's lengths say which of its tokens selected, and so how many blocks each one read.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..algorithm.parameters import SplaParameters


@dataclass
class Counts:
    """Sums over finished requests. Attributes are tokens but for the last two.

    Attributes:
        decode_tokens: Tokens that were generated from a step of their own, so all but a request's first.
        dense_prompt_tokens: Prompt tokens that attended to everything; those from the prefix cache are not computed.
        sparse_prompt_tokens: Prompt tokens that selected.
        pages_held: Pages of the contexts that decode tokens had, one context a token.
        pages_read: Pages' worth of keys and values that decode tokens attended to exactly: the mean over layers.
    """

    decode_tokens: int = 0
    dense_prompt_tokens: int = 0
    sparse_prompt_tokens: int = 0
    pages_held: float = 0.0
    pages_read: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


class RequestCounter:
    """Counts of a request by its lengths.

    Args:
        params: What layers without a budget of their own compute for prompts; it decides which prompt tokens are dense.
        layers: What every layer of full attention computes; None for one that attends to everything.
        prefill_dense_below: Prompt tokens at positions below this attend to everything.
    """

    def __init__(
        self, params: SplaParameters, layers: Iterable[SplaParameters | None], prefill_dense_below: int
    ) -> None:
        self.page_size, self.block = params.page_size, params.selection_block
        self.dense_below = max(prefill_dense_below, params.whole_tokens)
        # Tokens of a block that is attended to, of the budget, and of a context up to which all of it is attended to.
        self.layers = Counter(
            None if layer is None else (layer.attended_block, layer.budget_tokens, layer.whole_tokens)
            for layer in layers
        )

    def count(self, num_prompt: int, num_cached: int, num_generated: int) -> Counts:
        """A request that was computed to its end, once.

        Args:
            num_prompt: Tokens of the prompt.
            num_cached: How many of these came from the prefix cache.
            num_generated: Tokens of the answer, of which the prompt's last token makes the first.
        """
        if num_generated == 0:  # given up before its prompt was computed
            return Counts()
        dense = max(min(num_prompt, self.dense_below) - num_cached, 0)
        positions = np.arange(num_prompt, num_prompt + num_generated - 1)
        held = int((positions // self.block + 1).sum()) * self.block  # tokens
        read = 0
        for layer, number in self.layers.items():
            if layer is None:
                read += held * number
            else:
                block, budget, whole = layer
                tokens = np.where(positions < whole, (positions // block + 1) * block, budget)
                read += int(tokens.sum()) * number
        return Counts(
            decode_tokens=num_generated - 1,
            dense_prompt_tokens=dense,
            sparse_prompt_tokens=num_prompt - num_cached - dense,
            pages_held=held / self.page_size,
            pages_read=read / self.layers.total() / self.page_size,
        )
