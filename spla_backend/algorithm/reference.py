"""The float64 definition of SPLA: one token at a time, in plain loops (docs/design.md, 1 to 4).

Every other implementation in this project is tested against this file. It is written to be read beside the papers,
not to be fast, and it knows nothing of pages in memory, of cache dtypes or of vLLM.

Sources:
    SPLA, arXiv 2601.22379: block selection by a second-order Taylor score, exact attention over the selected blocks,
        residual linear attention over the others by subtraction from the recurrent state.
    COBS, arXiv 2607.09052: the second-cumulant score (`cumulant2`).
    Quest, arXiv 2406.10774: the per-coordinate bound (`quest`).
    RAttention, arXiv 2506.15545: the sum of two RMS-normalised branches (`double_rmsnorm`).
    gpt-oss, arXiv 2508.10925: a learned sink, a logit a head in the softmax's denominator that has no value.
    `rem` and `km2-rem` take a block's keys for Gaussian samples: the log-mean-exp of a random energy model, which
        freezes where the best of `n` samples is all that counts.

Shapes: `H` query heads, `G` kv heads, `d` head size, `L` tokens, `B` tokens a page, `b` tokens a selection block, `f`
tokens a fine block.
Query heads `g * H // G` to `(g + 1) * H // G - 1` share kv head `g`. Tensors are float64. Queries are already
multiplied by the softmax scale, so that `q . k` is a logit; scores, masses and LSEs are natural logarithms in the units
of `log sum exp(q . k)`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spla_backend.algorithm.parameters import COMBINES, RESIDUALS, SplaParameters, check_sinks
from spla_backend.algorithm.selectors import get_selector
from spla_backend.algorithm.sketch import FINE_SOURCES
from spla_backend.algorithm.tiles import check_tile

SELECTORS = ("mean", "taylor2", "cumulant2", "rem", "quest", "km2-rem")
"""Those that are defined here; any other that is registered is defined by its class, in float64."""
FEATURE_MAPS = ("softmax", "elu1")
LLOYD_ITERATIONS = 4
SKETCH_CHUNK = 32


@dataclass(frozen=True)
class TokenResult:
    """What SPLA computes for one token.

    Attributes:
        output: The attention output `[H, d]`.
        selected: Sorted ids of the selected blocks, forced ones included, for each kv head: of selection blocks, or of
            fine blocks where selection has two levels. Those of a tile, up to its end.
        exact: Softmax attention over the selected blocks, and the sink where there are sinks `[H, d]`.
        lse: Natural-log sum of `exp(q . k)` over the tokens of the selected blocks, and of `exp(sink)` `[H]`.
        tail: Direction of the residual `[H, d]`; zero where every complete block is selected or the residual is `none`.
        log_tail_mass: Log of the residual's mass in units of `exp(q . k)`, before the gain `[H]`; -inf where every
            complete block is selected, where the residual is `none` and under `double_rmsnorm`, which uses no mass.
        group_scores: The log-domain score by which a group ranks the complete selection blocks `[G,
            num_complete_blocks]`.
        fine_scores: With two levels, that by which it ranks fine blocks, by id, for each kv head: of the candidates'
            complete pages; empty with one level, or where everything fits into the budget.
    """

    output: Tensor
    selected: list[list[int]]
    exact: Tensor
    lse: Tensor
    tail: Tensor
    log_tail_mass: Tensor
    group_scores: Tensor
    fine_scores: list[dict[int, Tensor]]


# Statistics of a block (docs/design.md, 5)


def statistics_width(selector: str, head_size: int) -> int:
    """Numbers stored for a block and kv head.

    Raises:
        ValueError: Unknown selector.
    """
    widths = {
        "mean": head_size,
        "taylor2": 2 * head_size,
        "cumulant2": 2 * head_size,
        "rem": 2 * head_size,
        "quest": 2 * head_size,
        "km2-rem": 4 * head_size + 2,
    }
    return widths[selector] if selector in widths else get_selector(selector).width(head_size)


def block_statistics(selector: str, keys: Tensor) -> Tensor:
    """Statistics of the keys of one selection block and kv head, as the page stores them.

    Args:
        selector: Name of a selector.
        keys: `[b, d]` float64.

    Returns:
        `[width]` float64. Variances are population variances.

    Raises:
        ValueError: Unknown selector.
    """
    if selector == "mean":
        return keys.mean(dim=0)
    if selector in ("taylor2", "cumulant2", "rem"):
        return torch.cat([keys.mean(dim=0), population_variance(keys)])
    if selector == "quest":
        return torch.cat([keys.amin(dim=0), keys.amax(dim=0)])
    if selector == "km2-rem":
        assignment = two_means(keys)  # [b]
        parts, counts = [], []
        for cluster in (0, 1):
            members = keys[assignment == cluster]  # [count, d]
            if len(members) == 0:
                parts += [torch.zeros_like(keys[0]), torch.zeros_like(keys[0])]
            else:
                parts += [members.mean(dim=0), population_variance(members)]
            counts.append(float(len(members)))
        return torch.cat([*parts, torch.tensor(counts, dtype=keys.dtype)])
    return get_selector(selector).statistics(keys)


def population_variance(keys: Tensor) -> Tensor:
    """Per-coordinate `E[(k - mean)^2]` of `[n, d]`, as `[d]`."""
    return ((keys - keys.mean(dim=0)) ** 2).mean(dim=0)


def two_means(keys: Tensor) -> Tensor:
    """Deterministic 2-means: for each key `[b, d]` its cluster, 0 or 1, `[b]` int64.

    Farthest-point seeds and a fixed number of Lloyd iterations, every tie to the lower index, so that the clusters of a
    page depend on its keys only and are the same whenever and wherever they are computed.
    """
    seed0 = first_argmax(squared_distances(keys, keys.mean(dim=0)))
    seed1 = first_argmax(squared_distances(keys, keys[seed0]))
    centroids = [keys[seed0], keys[seed1]]
    for _ in range(LLOYD_ITERATIONS):
        assignment = nearest(keys, centroids)
        for cluster in (0, 1):
            members = keys[assignment == cluster]
            if len(members) > 0:  # an empty cluster keeps its centroid
                centroids[cluster] = members.mean(dim=0)
    return nearest(keys, centroids)


def squared_distances(keys: Tensor, point: Tensor) -> Tensor:
    """Squared Euclidean distances of keys `[b, d]` from a point `[d]`, as `[b]`."""
    return ((keys - point) ** 2).sum(dim=-1)


def first_argmax(values: Tensor) -> int:
    """Index of the largest of `[n]` values, the first of them at a tie (which `torch.argmax` does not promise)."""
    return int((values == values.max()).nonzero()[0])


def nearest(keys: Tensor, centroids: Sequence[Tensor]) -> Tensor:
    """Which of two centroids each key is nearest to, 0 at a tie, `[b]` int64."""
    return (squared_distances(keys, centroids[1]) < squared_distances(keys, centroids[0])).long()


def sketched_keys(keys: Tensor, mean: Tensor) -> Tensor:
    """What a sketch in 4 bits an element says the keys of a selection block are.

    A key counts from the mean of the block, as the page stores it, and is cut into chunks of 32 channels. A chunk keeps
    a scale, by which the element farthest from 0 (of two, the positive one) is to be -8, and of each element the
    nearest of the multiples -8 to 7 of the scale, at a tie the even one. Scales are float16, the largest of which
    stands for any beyond; what they are made of is float32, so that all who make a sketch of stored keys make the same.

    Args:
        keys: `[b, d]` float64.
        mean: `[d]` float64.

    Returns:
        `[b, d]` float64.
    """
    largest = torch.finfo(torch.float16).max
    chunks = []
    for chunk in (keys - mean).float().split(SKETCH_CHUNK, dim=1):  # [b, 32], the last one of what is left
        highest, lowest = chunk.amax(dim=1, keepdim=True), chunk.amin(dim=1, keepdim=True)
        farthest = torch.where(highest >= -lowest, highest, lowest)
        scale = (farthest / -8).clamp(-largest, largest).half().float()  # [b, 1]
        multiples = torch.where(scale == 0, 0.0, chunk / scale).round().clamp(-8, 7)
        chunks.append(multiples.double() * scale.double())
    return torch.cat(chunks, dim=1) + mean


# Scores: estimates of `log sum exp(q . k)` over a block


def selection_score(selector: str, q: Tensor, statistics: Tensor, block_size: int) -> float:
    """Score by which a head ranks a block.

    Args:
        selector: Name of a selector.
        q: `[d]` float64, scaled.
        statistics: `[width]` float64, of one block.
        block_size: Tokens a block (`b`).

    Raises:
        ValueError: Unknown selector.
    """
    d = len(q)
    if selector not in SELECTORS:
        return float(get_selector(selector).score(q[None], statistics[None], block_size))
    if selector == "mean":
        return math.log(block_size) + float(q @ statistics)
    if selector == "quest":  # Quest, algorithm 1: the largest logit that any key within the bounds could have
        return float(torch.maximum(q * statistics[:d], q * statistics[d:]).sum())
    if selector == "km2-rem":
        return logsumexp(
            [
                math.log(count) + float(q @ mean) + rem_term(float(q**2 @ variance), math.log(count))
                for count, mean, variance in clusters(statistics, d)
                if count > 0
            ]
        )
    first_order = math.log(block_size) + float(q @ statistics[:d])
    s2 = float(q**2 @ statistics[d:])  # variance of q . k, the covariance taken for diagonal
    if selector == "taylor2":  # SPLA: E[exp(x)] to second order about the mean
        return first_order + math.log1p(s2 / 2)
    if selector == "cumulant2":  # COBS: log E[exp(x)] to second order
        return first_order + s2 / 2
    return first_order + rem_term(s2, math.log(block_size))


def mass_score(selector: str, q: Tensor, statistics: Tensor, block_size: int) -> float:
    """Score from which the residual takes the mass of an unselected block: the conservative second-order Taylor one.

    `rem` and `cumulant2` overestimate the mass of the blocks that were not selected, which costs more than it gains.

    Args: as `selection_score`.

    Raises:
        ValueError: The selector stores no mean (`quest`), or is unknown.
    """
    d = len(q)
    if selector == "quest":
        raise ValueError("selector 'quest' stores no mean key: it has no tail mass, use residual 'none' or another one")
    if selector == "mean":
        return selection_score("mean", q, statistics, block_size)
    if selector == "km2-rem":
        return logsumexp(
            [
                math.log(count) + float(q @ mean) + math.log1p(float(q**2 @ variance) / 2)
                for count, mean, variance in clusters(statistics, d)
                if count > 0
            ]
        )
    if selector in ("taylor2", "cumulant2", "rem"):
        return selection_score("taylor2", q, statistics, block_size)
    return float(get_selector(selector).mass(q[None], statistics[None], block_size))


def rem_term(s2: float, log_count: float) -> float:
    """Log-mean-exp of `exp(log_count)` Gaussian samples of variance `s2` about their mean.

    Below the freezing point it is the second cumulant; above, the largest sample alone. Both are `log_count` at
    `s2 = 2 log_count`, with the same slope. A single sample has no spread.
    """
    if s2 < 2 * log_count:
        return s2 / 2
    return math.sqrt(2 * s2 * log_count) - log_count


def clusters(statistics: Tensor, head_size: int) -> list[tuple[float, Tensor, Tensor]]:
    """(count, mean, variance) of the two clusters that `km2-rem` stores `[4 * d + 2]`."""
    mean0, variance0, mean1, variance1 = statistics[: 4 * head_size].reshape(4, head_size)
    return [(float(statistics[-2]), mean0, variance0), (float(statistics[-1]), mean1, variance1)]


def logsumexp(values: Sequence[float]) -> float:
    """`log sum exp`, -inf for no values."""
    if len(values) == 0 or max(values) == -math.inf:
        return -math.inf
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


# Selection (docs/design.md, 1)


def share_in_group(scores: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Log of the sum over a group's heads of each head's softmax over the complete blocks, and its sink where it has
    one.

    In the log domain, because probabilities of far blocks underflow to equal zeros, and their order would be lost.

    What the group loses with a block is the sum of what its heads would give to it of their attention. So a sink
    belongs into the normaliser: a head that gives nearly all to its sink has little to lose, whatever it ranks first.
    Scores that rank blocks and are no masses (`quest`) have no unit in which a sink could be added.

    Args:
        scores: `[group, num_complete_blocks]` float64, one row for each query head of the group.
        sinks: `[group]` float64, logits of the heads' sinks.

    Returns:
        `[num_complete_blocks]` float64.
    """
    normalisers = torch.logsumexp(scores, dim=1, keepdim=True)
    if sinks is not None:
        normalisers = torch.logaddexp(normalisers, sinks[:, None])
    return torch.logsumexp(scores - normalisers, dim=0)


