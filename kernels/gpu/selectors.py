"""Device functions of selectors: how statistics of a block are made, and what they say of its score and its mass.

A selector that runs on a GPU has its class in `algorithm/selectors.py` and its functions here, found by that class; a
user's has both in a file of the user's own (`examples/write_your_own_selector.py`). All kernels take them as a
compile-time constant, a `GpuSelector`: storing tokens (`page.py`), scoring in decode (`decode/score.py`) and in prefill
(`prefill/score.py`). Tests go over this table. What the functions read and write, and by which others, is in
`statistics.py`.

Plain reference: `reference.block_statistics`, `selection_score`, `mass_score`. Sources: mean and diagonal variance with
`taylor2`, SPLA (arXiv 2601.22379); `cumulant2`, COBS (arXiv 2607.09052); kmin and kmax, `quest` (arXiv 2406.10774);
`rem`, the log-mean-exp of a random energy model; two clusters, Lloyd's k-means, with `km2-rem`, the same for each.

An *estimate* of the log of a sum of exponentials is a tuple of terms, `(exponent,)` or `(exponent, factor)`: the log of
the sum of `factor * exp(exponent)`, exponents in the units of the logits. A log is then taken only where it is needed.
"""

from dataclasses import dataclass, fields
from typing import Any

import triton
import triton.language as tl

from ...algorithm.selectors import (
    Cumulant2Selector,
    KMeans2RemSelector,
    MeanSelector,
    QuestSelector,
    RemSelector,
    Selector,
    Taylor2Selector,
    get_selector,
    selector_names,
)
from .statistics import (
    block_keys,
    block_mean,
    block_variance,
    load_two_counts,
    load_vectors,
    logarithm,
    multiply,
    store_count,
    store_vector,
)

LLOYD_ITERATIONS = tl.constexpr(4)


@dataclass(frozen=True, eq=False)  # looked up by identity at every launch
class GpuSelector:
    """What `triton.jit` made of a selector's device functions.

    Attributes:
        store: `(block)`: make the statistics of a `Block` and store them, in the order of `Selector.statistics`.
        prepare: `(q, scale, QUERY_ROWS, NAT)`: what `score` wants of queries `[DP, queries]`, or `[queries, DP]` where
            `QUERY_ROWS`; they come unscaled. `NAT` is one nat in the units of the logits.
        score: `(query, blocks)`: of `Blocks`, with `query` from `prepare`, the estimate of the score, that of the mass,
            and the product of the query with the mean key. The latter two are empty tuples where the selector has no
            mass. A constant over all blocks, such as the log of their size, may be left out of a score without mass.
        whole_blocks: `store` wants all keys of a block at once.
    """

    store: Any
    prepare: Any
    score: Any
    whole_blocks: bool = False

    @property
    def cache_key(self) -> str:
        """What Triton knows a constant by where it keeps compiled kernels on disk: the source of the functions."""
        return " ".join(f.cache_key for f in (self.store, self.prepare, self.score))

    def __repr__(self) -> str:
        """What Triton knows a constant by within a process."""
        values = (getattr(self, field.name) for field in fields(self))
        return f"GpuSelector({', '.join(getattr(x, 'cache_key', str(x)) for x in values)})"


_GPU_SELECTORS: dict[type[Selector], GpuSelector] = {}


def register_gpu_selector(selector: type[Selector], functions: GpuSelector) -> None:
    """Let a selector run on a GPU.

    Args:
        selector: Its class. Another one, even of the same name, does not take its functions over.
        functions: Its device functions, which compute what the class does.
    """
    _GPU_SELECTORS[selector] = functions


def gpu_selector_names() -> list[str]:
    """The selectors that run on a GPU."""
    return [name for name in selector_names() if type(get_selector(name)) in _GPU_SELECTORS]


def gpu_selector(name: str) -> GpuSelector:
    """The device functions of the selector called `name`.

    Raises:
        ValueError: No such selector, or it has none.
    """
    functions = _GPU_SELECTORS.get(type(get_selector(name)))
    if functions is None:
        raise ValueError(
            f"selector {name!r} has no device functions: give it some by register_gpu_selector "
            "(spla_backend/kernels/gpu/selectors.py, where the built-in ones are examples), or choose one of "
            f"{', '.join(gpu_selector_names())}"
        )
    return functions


# Estimates


@triton.jit
def log_sum(estimate):
    """The log that an estimate is of, in nats."""
    total = _log_term(estimate[0])
    for i in tl.static_range(1, len(estimate)):
        total = _log_add_exp(total, _log_term(estimate[i]))
    return total


@triton.jit
def _log_term(term):
    x = term[0]
    if len(term) > 1:
        x += tl.log(term[1])
    return x


@triton.jit
def _log_add_exp(a, b):
    """`log(exp(a) + exp(b))`, one of them finite."""
    top = tl.maximum(a, b)
    return top + tl.log(tl.exp(a - top) + tl.exp(b - top))


@triton.jit
def largest_exponent(estimate):
    """The largest of an estimate's exponents."""
    top = estimate[0][0]
    for i in tl.static_range(1, len(estimate)):
        top = tl.maximum(top, estimate[i][0])
    return top


