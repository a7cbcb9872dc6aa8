"""Selectors: which statistics a selection block keeps, and what they say about its attention mass.

To add one, subclass `Selector`, decorate it with `register_selector`, and name it in the options: that runs on a CPU. A
GPU needs its device functions too, in `kernels/gpu/selectors.py`. `examples/write_your_own_selector.py` does both in a
user's own file. What other code wants to know of a selector is a trait of its class, never its name. The layout of the
statistics of each is listed in docs/design.md, 5; the float64 definitions are in `reference.py`.
"""

import math
from abc import ABC, abstractmethod

import torch

from .parameters import SplaParameters
from .statistics_format import COUNT, E4M3, E5M2, Formats, decode, encode

_LLOYD_ITERATIONS = 4


class Selector(ABC):
    """Statistics of a selection block and the scores made from them.

    A score estimates `log sum_{t in block} exp(q . k_t)`, the log of the attention mass of the block. All tensors
    are float32 or float64; storing statistics, in the cache dtype or in bytes, is the caller's business.
    """

    name: str
    has_mass: bool = True
    """Whether `mass` exists: a bound (`quest`) ranks blocks but does not estimate how much they hold."""
    score_is_mass: bool = False
    """Whether `mass` is `score`, so that one number a block does for both."""
    mean_first: bool = False
    """Whether the statistics of a block begin with the mean of its keys, from which a sketch of them counts
    (`sketch.py`)."""
    sets_per_block: int = 1
    """Sets of vectors that a query is multiplied with to score a block: launches of twice as many take half the blocks
    at a time."""

    @abstractmethod
    def width(self, head_size: int) -> int:
        """Elements of the statistics of one selection block of one kv head."""

    def formats(self, head_size: int) -> Formats | None:
        """How the `width` elements are stored where statistics take a byte each; None: they cannot be."""
        return None

    @property
    def counts_keys(self) -> bool:
        """Whether numbers of keys are among the statistics, of which a byte holds up to `MAX_COUNT`."""
        return any(kind == COUNT for kind, _ in self.formats(64) or ())

    @abstractmethod
    def statistics(self, keys: torch.Tensor) -> torch.Tensor:
        """Statistics `[..., width]` of blocks of keys `[..., block_size, head_size]`."""

    @abstractmethod
    def score(self, q: torch.Tensor, statistics: torch.Tensor, block_size: int) -> torch.Tensor:
        """Selection scores `[..., num_queries, num_blocks]`.

        Args:
            q: Scaled queries `[..., num_queries, head_size]`.
            statistics: `[..., num_blocks, width]`; leading dimensions broadcast against those of `q`.
            block_size: Tokens a selection block.
        """

    def mass(self, q: torch.Tensor, statistics: torch.Tensor, block_size: int) -> torch.Tensor:
        """Conservative log mass of blocks, for the tail; shapes as in `score`.

        Raises:
            ValueError: The selector keeps no statistics that give a mass.
        """
        raise ValueError(f"selector {self.name!r} keeps no statistics that estimate the mass of a block")

    def score_and_mass(
        self, q: torch.Tensor, statistics: torch.Tensor, block_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`score` and `mass`; override it where the two share work."""
        return self.score(q, statistics, block_size), self.mass(q, statistics, block_size)


REGISTERED: dict[str, type[Selector]] = {}
"""By name; `register_selector` adds to it."""


def register_selector(cls: type[Selector]) -> type[Selector]:
    """Class decorator: make a selector available under its `name`."""
    REGISTERED[cls.name] = cls
    return cls


def selector_names() -> list[str]:
    return sorted(REGISTERED)


def get_selector(name: str) -> Selector:
    """The selector called `name`.

    Raises:
        ValueError: No such selector; the message names those that exist.
    """
    if name not in REGISTERED:
        raise ValueError(f"unknown selector {name!r}: choose one of {', '.join(selector_names())}")
    return REGISTERED[name]()


def stored_formats(params: SplaParameters, head_size: int) -> Formats | None:
    """How statistics are stored where `params` have them take a byte each; None: in the cache dtype."""
    return get_selector(params.selector).formats(head_size) if params.statistics_dtype == "fp8" else None


def block_statistics(keys: torch.Tensor, params: SplaParameters) -> torch.Tensor:
    """Statistics `[..., width]` of blocks of keys `[..., block_size, head_size]`, as they are read where `params` store
    them in fp8, unrounded otherwise. Their gradient is that of the unrounded ones (straight through)."""
    exact = get_selector(params.selector).statistics(keys)
    formats = stored_formats(params, keys.shape[-1])
    if formats is None:
        return exact
    stored = decode(encode(exact.detach(), formats), formats).to(exact.dtype)
    return stored + (exact - exact.detach())  # exactly `stored`: 0 is added


def _log1p_half(s2: torch.Tensor) -> torch.Tensor:
    """`log(1 + s2 / 2)`: the second-order Taylor expansion of the log of a mean of exponentials."""
    return torch.log1p(0.5 * s2)


def _random_energy(s2: torch.Tensor, log_count: torch.Tensor | float) -> torch.Tensor:
    """Log-mean-exp of `count` Gaussian samples of variance `s2` (random energy model): quadratic until the largest
    sample dominates, then linear in the deviation."""
    frozen = torch.sqrt(s2 * (2 * log_count)) - log_count
    return torch.where(s2 < 2 * log_count, 0.5 * s2, frozen)


@register_selector
class MeanSelector(Selector):
    """First order: `log b + q . mu`."""

    name = "mean"
    score_is_mass = True
    mean_first = True

    def width(self, head_size: int) -> int:
        return head_size

    def formats(self, head_size: int) -> Formats:
        return ((E4M3, head_size),)

    def statistics(self, keys: torch.Tensor) -> torch.Tensor:
        return keys.mean(-2)

    def score(self, q: torch.Tensor, statistics: torch.Tensor, block_size: int) -> torch.Tensor:
        return math.log(block_size) + q @ statistics.mT

    mass = score


class _MomentSelector(Selector):
    """Selectors on the mean and the diagonal of the covariance: `log b + q . mu + f(q^T Sigma q)`."""

    mean_first = True

    def width(self, head_size: int) -> int:
        return 2 * head_size

    def formats(self, head_size: int) -> Formats:
        return (E4M3, head_size), (E5M2, head_size)

    def statistics(self, keys: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(keys, dim=-2, correction=0)
        return torch.cat([mean, variance], -1)

    def moments(self, q: torch.Tensor, statistics: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of the logits of a block, shaped as `score`."""
        mean, variance = statistics.chunk(2, -1)
        return q @ mean.mT, q.square() @ variance.mT

    def score(self, q: torch.Tensor, statistics: torch.Tensor, block_size: int) -> torch.Tensor:
        linear, s2 = self.moments(q, statistics)
        return math.log(block_size) + linear + self._second_order(s2, block_size)

    def mass(self, q: torch.Tensor, statistics: torch.Tensor, block_size: int) -> torch.Tensor:
        linear, s2 = self.moments(q, statistics)
        return math.log(block_size) + linear + _log1p_half(s2)

    def score_and_mass(
        self, q: torch.Tensor, statistics: torch.Tensor, block_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        linear, s2 = self.moments(q, statistics)
        linear = linear + math.log(block_size)
        return linear + self._second_order(s2, block_size), linear + _log1p_half(s2)

    @abstractmethod
    def _second_order(self, s2: torch.Tensor, block_size: int) -> torch.Tensor: ...


@register_selector
class Taylor2Selector(_MomentSelector):
    """The paper's score (SPLA, arXiv 2601.22379): `log b + q . mu + log(1 + q^T Sigma q / 2)`."""

    name = "taylor2"
    score_is_mass = True

    def _second_order(self, s2: torch.Tensor, block_size: int) -> torch.Tensor:
        return _log1p_half(s2)


@register_selector
class Cumulant2Selector(_MomentSelector):
    """Second cumulant (COBS, arXiv 2607.09052): `log b + q . mu + q^T Sigma q / 2`."""

    name = "cumulant2"

    def _second_order(self, s2: torch.Tensor, block_size: int) -> torch.Tensor:
        return 0.5 * s2


@register_selector
class RemSelector(_MomentSelector):
    """Random energy model: the second cumulant until `b` samples can no longer reach it."""

    name = "rem"

    def _second_order(self, s2: torch.Tensor, block_size: int) -> torch.Tensor:
        return _random_energy(s2, math.log(block_size))


@register_selector
class QuestSelector(Selector):
    """Upper bound from per-coordinate extremes (Quest, arXiv 2406.10774): `sum_i max(q_i kmin_i, q_i kmax_i)`."""

    name = "quest"
    has_mass = False

    def width(self, head_size: int) -> int:
        return 2 * head_size

    def formats(self, head_size: int) -> Formats:
        return ((E4M3, 2 * head_size),)

    def statistics(self, keys: torch.Tensor) -> torch.Tensor:
        return torch.cat(list(torch.aminmax(keys, dim=-2)), -1)

    def score(self, q: torch.Tensor, statistics: torch.Tensor, block_size: int) -> torch.Tensor:
        kmin, kmax = statistics.chunk(2, -1)
        # A positive coordinate meets its largest value in kmax, a negative one in kmin.
        return q.clamp(min=0) @ kmax.mT + q.clamp(max=0) @ kmin.mT


@register_selector
class KMeans2RemSelector(Selector):
    """Two k-means clusters a block, each scored by the random energy model, joined by log-sum-exp."""

    name = "km2-rem"
    sets_per_block = 2

    def width(self, head_size: int) -> int:
        return 4 * head_size + 2

    def formats(self, head_size: int) -> Formats:
        return *((E4M3, head_size), (E5M2, head_size)) * 2, (COUNT, 2)

    def statistics(self, keys: torch.Tensor) -> torch.Tensor:
        in_second = self._in_second_cluster(keys)  # [..., block_size]
        parts, counts = [], []
        for member in (~in_second, in_second):
            weight = member.to(keys.dtype).unsqueeze(-1)  # [..., block_size, 1]
            count = weight.sum(-2)  # [..., 1]
            mean = (keys * weight).sum(-2) / count.clamp(min=1)
            variance = ((keys - mean.unsqueeze(-2)).square() * weight).sum(-2) / count.clamp(min=1)
            parts += [mean, variance]
            counts.append(count)
        return torch.cat(parts + counts, -1)

    @staticmethod
    def _in_second_cluster(keys: torch.Tensor) -> torch.Tensor:
        """Lloyd's algorithm from the two most distant keys (the outlier first); ties fall to the first cluster."""

        def squared_distance(centroid: torch.Tensor) -> torch.Tensor:
            return (keys - centroid).square().sum(-1)  # [..., block_size]

        def key_at(index: torch.Tensor) -> torch.Tensor:
            index = index[..., None, None].expand(*index.shape, 1, keys.shape[-1])
            return keys.gather(-2, index)  # [..., 1, head_size]

        first = key_at(squared_distance(keys.mean(-2, keepdim=True)).argmax(-1))
        second = key_at(squared_distance(first).argmax(-1))
        for _ in range(_LLOYD_ITERATIONS):
            in_second = squared_distance(second) < squared_distance(first)
            weight = in_second.to(keys.dtype).unsqueeze(-1)
            n_second = weight.sum(-2, keepdim=True)
            n_first = keys.shape[-2] - n_second
            second = torch.where(n_second > 0, (keys * weight).sum(-2, keepdim=True) / n_second.clamp(min=1), second)
            first = torch.where(n_first > 0, (keys * (1 - weight)).sum(-2, keepdim=True) / n_first.clamp(min=1), first)
        return squared_distance(second) < squared_distance(first)

    def _cluster_scores(self, q: torch.Tensor, statistics: torch.Tensor, frozen: bool) -> torch.Tensor:
        d = q.shape[-1]
        clusters = []
        for i in (0, 1):
            mean = statistics[..., 2 * i * d : (2 * i + 1) * d]
            variance = statistics[..., (2 * i + 1) * d : (2 * i + 2) * d]
            log_count = statistics[..., 4 * d + i].unsqueeze(-2).log()  # [..., 1, num_blocks], -inf where empty
            s2 = q.square() @ variance.mT
            second = _random_energy(s2, log_count.clamp(min=0)) if frozen else _log1p_half(s2)
            clusters.append(log_count + q @ mean.mT + second)
        return torch.logaddexp(clusters[0], clusters[1])

    def score(self, q: torch.Tensor, statistics: torch.Tensor, block_size: int) -> torch.Tensor:
        return self._cluster_scores(q, statistics, frozen=True)

    def mass(self, q: torch.Tensor, statistics: torch.Tensor, block_size: int) -> torch.Tensor:
        return self._cluster_scores(q, statistics, frozen=False)