def share_in_tile(shared: Sequence[Tensor]) -> Tensor:
    """Log of the mean exponential over the tokens of a tile of their scores, `[num_blocks]` each: a tile's score."""
    return torch.logsumexp(torch.stack(list(shared)), dim=0) - math.log(len(shared))


def tile_of(position: int, params: SplaParameters) -> range:
    """Positions of the tile that a token is in: itself alone where `tile` is 1."""
    first = position // params.tile * params.tile
    return range(first, first + params.tile)


def voters_of(position: int, computed: range, params: SplaParameters) -> list[int]:
    """Positions whose scores choose for the tile of a token: of those that are computed together, before it or behind
    it, every `tile_step`-th of the sequence, or the last of the tile where none is."""
    tile = [p for p in tile_of(position, params) if p in computed]
    return [p for p in tile if (p + 1) % params.tile_step == 0] or tile[-1:]


def candidate_voters_of(position: int, computed: range, params: SplaParameters) -> list[int]:
    """Positions whose scores choose the candidates of a token, in two levels: those that choose for the tiles of all
    tokens that share its candidates and are computed together."""
    first = position // params.coarse_tile * params.coarse_tile
    there = [p for p in range(first, first + params.coarse_tile) if p in computed]
    return sorted({voter for p in there for voter in voters_of(p, computed, params)})