@triton.jit
def sum_over(estimate, top):
    """The sum that an estimate is the log of, in powers of two, over `2^top`."""
    total = _term_over(estimate[0], top)
    for i in tl.static_range(1, len(estimate)):
        total += _term_over(estimate[i], top)
    return total


@triton.jit
def _term_over(term, top):
    x = tl.exp2(term[0] - top)
    if len(term) > 1:
        x *= term[1]
    return x


# mean


@triton.jit
def _store_mean(block):
    store_vector(block, 0, block_mean(block))


@triton.jit
def _as_they_are(q, scale, QUERY_ROWS: tl.constexpr, NAT: tl.constexpr):
    return q


@triton.jit
def _score_mean(q, blocks):
    product = multiply(load_vectors(blocks, 0), q, blocks)
    logit = product * blocks.scale + blocks.offset
    return ((logit,),), ((logit,),), product


# taylor2, cumulant2, rem: mean and variance


@triton.jit
def _store_moments(block):
    mean = block_mean(block)
    variance = block_variance(block, mean)
    store_vector(block, 0, mean)
    store_vector(block, block.D, variance, VARIANCE=True)


@triton.jit
def _with_squares(q, scale, QUERY_ROWS: tl.constexpr, NAT: tl.constexpr):
    """Queries, and half their squares for the product with the variance of keys, in a dtype that tensor cores take."""
    wide = q.to(tl.float32)
    if QUERY_ROWS:
        # Rounded once: `prefill/score.py` says what that costs. Within the range of float16.
        query = q, tl.minimum(wide * wide * (scale * scale * (0.5 * NAT)), 60000.0).to(q.dtype)
    else:
        # q^2 has twice the digits of q: as a sum of two numbers of its dtype it keeps them. Normalised to its largest
        # element, because fp16 could not hold it otherwise.
        square = wide * wide * (scale * scale)
        peak = tl.maximum(tl.max(square, axis=0), 1e-30)  # [queries]
        square = square * (1024.0 / peak)[None, :]
        high = square.to(q.dtype)
        low = (square - high.to(tl.float32)).to(q.dtype)
        query = q, high, low, peak * (0.5 * NAT / 1024.0)  # type: ignore[assignment]
    return query


@triton.jit
def _moments(query, blocks, AT: tl.constexpr):
    """Products of queries with the mean that is stored from number `AT` on, and half the variance of the logits by the
    variance that follows it, in units of the logits."""
    mean = load_vectors(blocks, AT)
    variance = load_vectors(blocks, AT + blocks.D, VARIANCE=True)
    if blocks.QUERY_ROWS:
        q, square = query
        product = multiply(mean, q, blocks)
        half = multiply(variance, square, blocks)
    else:
        q, high, low, restore = query
        half = tl.maximum(multiply(variance, low, blocks, multiply(variance, high, blocks)) * restore[None, :], 0.0)
        product = multiply(mean, q, blocks)
    return product, half


@triton.jit
def _second_order(half, blocks):
    """A mean of exponentials about their mean to second order (Taylor), from half the variance: what the mass of all
    selectors on moments is made of, because the others overestimate that of what was left out."""
    return 1.0 + half * (1.0 / blocks.NAT)


@triton.jit
def _random_energy(half, log_count, root):
    """Log-mean-exp of samples from half their variance; `log_count` is not negative, `root` is `2 sqrt(log_count)`."""
    return tl.where(half < log_count, half, tl.sqrt(half) * root - log_count)


@triton.jit
def _score_taylor2(query, blocks):
    product, half = _moments(query, blocks, 0)
    estimate = ((product * blocks.scale + blocks.offset, _second_order(half, blocks)),)
    return estimate, estimate, product


@triton.jit
def _score_cumulant2(query, blocks):
    product, half = _moments(query, blocks, 0)
    logit = product * blocks.scale + blocks.offset
    return ((logit + half,),), ((logit, _second_order(half, blocks)),), product


@triton.jit
def _score_rem(query, blocks):
    product, half = _moments(query, blocks, 0)
    root = 2 * blocks.LOG_UNIT**0.5
    # The compiler's schedule follows the order of these lines: each is the one that was measured in its loop.
    if blocks.QUERY_ROWS:
        factor = _second_order(half, blocks)
        term = _random_energy(half, blocks.LOG_UNIT, root)
        logit = product * blocks.scale + blocks.offset
        score = logit + term
    else:
        logit = product * blocks.scale + blocks.offset
        score = logit + _random_energy(half, blocks.LOG_UNIT, root)
        factor = _second_order(half, blocks)
    return ((score,),), ((logit, factor),), product


# quest


@triton.jit
def _store_extremes(block):
    low = tl.full([block.DP], float("inf"), dtype=tl.float32)
    high = tl.full([block.DP], float("-inf"), dtype=tl.float32)
    for first in tl.static_range(0, block.UNIT, block.TILE):
        keys, _ = block_keys(block, first)
        low = tl.minimum(low, tl.min(keys, axis=0))
        high = tl.maximum(high, tl.max(keys, axis=0))
    store_vector(block, 0, low)
    store_vector(block, block.D, high)


