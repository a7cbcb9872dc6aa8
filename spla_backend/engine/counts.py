"""What a finished request read, from its lengths alone: nothing is counted where tokens are computed.

A request's lengths say which of its tokens could not fit into the budget, and so how many blocks each one read.
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
        params: What layers without a budget of their own compute; it decides which prompt tokens are dense.
        layers: What every layer of full attention computes; None for one that attends to everything.
        prefill_dense_below: Prompt tokens at positions below this attend to everything.
    """

    def __init__(
        self, params: SplaParameters, layers: Iterable[SplaParameters | None], prefill_dense_below: int
    ) -> None:
        self.block = params.selection_block
        self.blocks_per_page = params.page_size // params.selection_block
        self.dense_below = max(prefill_dense_below, params.budget_blocks * params.selection_block)
        self.budgets = Counter(None if layer is None else layer.budget_blocks for layer in layers)

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
        blocks = np.arange(num_prompt, num_prompt + num_generated - 1) // self.block + 1  # of each token's context
        read = sum(
            int((blocks if budget is None else np.minimum(blocks, budget)).sum()) * layers
            for budget, layers in self.budgets.items()
        )
        return Counts(
            decode_tokens=num_generated - 1,
            dense_prompt_tokens=dense,
            sparse_prompt_tokens=num_prompt - num_cached - dense,
            pages_held=int(blocks.sum()) / self.blocks_per_page,
            pages_read=read / self.budgets.total() / self.blocks_per_page,
        )
