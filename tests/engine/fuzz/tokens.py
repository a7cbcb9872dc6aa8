"""Queries, keys and values of a token: a function of the tokens up to it, as in a model, and of nothing else.

Of a sequence's tokens a running hash is kept. A token's vectors are those that its hash picks from random tables, and a
key has beside it a mean that the hash at the begin of its block of 16 tokens picks, so that blocks differ in mass.
"""

import numpy as np
import torch

from .settings import NUM_HEADS, NUM_KV_HEADS

_TABLE, _BLOCK = 2039, 16
_MASK = (1 << 64) - 1
VOCABULARY = 1000


class Hashes:
    """Running hashes of a sequence that grows; what was appended may be cut off again."""

    def __init__(self) -> None:
        self._hash = [0x9E3779B97F4A7C15]  # of each prefix
        self.tokens: list[int] = []

    def __len__(self) -> int:
        return len(self.tokens)

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            self._hash.append((self._hash[-1] * 6364136223846793005 + token + 1442695040888963407) & _MASK)
        self.tokens += tokens

    def cut(self, length: int) -> None:
        del self.tokens[length:], self._hash[length + 1 :]

    def __getitem__(self, part: slice) -> "np.ndarray":
        """`[tokens, 2]` uint64: the hashes of tokens, and those at the begin of their blocks."""
        start, stop, _ = part.indices(len(self))
        blocks = [self._hash[position // _BLOCK * _BLOCK + 1] for position in range(start, stop)]
        return np.array([self._hash[start + 1 : stop + 1], blocks], np.uint64).T


class Vectors:
    """The random tables of a world.

    Args:
        seed: Of the world.
        head_size: Of a query, a key and a value.
        dtype: Theirs.
    """

    def __init__(self, seed: int, head_size: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        heads = NUM_HEADS + 2 * NUM_KV_HEADS
        self._token = torch.randn(_TABLE, heads, head_size, generator=generator)
        self._token[:, :NUM_HEADS] *= 2
        self._mean = torch.zeros_like(self._token)
        mean = torch.randn(_TABLE, 2, NUM_KV_HEADS, head_size, generator=generator)
        self._mean[:, NUM_HEADS:] = (mean * torch.tensor([0.5, 1.0])[:, None, None]).flatten(1, 2)
        self._dtype = dtype

    def of(self, hashes: "np.ndarray", layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries `[tokens, H, d]`, keys and values `[tokens, G, d]`: views of one tensor, as of a joint projection."""
        token, block = ((hashes.T + np.uint64(layer)) % np.uint64(_TABLE)).astype(np.int64)
        joint = (self._token[torch.from_numpy(token)] + self._mean[torch.from_numpy(block)]).to(self._dtype)
        query, key, value = joint.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], 1)
        return query, key, value