def forced_blocks(position: int, params: SplaParameters) -> list[int]:
    """Sorted ids of the blocks that the tile of the token at `position` always selects: sink, trailing blocks of its
    first token and what follows, current page. What begins behind a token it does not see."""
    tile = tile_of(position, params)
    first, last = tile[0] // params.selection_block, tile[-1] // params.selection_block
    page_start = position // params.page_size * params.blocks_per_page
    return [
        block
        for block in range(last + 1)
        if block < params.first_blocks or block > first - params.last_blocks or block >= page_start
    ]


def select_blocks(group_scores: Tensor, position: int, params: SplaParameters) -> list[int]:
    """Blocks that a group attends to exactly, for one token, or for the tile that it is in.

    Top-p shortens a selection that the budget has cut; where everything fits into the budget, all of it is selected.

    Args:
        group_scores: `[num_complete_blocks]` float64, from `share_in_group` and `share_in_tile`.
        position: Position of the token in its sequence.
        params: Parameters.

    Returns:
        Sorted block ids, forced ones included.
    """
    num_blocks = tile_of(position, params)[-1] // params.selection_block + 1
    if params.budget_blocks >= num_blocks:
        return list(range(num_blocks))

    scores = dict(enumerate(group_scores))
    return choose(scores, forced_blocks(position, params), params.budget_blocks, params.top_p)


