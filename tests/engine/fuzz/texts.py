"""Texts whose every answer is known: what requests of `layer.py` read and write.

A text's answers are computed once, all at a time, by the algorithm on whole sequences, which knows nothing of pages,
states, chunks or batches. Texts share stems that are cut anywhere in a page.
"""

import functools
import random
from collections.abc import Callable

import torch

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.sequence import spla_attention

from .tokens import VOCABULARY, Hashes, Vectors

_AT_ONCE, _READERS, _STEMS = 6, 10, 4


class Text:
    """Tokens, as many as a sequence and its drafts may have, and attention's answer at each.

    Attributes:
        tokens: What is prompt and what is generated is a request's choice.
    """

    def __init__(self, tokens: list[int], vectors: Vectors, params: SplaParameters) -> None:
        self.tokens, self._vectors, self._params = tokens, vectors, params

    @functools.cached_property
    def joint(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries `[tokens, H, d]`, keys and values `[tokens, G, d]`."""
        hashes = Hashes()
        hashes.extend(self.tokens)
        return self._vectors.of(hashes[: len(hashes)], 0)

    @functools.cached_property
    def answers(self) -> torch.Tensor:
        """`[tokens, H, d]` float32."""
        q, k, v = (x.transpose(0, 1)[None] for x in self.joint)  # [1, heads, tokens, d]
        return spla_attention(q.float() * q.shape[-1] ** -0.5, k, v, self._params)[0].transpose(0, 1).contiguous()

    @functools.cached_property
    def lengths(self) -> torch.Tensor:
        """Of the answers as vectors, `[tokens, H]`."""
        return self.answers.norm(dim=-1)


class Library:
    """The texts of a world: text number `n` is a function of the world's seed and `n`. Few are read at a time, so that
    requests find the pages of others, and some go as others come.

    Args:
        seed: Of the world.
        length: Tokens of a text.
        cut: Draws a length at which a stem ends.
        vectors: The world's.
        params: What attention computes.
    """

    def __init__(
        self, seed: int, length: int, cut: Callable[[random.Random], int], vectors: Vectors, params: SplaParameters
    ) -> None:
        self._seed, self._length, self._cut = seed, length, cut
        self._tokens: list[list[int]] = []  # of all texts; their answers take more memory
        self._text = functools.lru_cache(2 * _AT_ONCE)(lambda number: Text(self._tokens[number], vectors, params))

    def choose(self, draw: random.Random, reader: int) -> Text:
        """One of the texts that request number `reader` may read; later ones read other texts."""
        number = reader // _READERS + draw.randrange(_AT_ONCE)
        while len(self._tokens) <= number:
            self._tokens.append(self._write())
        return self._text(number)

    def _write(self) -> list[int]:
        draw = random.Random(f"{self._seed}, text {len(self._tokens)}")
        stems = self._tokens[-_STEMS:]
        begin = draw.choice(stems)[: self._cut(draw)] if stems else []
        return [*begin, *[draw.randrange(VOCABULARY) for _ in range(self._length - len(begin))]]
