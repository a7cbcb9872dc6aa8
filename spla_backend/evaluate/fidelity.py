"""How much of the true attention a selection holds, and how far the output lies from the dense one.

Both are measured on queries, keys and values of a real model (`capture.py`), with the algorithm's own code. Every
query sees exactly the tokens before it, as in decoding.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ..algorithm.attention import masked_attention
from ..algorithm.combine import double_rmsnorm, shared_normalizer
from ..algorithm.parameters import SplaParameters
from ..algorithm.residual import make_residual
from ..algorithm.selection import forced_blocks, group_scores, select_blocks
from ..algorithm.selectors import block_statistics, get_selector
from ..algorithm.sequence import spla_attention
from ..algorithm.sketch import read_keys
from ..algorithm.two_level import coarse_parameters, fine_scores, forced_fine_blocks, select_fine_blocks
from ..learned import LayerParameters
from .capture import AttentionInputs
from .variants import without_residual

_CPU_ELEMENTS = 1 << 22  # weights of pairs of tokens that are held at a time

ORACLE = "oracle"
"""Selects by the true mass of each block, summed over the heads of a group: no selection of these blocks by a group
captures more."""


@dataclass(frozen=True)
class Point:
    """One thing to measure.

    Attributes:
        params: What SPLA computes.
        oracle: Select by the true mass instead of `params.selector`.
        output: Whether to measure the output too, which costs far more than the mass.
    """

    params: SplaParameters
    oracle: bool = False
    output: bool = True

    @property
    def selector(self) -> str:
        return ORACLE if self.oracle else self.params.selector


class HeadGroup:
    """Attention of some queries in the heads that share one kv head.

    Args:
        q: `[queries, group, head_size]` float32, scaled.
        k: `[tokens, head_size]` float32.
        v: `[tokens, head_size]` float32.
        positions: `[queries]` int64, position of each query; it sees the tokens `0 .. position`.
        statistics: By selector, block size and dtype, filled on demand, of these keys or of more that begin with them.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        statistics: dict[tuple[str, int, str], torch.Tensor] | None = None,
    ) -> None:
        self.q, self.k, self.v, self.positions = q, k, v, positions
        self._token = torch.arange(k.shape[0], device=k.device)
        self._visible = self._token <= positions[:, None, None]  # [queries, 1, tokens]
        self._logits = q @ k.mT  # [queries, group, tokens]
        self._statistics = {} if statistics is None else statistics
        self._grouped: dict[tuple[str, int, int, str], torch.Tensor] = {}

    @cached_property
    def _share(self) -> torch.Tensor:
        """Softmax weights `[queries, group, tokens]`."""
        return self._logits.masked_fill(~self._visible, -torch.inf).softmax(-1)

    @cached_property
    def _dense(self) -> torch.Tensor:
        """Output of dense attention `[queries, group, head_size]`."""
        return self._share @ self.v

    def statistics(self, params: SplaParameters) -> torch.Tensor:
        """Statistics of all full blocks `[num_blocks, width]`."""
        block = params.selection_block
        key = (params.selector, block, params.statistics_dtype)
        if key not in self._statistics:
            full = self.k.shape[0] // block * block
            self._statistics[key] = block_statistics(self.k[:full].unflatten(0, (-1, block)), params)
        return self._statistics[key][: self.k.shape[0] // block]

    def _complete(self, params: SplaParameters) -> torch.Tensor:
        """`[queries, num_blocks]` bool, the full blocks in pages below each query's."""
        num_complete = self.positions // params.page_size * params.blocks_per_page
        num_blocks = self.k.shape[0] // params.selection_block
        return torch.arange(num_blocks, device=self.k.device) < num_complete[:, None]

    def _group_scores(self, point: Point) -> torch.Tensor:
        """`[queries, 1, 1, num_blocks]`, -inf where not complete."""
        params, block = point.params, point.params.selection_block
        key = (point.selector, block, params.page_size, params.statistics_dtype)
        if key in self._grouped:
            return self._grouped[key]
        complete = self._complete(params)
        if point.oracle:
            full = complete.shape[1] * block
            mass = self._share[..., :full].unflatten(-1, (-1, block)).sum(-1).sum(1)  # [queries, num_blocks]
            grouped = mass.log().clamp(min=torch.finfo(mass.dtype).min).masked_fill(~complete, -torch.inf)
            grouped = grouped[:, None, None]
        else:
            scores = get_selector(params.selector).score(self.q, self.statistics(params), block)
            grouped = group_scores(scores[:, None, None], complete)
        self._grouped[key] = grouped
        return grouped

    def select(self, point: Point) -> torch.Tensor:
        """What is left out, `[queries, num_attended]` bool: blocks of `attended_block` tokens of complete pages that
        were not selected.

        Raises:
            ValueError: Tokens share their selection, or the fine level rounds what it multiplies.
        """
        params = point.params
        if params.coarse_tile > 1 or params.fine_dtype != "auto":
            raise ValueError("fidelity is measured of tokens that select alone, by keys as they are: use tile 1")
        complete = self._complete(params)
        coarse = coarse_parameters(params) if params.fine_block else params
        if params.fine_block and point.oracle:
            chosen = complete[:, None, None]  # whose scores in the fine level are the true mass
        else:
            forced, num_free, _ = forced_blocks(self.positions[:, None], complete, coarse)  # [queries, 1, ...]
            top_p = None if point.oracle else coarse.top_p
            chosen = select_blocks(self._group_scores(point), forced, num_free, top_p)
        if params.fine_block:
            per_block = params.selection_block // params.fine_block
            logits = self._logits[..., : complete.shape[1] * params.selection_block]
            if params.has_sketch:
                blocks = self.k[: logits.shape[-1]].unflatten(0, (-1, params.selection_block))
                logits = self.q @ read_keys(blocks, self.statistics(params), params).flatten(0, 1).mT
            scores = fine_scores(logits, params.fine_block)[:, None, None]  # [queries, 1, 1, group, num_fine]
            forced, num_free = forced_fine_blocks(self.positions[:, None], complete, params)
            chosen = select_fine_blocks(scores, chosen, forced, num_free, params.top_p)
            complete = complete.repeat_interleave(per_block, -1)
        return complete & ~chosen[:, 0, 0]

    def _tokens(self, blocks: torch.Tensor, size: int) -> torch.Tensor:
        """`[queries, 1, tokens]` bool of blocks `[queries, num_blocks]`."""
        tokens = blocks.repeat_interleave(size, -1)
        return torch.nn.functional.pad(tokens, (0, self.k.shape[0] - tokens.shape[1]))[:, None]

    def captured_mass(self, rest: torch.Tensor, block: int) -> torch.Tensor:
        """Share of the true attention mass that is attended to exactly `[queries, group]`."""
        left_out = torch.where(self._tokens(rest, block), self._share, 0.0).sum(-1)
        return 1 - left_out

    def output_error(self, rest: torch.Tensor, params: SplaParameters) -> torch.Tensor:
        """`|o - dense| / |dense|` of each query and head `[queries, group]`.

        Args:
            rest: From `select`.
            params: What to compute. Norms of a `double_rmsnorm` have weight 1.
        """
        return self.output_change(rest, params).norm(dim=-1) / self._dense.norm(dim=-1)

    def output_change(self, rest: torch.Tensor, params: SplaParameters) -> torch.Tensor:
        """`o - dense` `[queries, group, head_size]`, arguments as `output_error`."""
        return self.output(rest, params) - self._dense

    def output(self, rest: torch.Tensor, params: SplaParameters) -> torch.Tensor:
        """What SPLA makes of a selection `[queries, group, head_size]`, arguments as `output_error`."""
        rest_tokens = self._tokens(rest, params.attended_block)
        visible = self._visible & ~rest_tokens
        residual = make_residual(params, self.q.shape[-1])
        if residual is None:
            return masked_attention(self._logits, self.v, visible)[0]
        # Everything read from the state is linear in it: the reading of the rest, without a detour over all - selected.
        weights = residual.token_weights(self.q, self.k, self._logits, rest_tokens)
        exact, lse, products = masked_attention(self._logits, self.v, visible, weights)
        num_rest = rest_tokens.sum(-1)  # [queries, 1]
        tail = residual.tail(residual.reading(weights, products), num_rest.to(self.q.dtype))
        if params.combine == "double_rmsnorm":
            tail = torch.where(num_rest[..., None] > 0, tail, 0.0)
            one = torch.ones((), device=exact.device)
            return double_rmsnorm(exact, tail, one, one, params.rms_norm_eps)
        statistics = self.statistics(params)
        mass = get_selector(params.selector).mass(self.q, statistics, params.selection_block)
        per_block = params.selection_block // params.attended_block
        share = rest.unflatten(-1, (mass.shape[-1], per_block)).to(mass.dtype).mean(-1)  # of each selection block
        log_mass = (mass + share.log()[:, None]).logsumexp(-1)  # [queries, group]
        return shared_normalizer(exact, lse, tail, log_mass)


def measure(
    inputs: AttentionInputs, positions: torch.Tensor, points: Sequence[Point]
) -> tuple[torch.Tensor, torch.Tensor]:
    """All points on one layer of one document.

    Args:
        inputs: Of one layer.
        positions: `[queries]` int64, the tokens whose queries are looked at.
        points: What to measure. Points that differ in nothing but the residual share their selection.

    Returns:
        Captured mass and relative L2 error, means over the queries, each `[points, num_heads]` float32; the error is
        NaN where a point does not want the output.
    """
    positions = positions.to(inputs.k.device)
    num_kv_heads = inputs.k.shape[0]
    q = inputs.q[:, positions].float().unflatten(0, (num_kv_heads, -1))  # [kv_heads, group, queries, head_size]
    mass = torch.empty(len(points), num_kv_heads, q.shape[1])
    error = torch.full_like(mass, math.nan)
    for g in range(num_kv_heads):
        group = HeadGroup(q[g].transpose(0, 1).contiguous(), inputs.k[g].float(), inputs.v[g].float(), positions)
        selections: dict[Point, torch.Tensor] = {}
        for i, point in enumerate(points):
            key = Point(without_residual(point.params), point.oracle, False)
            if key not in selections:
                selections[key] = group.select(point)
            rest = selections[key]
            mass[i, g] = group.captured_mass(rest, point.params.attended_block).mean(0)
            if point.output:
                error[i, g] = group.output_error(rest, point.params).mean(0)
    return mass.flatten(1), error.flatten(1)


def attention(
    inputs: AttentionInputs,
    params: SplaParameters | Mapping[int, SplaParameters],
    learned: Mapping[int, LayerParameters] | None = None,
) -> torch.Tensor | None:
    """SPLA instead of dense attention in one layer of one document, for all of its tokens; differentiable.

    Args:
        inputs: Of the layer.
        params: What to compute, in every layer or by layer; those that are not named are left dense.
        learned: Learned parameters by layer; None where there are none.

    Returns:
        `[num_heads, length, head_size]` float32; None for a dense layer.
    """
    if not isinstance(params, SplaParameters):
        if inputs.layer not in params:
            return None
        params = params[inputs.layer]
    q, k, v = (x.float()[None] for x in (inputs.q, inputs.k, inputs.v))
    mine = LayerParameters() if learned is None else learned[inputs.layer].to(q.device)
    if mine.residual_scale is not None:
        params = replace(params, residual_scale=mine.residual_scale)
    log_gain = None if mine.gain is None else mine.gain.log()
    # On a CPU what a few queries make stays in its caches, which halves the time.
    chunk = max(16, 4 * params.tile, _CPU_ELEMENTS // (q.shape[1] * q.shape[2])) if q.device.type == "cpu" else None
    output = spla_attention(
        q,
        k,
        v,
        params,
        log_gain=log_gain,
        norm_weights=mine.norm_weights,
        feature_weight=mine.feature_weight,
        chunk=chunk,
    )
    return output[0]


def attention_in_pieces(
    inputs: AttentionInputs, pieces: Iterable[tuple[int, int, SplaParameters | None]]
) -> torch.Tensor:
    """As `attention`, of one layer of one document whose tokens come in pieces.

    Args:
        inputs: Of the layer.
        pieces: First token, end and what to compute, one after the other from the first token to the last. None is
            dense attention, for a piece that begins with the document. Pieces of no tokens are left out.

    Returns:
        `[num_heads, length, head_size]` float32.

    Raises:
        ValueError: A dense piece that begins elsewhere.
    """
    outputs = []
    for start, end, params in pieces:
        if start == end:
            continue
        q, k, v = inputs.q[:, start:end], inputs.k[:, :end], inputs.v[:, :end]
        if params is not None:
            output = attention(AttentionInputs(inputs.layer, q, k, v), params)
            assert output is not None
            outputs.append(output)
        elif start:
            raise ValueError(f"a dense piece begins at {start}, and its mask is that of a document's beginning")
        else:
            attend = torch.nn.functional.scaled_dot_product_attention
            outputs.append(attend(q[None], k[None], v[None], is_causal=True, scale=1.0, enable_gqa=True)[0].float())
    return torch.cat(outputs, 1)


def sample_positions(start: int, length: int, count: int, seed: int = 0) -> torch.Tensor:
    """`count` different positions in `start .. length - 1`, ascending `[count]` int64; all of them where there are
    fewer."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(length - start, generator=generator)
    return start + order[:count].sort().values


def summary(mass: torch.Tensor, error: torch.Tensor) -> dict[str, Any]:
    """Numbers of one point.

    Args:
        mass: `[documents, layers, heads]`.
        error: The same, NaN where not measured.

    Returns:
        Mean mass and its standard error over documents, mean mass of the tenth of the heads that captures least, mean
        error, and both by layer and head (means over documents).
    """
    by_head = mass.mean(0)
    worst = by_head.flatten().sort().values
    result = {
        "mass": _round(by_head.mean().item()),
        "mass_se": standard_error(mass.mean((1, 2))),
        "mass_worst_decile": _round(worst[: max(1, len(worst) // 10)].mean().item()),
        "mass_by_layer_and_head": [[_round(x) for x in layer] for layer in by_head.tolist()],
    }
    if not error.isnan().any():
        result["error"] = _round(error.mean().item())
        result["error_by_layer_and_head"] = [[_round(x) for x in layer] for layer in error.mean(0).tolist()]
    return result


def standard_error(values: torch.Tensor) -> float | None:
    """Of the mean of independent values `[n]`; None for a single one."""
    if len(values) < 2:
        return None
    return _round((values.std() / math.sqrt(len(values))).item())


def _round(x: float) -> float:
    return round(x, 5)