def choose(scores: Mapping[int, Tensor], forced: list[int], budget: int, top_p: float | None) -> list[int]:
    """Forced blocks and the best of those that have scores.

    Args:
        scores: Log mass by block id; of forced blocks, too, as far as they have one.
        forced: Block ids.
        budget: Blocks, forced ones included.
        top_p: Share of the mass of `scores` at which choosing stops; None or 1 takes all of the budget.

    Returns:
        Sorted block ids.
    """
    free = [block for block in scores if block not in forced]
    free.sort(key=lambda block: (-float(scores[block]), block))
    chosen = free[: budget - len(forced)]

    if top_p is not None and top_p < 1:  # all of the mass takes all of the budget, whatever the rounding
        mass = {block: math.exp(float(score)) for block, score in scores.items()}
        wanted = top_p * sum(mass.values())
        covered = sum(mass[block] for block in forced if block in mass)
        kept = []
        for block in chosen:
            if covered >= wanted:
                break
            kept.append(block)
            covered += mass[block]
        chosen = kept
    return sorted(forced + chosen)


def select_fine_blocks(
    q: Tensor,
    k: Tensor,
    statistics: Tensor,
    group_scores: Tensor,
    params: SplaParameters,
    sinks: Tensor | None = None,
) -> tuple[list[int], dict[int, Tensor]]:
    """Fine blocks that a group attends to exactly, for the last token of a sequence or its tile, in two levels.

    The candidates are the selection blocks that one level with a budget of `candidate_blocks` and tiles of
    `coarse_tile` tokens selects. Among their fine blocks those of the selection blocks that one level forces for the
    tile are forced, the others ranked by their mass, which the heads share as in `share_in_group`, over the fine blocks
    of the candidates in complete pages. The mass is that of the keys themselves, or of what a sketch says they are, of
    keys and queries rounded to `fine_dtype`.

    Args:
        q: Queries of the group's heads, of each token that selects `[tokens, group, d]` float64.
        k: Keys of the sequence `[L, d]` float64.
        statistics: Of selection blocks `[num_complete_blocks, width]` float64; the mean in front is what sketches need.
        group_scores: `[num_complete_blocks]` float64, of selection blocks, from `share_in_group` and `share_in_tile`.
        params: Parameters, with a `fine_block`.
        sinks: `[group]` float64, as in `share_in_group`.

    Returns:
        Sorted ids of fine blocks, forced ones included, and the scores of those that were ranked, by id.
    """
    f, position = params.fine_block, len(k) - 1
    per_block = params.selection_block // f
    num_fine, budget = tile_of(position, params)[-1] // f + 1, params.budget_blocks * per_block
    if params.whole_blocks * per_block >= num_fine:
        return list(range(num_fine)), {}

    coarse = replace(params, budget_blocks=params.candidate_blocks, top_p=None, tile=params.coarse_tile)
    candidates: list[int] = []  # fine blocks
    keys: list[Tensor] = []  # of each as they are read [f, d]
    for block in select_blocks(group_scores, position, coarse):
        if block < len(group_scores):
            of_block = k[block * params.selection_block : (block + 1) * params.selection_block]
            if params.fine_source == "int4":
                of_block = sketched_keys(of_block, statistics[block, : k.shape[1]])
            candidates += range(block * per_block, (block + 1) * per_block)
            keys += rounded_keys(of_block, params.fine_dtype).split(f)
    by_token = []
    for q_t in rounded_queries(q, params.fine_dtype):
        masses = [[logsumexp((of_fine @ q_h).tolist()) for of_fine in keys] for q_h in q_t]
        by_token.append(share_in_group(torch.tensor(masses, dtype=q.dtype).reshape(len(q_t), len(candidates)), sinks))
    shared = share_in_tile(by_token)
    forced = [
        fine
        for block in forced_blocks(position, params)
        for fine in range(block * per_block, (block + 1) * per_block)
        if fine < num_fine  # the current block may not be full
    ]
    scores = dict(zip(candidates, shared, strict=True))
    return choose(scores, forced, budget, params.top_p), scores