@triton.jit
def _by_sign(q, scale, QUERY_ROWS: tl.constexpr, NAT: tl.constexpr):
    return tl.minimum(q, 0.0).to(q.dtype), tl.maximum(q, 0.0).to(q.dtype)


@triton.jit
def _score_quest(query, blocks):
    negative, positive = query
    least = load_vectors(blocks, 0)
    largest = load_vectors(blocks, blocks.D)
    product = multiply(largest, positive, blocks, multiply(least, negative, blocks))
    return ((product * blocks.scale + blocks.offset,),), (), ()


# km2-rem: mean and variance of each of two clusters, and the numbers of their keys


@triton.jit
def _store_clusters(block):
    keys, exists = block_keys(block, 0)
    in_second = two_means(keys, exists, block.UNIT)
    for cluster in tl.static_range(2):
        member = exists & (in_second == (cluster == 1))
        count = tl.sum(member.to(tl.float32), axis=0)
        scaled = 1.0 / tl.maximum(count, 1.0)
        mean = tl.sum(tl.where(member[:, None], keys, 0.0), axis=0) * scaled  # [DP]
        deviation = tl.where(member[:, None], keys - mean[None, :], 0.0)
        variance = tl.sum(deviation * deviation, axis=0) * scaled
        store_vector(block, cluster * 2 * block.D, mean)
        store_vector(block, (cluster * 2 + 1) * block.D, variance, VARIANCE=True)
        store_count(block, 4 * block.D + cluster, count)


@triton.jit
def two_means(keys, exists, UNIT: tl.constexpr):
    """Which of the keys `[ROWS, DP]` belong to the second of two clusters, `[ROWS]`; `reference.two_means`.

    Lloyd's algorithm from the two most distant keys (the outlier first); ties fall to the first cluster. Rows that do
    not exist are 0.
    """
    from_mean = _squared_distance(keys, tl.sum(keys, axis=0) / UNIT)
    first = _key_at(keys, tl.argmax(tl.where(exists, from_mean, -1.0), axis=0))
    from_first = _squared_distance(keys, first)
    second = _key_at(keys, tl.argmax(tl.where(exists, from_first, -1.0), axis=0))
    for _ in tl.range(0, LLOYD_ITERATIONS):
        in_second = exists & (_squared_distance(keys, second) < _squared_distance(keys, first))
        count = tl.sum(in_second.to(tl.float32), axis=0)
        of_second = tl.sum(tl.where(in_second[:, None], keys, 0.0), axis=0)
        of_first = tl.sum(tl.where(in_second[:, None], 0.0, keys), axis=0)
        second = tl.where(count > 0, of_second / tl.maximum(count, 1.0), second)
        first = tl.where(count < UNIT, of_first / tl.maximum(UNIT - count, 1.0), first)
    return exists & (_squared_distance(keys, second) < _squared_distance(keys, first))


@triton.jit
def _key_at(keys, index):
    """Row `index` `[DP]` of `keys`."""
    row = tl.arange(0, keys.shape[0])
    return tl.sum(tl.where((row == index)[:, None], keys, 0.0), axis=0)


@triton.jit
def _squared_distance(keys, point):
    difference = keys - point[None, :]
    return tl.sum(difference * difference, axis=1)


@triton.jit
def _score_clusters(query, blocks):
    count, other_count = load_two_counts(blocks, 4 * blocks.D)
    score, mass, product = _score_cluster(query, blocks, 0, count)
    other_score, other_mass, other_product = _score_cluster(query, blocks, 2 * blocks.D, other_count)
    return (score, other_score), (mass, other_mass), product + other_product


@triton.jit
def _score_cluster(query, blocks, AT: tl.constexpr, count):
    """Terms of score and mass, and a share of the product. An empty cluster has the log count -inf, and so no share."""
    log_count = logarithm(count, blocks)
    bound = tl.maximum(log_count, 0.0)
    product, half = _moments(query, blocks, AT)
    logit = product * blocks.scale + blocks.offset + (log_count - blocks.LOG_UNIT)
    score = (logit + _random_energy(half, bound, 2 * tl.sqrt(bound)),)
    return score, (logit, _second_order(half, blocks)), product * (count / blocks.UNIT)


register_gpu_selector(MeanSelector, GpuSelector(_store_mean, _as_they_are, _score_mean))
register_gpu_selector(Taylor2Selector, GpuSelector(_store_moments, _with_squares, _score_taylor2))
register_gpu_selector(Cumulant2Selector, GpuSelector(_store_moments, _with_squares, _score_cumulant2))
register_gpu_selector(RemSelector, GpuSelector(_store_moments, _with_squares, _score_rem))
register_gpu_selector(QuestSelector, GpuSelector(_store_extremes, _by_sign, _score_quest))
register_gpu_selector(
    KMeans2RemSelector, GpuSelector(_store_clusters, _with_squares, _score_clusters, whole_blocks=True)
)
