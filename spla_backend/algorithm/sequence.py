"""SPLA over whole sequences, differentiable: the same definition as `spla_backend.algorithm.reference`, by masks.

Every token selects its own blocks, as in decode. The selection is a choice and has no gradient; statistics of blocks
get one only through the tail's mass. Nothing is faster than dense attention here: weights of all pairs of tokens are
made, chunk of queries by chunk, and made again in the backward pass, so that memory does not grow with the square of
the length.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .combine import double_rmsnorm, shared_normalizer
from .parameters import SplaParameters
from .residual import Residual, make_residual
from .selection import forced_blocks, group_scores, select_blocks
from .selectors import get_selector

CHUNK_ELEMENTS = 1 << 26
"""Weights of pairs of tokens that are held at a time; there are a few tensors of this size, 256 MiB each in float32."""


def spla_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: SplaParameters,
    *,
    log_gain: Tensor | None = None,
    norm_weights: tuple[Tensor, Tensor] | None = None,
    feature_weight: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """SPLA of the last `L` tokens of sequences of `T` tokens, usually of all of them.

    Args:
        q: Queries, multiplied by the softmax scale, `[batch, H, L, d]`, float32 or float64 as what follows.
        k: Keys `[batch, G, T, d]`, T >= L.
        v: Values, as `k`.
        params: What to compute.
        log_gain: Log of the factor on the mass of the tail `[H]`, used by `shared_normalizer`; None for 0.
        norm_weights: RMSNorm weights of the exact part and of the tail `[H, d]` each, used by `double_rmsnorm`; None
            for 1.
        feature_weight: What queries and keys are multiplied with before the feature map of `linear`, `[G, d, d]`; None
            for neither.
        chunk: Queries at a time; None takes as many as `CHUNK_ELEMENTS` allows.

    Returns:
        `[batch, H, L, d]`.

    Raises:
        ValueError: Shapes that do not fit together.
    """
    batch, num_heads, length, d = q.shape
    num_kv_heads, total = k.shape[1:3]
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != d or num_heads % num_kv_heads or total < length:
        raise ValueError(
            f"q [batch, H, L, d], k and v [batch, G, T, d] with H a multiple of G and T >= L expected, got "
            f"{[list(x.shape) for x in (q, k, v)]}"
        )
    group = num_heads // num_kv_heads
    rows = batch * num_kv_heads
    queries = q.reshape(rows, group, length, d)
    keys, values = k.reshape(rows, total, d), v.reshape(rows, total, d)
    whole = total // params.selection_block * params.selection_block
    statistics = get_selector(params.selector).statistics(keys[:, :whole].unflatten(1, (-1, params.selection_block)))
    residual = make_residual(params, d, feature_weight)

    def per_row(weight: Tensor) -> Tensor:
        """`[H, ...]` of a head as `[rows, group, 1, ...]`."""
        by_group = weight.unflatten(0, (num_kv_heads, 1, group, 1))
        return by_group.expand(batch, num_kv_heads, *by_group.shape[1:]).flatten(0, 1).squeeze(1)

    weights: list[Tensor] = []
    if residual is not None and params.combine == "shared_normalizer" and log_gain is not None:
        weights = [per_row(log_gain.reshape(-1))]  # [rows, group, 1]
    elif params.combine == "double_rmsnorm":
        ones = torch.ones(num_heads, d, dtype=q.dtype, device=q.device)
        weights = [per_row(weight.reshape(num_heads, d)) for weight in norm_weights or (ones, ones)]

    if chunk is None:
        chunk = max(params.selection_block, CHUNK_ELEMENTS // (batch * num_heads * total))
    outputs = []
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        first, seen = total - length + start, total - length + end  # positions; what the last of the chunk sees
        positions = torch.arange(first, seen, device=q.device)
        blocks = statistics[:, : seen // params.selection_block]  # [rows, num_blocks, width]
        part, keys_seen, values_seen = queries[:, :, start:end], keys[:, :seen], values[:, :seen]
        with torch.no_grad():
            rest = unselected_blocks(part, blocks, positions, params)
        attend = partial(_attend, rest=rest, positions=positions, params=params, residual=residual)
        # Also for a single chunk: there are many layers.
        outputs.append(
            checkpoint(attend, part, keys_seen, values_seen, blocks, *weights, use_reentrant=False)
            if torch.is_grad_enabled()
            else attend(part, keys_seen, values_seen, blocks, *weights)
        )
    return torch.cat(outputs, 2).reshape(batch, num_heads, length, d)


def unselected_blocks(q: Tensor, statistics: Tensor, positions: Tensor, params: SplaParameters) -> Tensor:
    """The blocks of complete pages that each query does not select.

    Args:
        q: `[rows, group, queries, d]`, a row for each sequence and kv head.
        statistics: `[rows, num_blocks, width]` of the full blocks below the last position's.
        positions: `[queries]` int64, ascending.
        params: What to select.

    Returns:
        `[rows, queries, num_blocks]` bool.
    """
    group = q.shape[1]
    num_complete = positions // params.page_size * params.blocks_per_page  # [queries]
    complete = torch.arange(statistics.shape[1], device=q.device) < num_complete[:, None]  # [queries, num_blocks]
    scores = get_selector(params.selector).score(q.flatten(1, 2), statistics, params.selection_block)
    scores = scores.unflatten(1, (group, -1)).permute(2, 0, 1, 3)[:, :, None]  # [queries, rows, 1, group, num_blocks]
    forced, num_free, _ = forced_blocks(positions[:, None], complete, params)  # [queries, 1, num_blocks]
    chosen = select_blocks(group_scores(scores, complete), forced, num_free, group, params.top_p)
    return (complete[:, None] & ~chosen[:, :, 0]).transpose(0, 1)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: Tensor,
    *weights: Tensor,
    rest: Tensor,
    positions: Tensor,
    params: SplaParameters,
    residual: Residual | None,
) -> Tensor:
    """One chunk of queries.

    Args:
        q: `[rows, group, queries, d]`.
        k: `[rows, tokens, d]`, up to the last position.
        v: As `k`.
        statistics: `[rows, num_blocks, width]`.
        weights: Learned parameters of the combination, `[rows, group, 1]` or two of `[rows, group, 1, d]`.
        rest: From `unselected_blocks`, `[rows, queries, num_blocks]`.
        positions: `[queries]`.
        params: What to compute.
        residual: What stands for the rest.

    Returns:
        `[rows, group, queries, d]`.
    """
    group, tokens = q.shape[1], k.shape[1]
    rest_tokens = rest.repeat_interleave(params.selection_block, -1)
    rest_tokens = torch.nn.functional.pad(rest_tokens, (0, tokens - rest_tokens.shape[-1]))  # [rows, queries, tokens]
    visible = (torch.arange(tokens, device=q.device) <= positions[:, None]) & ~rest_tokens
    # One matrix product for all heads of a group, so that keys are not copied for each.
    flat = q.flatten(1, 2)  # [rows, group * queries, d]
    logits = flat @ k.mT  # [rows, group * queries, tokens]
    seen = torch.where(visible[:, None], logits.unflatten(1, (group, -1)), -torch.inf)  # [rows, group, queries, tokens]
    exact = (seen.softmax(-1).flatten(1, 2) @ v).unflatten(1, (group, -1))
    has_rest = rest.any(-1)[:, None]  # [rows, 1, queries]
    if residual is None:
        if params.combine == "shared_normalizer":
            return exact
        tail = torch.zeros_like(exact)
    else:
        # What is read from the state is linear in it: the reading of the rest, without a detour over all - selected.
        mask = rest_tokens[:, None].expand(-1, group, -1, -1).flatten(1, 2)  # [rows, group * queries, tokens]
        sums = residual.token_weights(flat, k, logits, mask)
        num_rest = rest.sum(-1) * params.selection_block  # [rows, queries]
        num_rest = num_rest[:, None].expand(-1, group, -1).flatten(1, 2).to(q.dtype)
        tail = residual.tail(residual.reading(sums, [w @ v for w in sums]), num_rest).unflatten(1, (group, -1))
        tail = torch.where(has_rest[..., None], tail, 0.0)
    if params.combine == "double_rmsnorm":
        return double_rmsnorm(exact, tail, weights[0], weights[1], params.rms_norm_eps)
    mass = get_selector(params.selector).mass(flat, statistics, params.selection_block).unflatten(1, (group, -1))
    # Rows without a rest sum to -inf, whose gradient is NaN: they take any finite mass, and nothing of it.
    kept = torch.where((rest | ~has_rest.mT)[:, None], mass, -torch.inf)  # [rows, group, queries, num_blocks]
    log_mass = kept.logsumexp(-1) if kept.shape[-1] else torch.zeros_like(exact[..., 0])
    if weights:
        log_mass = log_mass + weights[0]
    combined = shared_normalizer(exact, seen.logsumexp(-1), tail, log_mass)
    return torch.where(has_rest[..., None], combined, exact)