def rounded_keys(keys: Tensor, dtype: str) -> Tensor:
    """Keys `[b, d]` as the fine level multiplies them: as they are, in bf16, or in e4m3 with what is beyond 448 there.

    Raises:
        ValueError: Unknown dtype.
    """
    if dtype == "auto":
        return keys
    if dtype == "bf16":
        return keys.float().bfloat16().double()
    if dtype == "fp8":
        return keys.float().clamp(-448, 448).to(torch.float8_e4m3fn).double()
    raise ValueError(f"unknown fine_dtype {dtype!r}, expected one of auto, bf16, fp8")


def rounded_queries(q: Tensor, dtype: str) -> Tensor:
    """Queries `[..., d]` as the fine level multiplies them: in fp8 times the largest power of two that leaves each
    within 448, which is taken off again."""
    if dtype != "fp8":
        return rounded_keys(q, dtype)
    largest = q.float().abs().amax(dim=-1, keepdim=True).double()
    factor = torch.where(largest > 0, 2.0 ** torch.floor(torch.log2(448 / largest)), 1.0)
    return rounded_keys(q * factor, "fp8") / factor


def tokens_of(blocks: Sequence[int], length: int, block_size: int) -> list[int]:
    """Positions below `length` of the tokens of some blocks."""
    return [t for block in blocks for t in range(block * block_size, min((block + 1) * block_size, length))]


# Exact part (docs/design.md, 2)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None) -> tuple[Tensor, float]:
    """Softmax attention of one head: q `[d]`, k and v `[n, d]`, n > 0. Returns the output `[d]` and the LSE.

    A `sink` `[]` is one more logit, of a token without a value: it counts in the LSE and adds nothing to the output.
    """
    logits = k @ q  # [n]
    lse = torch.logsumexp(logits, dim=0)
    if sink is not None:
        lse = torch.logaddexp(lse, sink)
    return torch.exp(logits - lse) @ v, float(lse)


# Residual (docs/design.md, 3)


def apply_feature_map(name: str, x: Tensor) -> Tensor:
    """`phi`, over the last dimension, which it keeps.

    Raises:
        ValueError: Unknown feature map.
    """
    if name == "softmax":  # RAttention, SPLA
        return torch.softmax(x, dim=-1)
    if name == "elu1":
        return torch.nn.functional.elu(x) + 1
    raise ValueError(f"unknown feature map {name!r}, expected one of {', '.join(FEATURE_MAPS)}")


def recurrent_state(features: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """State of linear attention over tokens with features `[n, F]` and values `[n, d]`: `S` `[F, d]` and `z` `[F]`.

    Nothing decays, so that taking the selected tokens away again is exact.
    """
    return features.T @ v, features.sum(dim=0)


def key_features(k: Tensor, params: SplaParameters) -> Tensor:
    """Features `[n, F]` of keys `[n, d]`: `[k, 1]` for `regression`, `phi(k)` for `linear`."""
    if params.residual == "regression":
        return torch.cat([k, torch.ones(len(k), 1, dtype=k.dtype)], dim=1)
    return apply_feature_map(params.feature_map, k)


def residual_direction(q: Tensor, s_rest: Tensor, z_rest: Tensor, params: SplaParameters) -> Tensor:
    """Direction of the residual of one head.

    Args:
        q: `[d]` float64, scaled.
        s_rest: `S` of the rest, `[F, d]`; `F = d + 1` for `regression`.
        z_rest: `z` of the rest, `[F]`.
        params: Parameters.

    Returns:
        `[d]` float64.
    """
    if params.residual == "regression":
        sum_kv, sum_v = s_rest[:-1], s_rest[-1]  # [d, d], [d]
        sum_k, count = z_rest[:-1], z_rest[-1]  # [d], []
        covariance = sum_kv / count - torch.outer(sum_k / count, sum_v / count)  # [key, value]
        return sum_v / count + params.residual_scale * (q @ covariance)
    features = apply_feature_map(params.feature_map, q)  # [F]
    if params.combine == "double_rmsnorm":  # the norm that follows makes a normaliser superfluous
        return features @ s_rest
    return (features @ s_rest) / (features @ z_rest)


# Combination (docs/design.md, 4)


def combine_shared_normalizer(exact: Tensor, lse: float, tail: Tensor, log_mass: float, gain: float) -> Tensor:
    """Both branches `[d]` under one softmax normaliser: `(e^lse exact + gain e^log_mass tail) / (e^lse + gain e^...)`.

    A sink is in `exact` and `lse` already (`exact_attention`), and so in the denominator once.

    Args:
        exact: `[d]` float64.
        lse: LSE of the exact part.
        tail: `[d]` float64.
        log_mass: Log mass of the tail, -inf for none.
        gain: Factor on the mass of the tail, not negative.
    """
    top = max(lse, log_mass)  # taken out of both, so that neither overflows
    exact_weight = math.exp(lse - top)
    tail_weight = gain * math.exp(log_mass - top)
    return (exact_weight * exact + tail_weight * tail) / (exact_weight + tail_weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` of `[d]`; zero stays zero."""
    return x / torch.sqrt((x**2).mean() + eps) * weight


# The whole


def spla_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: SplaParameters,
    *,
    tile_queries: Tensor | None = None,
    candidate_queries: Tensor | None = None,
    statistics: Tensor | None = None,
    gain: Tensor | None = None,
    norm_weights: tuple[Tensor, Tensor] | None = None,
    sinks: Tensor | None = None,
) -> TokenResult:
    """SPLA for the last token of a sequence (arXiv 2601.22379).

    Args:
        q: Query of the token, scaled, `[H, d]` float64.
        k: Keys of the sequence, the token's own among them, `[L, G, d]` float64. The token is at position `L - 1`.
        v: Values, as `k`.
        params: Parameters.
        tile_queries: Queries by which the token's tile selects `[tokens, H, d]` float64, from `voters_of`. None for its
            own alone.
        candidate_queries: Queries by which the candidates are chosen `[tokens, H, d]` float64, from
            `candidate_voters_of`. None for `tile_queries`.
        statistics: Statistics of the blocks of complete pages `[num_complete_blocks, G, width]` float64, to be used
            instead of those computed from `k`: a cache may hold them in a narrower dtype.
        gain: Factor on the mass of the tail, not negative, `[H]`; 1 if None. Used by `shared_normalizer`.
        norm_weights: RMSNorm weights of the exact part and of the residual, `[H, d]` each; 1 if None. Used by
            `double_rmsnorm`.
        sinks: Learned logits that have no value `[H]` float64, one a head: the denominator is the sum over the attended
            tokens, the tail's mass and `exp(sink)`. For `shared_normalizer`: an RMSNorm of the exact part would undo
            them.

    Raises:
        ValueError: Shapes, dtypes or parameters that do not fit together, or a tail mass asked of `quest`.
    """
    tile_queries = q[None] if tile_queries is None else tile_queries
    candidate_queries = tile_queries if candidate_queries is None else candidate_queries
    _check(q, tile_queries, candidate_queries, k, v, params, statistics, gain, norm_weights, sinks)
    num_heads = len(q)
    length, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    position = length - 1
    b, size = params.selection_block, params.attended_block
    num_complete = position // params.page_size * params.blocks_per_page
    if statistics is None:
        statistics = complete_statistics(k, params)

    output = torch.zeros_like(q)
    exact = torch.zeros_like(q)
    lse = torch.zeros(num_heads, dtype=q.dtype)
    tail = torch.zeros_like(q)
    log_tail_mass = torch.full((num_heads,), -math.inf, dtype=q.dtype)
    group_scores = torch.zeros(num_kv_heads, num_complete, dtype=q.dtype)
    selected: list[list[int]] = []
    fine_scores: list[dict[int, Tensor]] = [{} for _ in range(num_kv_heads)]

    for g in range(num_kv_heads):
        heads = range(g * group, (g + 1) * group)
        of_group = tile_queries[:, heads.start : heads.stop]  # [tokens, group, d]
        of_candidates = candidate_queries[:, heads.start : heads.stop]  # [other tokens, group, d]
        sinks_of_group = None if sinks is None else sinks[heads.start : heads.stop]
        of_scores = sinks_of_group if get_selector(params.selector).has_mass else None
        shared = []
        for q_t in of_candidates:
            scores = torch.tensor(
                [[selection_score(params.selector, x, statistics[i, g], b) for i in range(num_complete)] for x in q_t],
                dtype=q.dtype,
            ).reshape(group, num_complete)
            shared.append(share_in_group(scores, of_scores))
        group_scores[g] = share_in_tile(shared)
        if params.fine_block:
            blocks, fine_scores[g] = select_fine_blocks(
                of_group, k[:, g], statistics[:, g], group_scores[g], params, sinks_of_group
            )
        else:
            blocks = select_blocks(group_scores[g], position, params)
        selected.append(blocks)

        tokens = tokens_of(blocks, length, size)
        for h in heads:
            sink = None if sinks is None else sinks[h]
            exact[h], lse[h] = exact_attention(q[h], k[tokens, g], v[tokens, g], sink)

        # The rest: tokens of complete pages that were not selected. The current page is always selected, so what is to
        # be subtracted from the state over the complete pages are the selected tokens among these.
        complete = num_complete * b
        taken = [t for t in tokens if t < complete]
        num_rest = [b] * num_complete  # by selection block
        for t in taken:
            num_rest[t // b] -= 1
        if sum(num_rest) > 0 and params.residual != "none":  # the count decides, never a difference of large sums
            s_all, z_all = recurrent_state(key_features(k[:complete, g], params), v[:complete, g])
            s_selected, z_selected = recurrent_state(key_features(k[taken, g], params), v[taken, g])
            for h in heads:
                tail[h] = residual_direction(q[h], s_all - s_selected, z_all - z_selected, params)
                if params.combine == "shared_normalizer":  # of a block selected in part the mass is spread evenly
                    log_tail_mass[h] = logsumexp(
                        [
                            mass_score(params.selector, q[h], statistics[i, g], b) + math.log(n / b)
                            for i, n in enumerate(num_rest)
                            if n > 0
                        ]
                    )

    for h in range(num_heads):
        if params.combine == "shared_normalizer":
            weight = 1.0 if gain is None else float(gain[h])
            output[h] = combine_shared_normalizer(exact[h], float(lse[h]), tail[h], float(log_tail_mass[h]), weight)
        else:
            exact_weight, tail_weight = norm_weights if norm_weights is not None else (torch.ones_like(q),) * 2
            output[h] = rms_norm(exact[h], exact_weight[h], params.rms_norm_eps)
            output[h] += rms_norm(tail[h], tail_weight[h], params.rms_norm_eps)
    return TokenResult(output, selected, exact, lse, tail, log_tail_mass, group_scores, fine_scores)


def spla_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: SplaParameters,
    *,
    start: int = 0,
    statistics: Tensor | None = None,
    gain: Tensor | None = None,
    norm_weights: tuple[Tensor, Tensor] | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """SPLA for every token of a sequence from position `start` on, computed together: those before it are other chunks.

    Args:
        q: Queries, scaled, `[L, H, d]` float64.
        k: Keys `[L, G, d]` float64.
        v: Values, as `k`.
        params: Parameters.
        start: First position to compute.
        statistics: As in `spla_token`, for the last token: of all blocks of pages below position `L - 1`.
        gain: As in `spla_token`.
        norm_weights: As in `spla_token`.
        sinks: As in `spla_token`.

    Returns:
        `[L, H, d]` float64; rows below `start` are NaN.

    Raises:
        ValueError: As `spla_token`.
    """
    if statistics is None:
        statistics = complete_statistics(k, params)
    output = torch.full_like(q, math.nan)
    for position in range(start, len(q)):
        num_complete = position // params.page_size * params.blocks_per_page
        output[position] = spla_token(
            q[position],
            k[: position + 1],
            v[: position + 1],
            params,
            tile_queries=q[voters_of(position, range(start, len(q)), params)],
            candidate_queries=q[candidate_voters_of(position, range(start, len(q)), params)],
            statistics=statistics[:num_complete],
            gain=gain,
            norm_weights=norm_weights,
            sinks=sinks,
        ).output
    return output


def complete_statistics(k: Tensor, params: SplaParameters) -> Tensor:
    """Statistics of the blocks of the pages below the last token's, `[num_complete_blocks, G, width]`, of `[L, G, d]`.

    Raises:
        ValueError: Unknown selector.
    """
    length, num_kv_heads, d = k.shape
    b = params.selection_block
    num_complete = (length - 1) // params.page_size * params.blocks_per_page
    statistics = torch.zeros(num_complete, num_kv_heads, statistics_width(params.selector, d), dtype=k.dtype)
    for i in range(num_complete):
        for g in range(num_kv_heads):
            statistics[i, g] = block_statistics(params.selector, k[i * b : (i + 1) * b, g])
    return statistics


def _check(
    q: Tensor,
    tile_queries: Tensor,
    candidate_queries: Tensor,
    k: Tensor,
    v: Tensor,
    params: SplaParameters,
    statistics: Tensor | None,
    gain: Tensor | None,
    norm_weights: tuple[Tensor, Tensor] | None,
    sinks: Tensor | None,
) -> None:
    """One place for every case that `spla_token` refuses."""
    if q.dim() != 2 or k.dim() != 3 or k.shape != v.shape or k.shape[2] != q.shape[1] or len(k) == 0:
        raise ValueError(f"q [H, d], k and v [L, G, d] expected, got {[list(x.shape) for x in (q, k, v)]}")
    if q.shape[0] % k.shape[1] != 0:
        raise ValueError(f"{q.shape[0]} query heads are no multiple of {k.shape[1]} kv heads")
    if any(x.dtype != torch.float64 for x in (q, k, v)):
        raise ValueError("the reference computes in float64, convert q, k and v first")
    if params.page_size % params.selection_block != 0:
        raise ValueError(f"selection_block {params.selection_block} does not divide page_size {params.page_size}")
    if params.fine_block and params.selection_block % params.fine_block != 0:
        raise ValueError(f"fine_block {params.fine_block} must divide selection_block {params.selection_block}")
    check_tile(params)
    if not 0 < len(tile_queries) <= params.tile or tile_queries.shape[1:] != q.shape:
        raise ValueError(f"tile_queries [1 to {params.tile}, H, d] expected, got {list(tile_queries.shape)}")
    if not 0 < len(candidate_queries) <= params.coarse_tile or candidate_queries.shape[1:] != q.shape:
        raise ValueError(
            f"candidate_queries [1 to {params.coarse_tile}, H, d] expected, got {list(candidate_queries.shape)}"
        )
    if params.fine_source not in FINE_SOURCES:
        raise ValueError(f"unknown fine_source {params.fine_source!r}, expected one of {', '.join(FINE_SOURCES)}")
    if params.has_sketch and not get_selector(params.selector).mean_first:
        raise ValueError(f"selector {params.selector!r} has no mean for a sketch: use fine_source 'keys'")
    if params.budget_blocks < params.max_forced_blocks:
        raise ValueError(f"budget_blocks {params.budget_blocks} is below {params.max_forced_blocks} forced blocks")
    if params.residual not in RESIDUALS:
        raise ValueError(f"unknown residual {params.residual!r}, expected one of {', '.join(RESIDUALS)}")
    if params.combine not in COMBINES:
        raise ValueError(f"unknown combine {params.combine!r}, expected one of {', '.join(COMBINES)}")
    if params.feature_map not in FEATURE_MAPS:
        raise ValueError(f"unknown feature map {params.feature_map!r}, expected one of {', '.join(FEATURE_MAPS)}")
    has_mass = get_selector(params.selector).has_mass
    if not has_mass and params.residual != "none" and params.combine == "shared_normalizer":
        raise ValueError(f"selector {params.selector!r} gives no tail mass: use residual 'none'")
    num_complete = (len(k) - 1) // params.page_size * params.blocks_per_page
    expected = (num_complete, k.shape[1], statistics_width(params.selector, q.shape[1]))
    if statistics is not None and tuple(statistics.shape) != expected:
        raise ValueError(f"statistics {list(expected)} expected, got {list(statistics.shape)}")
    if gain is not None and (tuple(gain.shape) != (q.shape[0],) or bool((gain < 0).any())):
        raise ValueError(f"gain [{q.shape[0]}] without negative elements expected")
    if norm_weights is not None and any(weight.shape != q.shape for weight in norm_weights):
        raise ValueError(f"norm_weights of shape {list(q.shape)} expected")
    if sinks is not None and (tuple(sinks.shape) != (q.shape[0],) or sinks.dtype != torch.float64):
        raise ValueError(f"sinks [{q.shape[0]}] in float64 expected, got {list(sinks.shape)} in {sinks.dtype}")
    if sinks is not None:
        check_sinks(params.combine)
