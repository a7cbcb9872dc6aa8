"""SPLA over whole sequences, differentiable: the same definition as `spla_backend.algorithm.reference`, by masks.

Every token selects its own blocks, as in decode, or with the tile it is in (`tiles.py`). The selection is a choice and
has no gradient; statistics of blocks get one only through the tail's mass, past the rounding of statistics in fp8 as if
there were none (straight through).
The rest is read block by block from the sums of each (or token by token, where blocks have fewer tokens than their sums
rows), chunk of queries by chunk, and read again in the backward pass, so that memory does not grow with the square of
the length. The exact part is likewise made of the masked logits of all pairs of tokens, or, in 16 bits on a GPU, by
FlexAttention, which skips the blocks that no token of a tile selects. Tiles that share a selection gather what they
attend to, and subtract it from the state; they have no gradients.
"""

import math
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from .combine import double_rmsnorm, shared_normalizer, with_sinks
from .parameters import SplaParameters, check_sinks
from .residual import BlockReader, Reading, Residual, make_residual
from .selection import forced_blocks, group_scores, select_blocks
from .selectors import block_statistics, get_selector
from .sketch import read_keys
from .tiles import Tiles, attend_selected, check_tile, prefix_states
from .two_level import (
    coarse_parameters,
    fine_scores,
    forced_fine_blocks,
    round_keys,
    round_queries,
    select_fine_blocks,
)

FLEX_QUERIES = 128
"""Queries a tile of FlexAttention, and the least tokens: what its kernels skip is a whole tile."""


def spla_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: SplaParameters,
    *,
    log_gain: Tensor | None = None,
    norm_weights: tuple[Tensor, Tensor] | None = None,
    feature_weight: Tensor | None = None,
    sinks: Tensor | None = None,
    reader: BlockReader | None = None,
    chunk: int | None = None,
) -> Tensor:
    """SPLA of the last `L` tokens of sequences of `T` tokens, usually of all of them.

    Args:
        q: Queries, multiplied by the softmax scale, `[batch, H, L, d]`, of one dtype with what follows. What is in 16
            bits is computed in float32; only where FlexAttention attends, on a GPU if L = T and tokens select alone,
            its weights and the exact part are rounded to 16 bits, as in the engine's kernels. Tokens of the first tile
            that are not among them take no part in its selection; likewise of the first that shares candidates.
        k: Keys `[batch, G, T, d]`, T >= L.
        v: Values, as `k`.
        params: What to compute.
        log_gain: Log of the factor on the mass of the tail `[H]`, used by `shared_normalizer`; None for 0.
        norm_weights: RMSNorm weights of the exact part and of the tail `[H, d]` each, used by `double_rmsnorm`; None
            for 1.
        feature_weight: What queries and keys are multiplied with before the feature map of `linear`, `[G, d, d]`; None
            for neither.
        sinks: Learned logits without a value `[H]` (gpt-oss), not for `double_rmsnorm`; None for none.
        reader: What reads the blocks of the rest, in the dtype of the sums; None for torch.
        chunk: Queries at a time; None takes as many as `_chunk_elements` allows.

    Returns:
        `[batch, H, L, d]`, at least float32.

    Raises:
        ValueError: Shapes that do not fit together; tiles that do not divide the page, or with `feature_weight` or
            gradients.
    """
    batch, num_heads, length, d = q.shape
    num_kv_heads, total = k.shape[1:3]
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != d or num_heads % num_kv_heads or total < length:
        raise ValueError(
            f"q [batch, H, L, d], k and v [batch, G, T, d] with H a multiple of G and T >= L expected, got "
            f"{[list(x.shape) for x in (q, k, v)]}"
        )
    if sinks is not None:
        check_sinks(params.combine)
    tile = params.tile
    check_tile(params)
    if tile > 1 and feature_weight is not None:
        raise ValueError("tiles have no learned weights of features: use tile 1")
    if tile > 1 and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("tiles have no gradients: use tile 1, or torch.no_grad")
    group, block = num_heads // num_kv_heads, params.attended_block
    rows = batch * num_kv_heads
    given = (q, k, v)
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    queries = q.reshape(rows, group, length, d)
    keys, values = k.reshape(rows, total, d), v.reshape(rows, total, d)
    whole = total // params.selection_block * params.selection_block
    blocks_of_keys = keys[:, :whole].unflatten(1, (-1, params.selection_block))
    statistics = block_statistics(blocks_of_keys, params)
    fine_keys = round_keys(read_keys(blocks_of_keys, statistics, params).flatten(1, 2), params)
    residual = make_residual(params, d, feature_weight)

    def per_row(weight: Tensor) -> Tensor:
        """`[H, ...]` of a head as `[rows, group, 1, ...]`."""
        by_group = weight.unflatten(0, (num_kv_heads, 1, group, 1))
        return by_group.expand(batch, num_kv_heads, *by_group.shape[1:]).flatten(0, 1).squeeze(1)

    of_rows = None if sinks is None else per_row(sinks.reshape(-1).to(q.dtype))  # [rows, group, 1]
    weights: list[Tensor] = []
    if residual is not None and params.combine == "shared_normalizer" and log_gain is not None:
        weights = [per_row(log_gain.reshape(-1))]  # [rows, group, 1]
    elif params.combine == "double_rmsnorm":
        ones = torch.ones(num_heads, d, dtype=q.dtype, device=q.device)
        weights = [per_row(weight.reshape(num_heads, d)) for weight in norm_weights or (ones, ones)]

    choose = partial(unselected_blocks, params=params, sinks=None if of_rows is None else of_rows.detach())
    exact = lse = rest_of_all = None
    states = None if tile == 1 or residual is None else prefix_states(keys, values, params.page_size, residual)
    if q.is_cuda and given[0].element_size() == 2 and length == total and tile == 1:
        # Two levels look at the keys of whatever may be a candidate: the logits of some queries at a time.
        step = total if not params.fine_block else max(1, _chunk_elements(q.device) // (batch * num_heads * total))
        step = -(-step // params.coarse_tile) * params.coarse_tile
        with torch.no_grad():
            parts = [
                choose(part, fine_keys, statistics, positions)
                for part, positions in zip(
                    queries.split(step, 2), torch.arange(total, device=q.device).split(step), strict=True
                )
            ]
            rest_of_all = torch.cat(parts, 1)
        by_sequence = rest_of_all.unflatten(0, (batch, num_kv_heads))
        exact, lse = attend_flex(*given, by_sequence, block)
        if residual is None and params.combine == "shared_normalizer" and sinks is None:
            return exact.to(q.dtype)
        exact, lse = (x.to(q.dtype).reshape(rows, group, *x.shape[2:]) for x in (exact, lse))
    if chunk is None:
        # What is made of a query: weights of all tokens, what it reads of each block's sums, or a mass of each block.
        num_blocks = total // block
        if tile > 1:
            width = max(total, min(total, params.whole_tokens) * d // (tile * group))
        elif residual is None or (reader is None and block < d):
            width = total
        elif exact is None or reader is None:
            width = max(total, num_blocks * d)
        else:
            width = max(num_blocks, d)
        chunk = max(params.selection_block, _chunk_elements(q.device) // (batch * num_heads * width))
    whole_tiles = params.coarse_tile  # what queries at a time are cut at
    chunk = -(-chunk // whole_tiles) * whole_tiles
    outputs = []
    end = 0
    while end < length:
        start = end
        first = total - length + start  # position
        seen = min((first + chunk) // whole_tiles * whole_tiles, total)  # what the last of the chunk sees
        end = seen - (total - length)
        positions = torch.arange(first, seen, device=q.device)
        blocks = statistics[:, : seen // params.selection_block]  # [rows, num_blocks, width]
        part, keys_seen, values_seen = queries[:, :, start:end], keys[:, :seen], values[:, :seen]
        if rest_of_all is None:
            with torch.no_grad():
                rest = choose(part, fine_keys, blocks, positions)
            attended = None
        else:
            assert exact is not None and lse is not None
            rest = rest_of_all[:, start:end, : blocks.shape[1] * (params.selection_block // block)]
            attended = (exact[:, :, start:end], lse[:, :, start:end])
        attend = partial(
            _attend, rest=rest, positions=positions, params=params, residual=residual, reader=reader, states=states
        )
        # Also for a single chunk: there are many layers.
        outputs.append(
            checkpoint(attend, part, keys_seen, values_seen, blocks, attended, of_rows, *weights, use_reentrant=False)
            if torch.is_grad_enabled()
            else attend(part, keys_seen, values_seen, blocks, attended, of_rows, *weights)
        )
    return torch.cat(outputs, 2).reshape(batch, num_heads, length, d)


def unselected_blocks(
    q: Tensor,
    k: Tensor,
    statistics: Tensor,
    positions: Tensor,
    params: SplaParameters,
    sinks: Tensor | None = None,
) -> Tensor:
    """The blocks of complete pages that each query, or each tile, does not attend to exactly.

    Args:
        q: `[rows, group, queries, d]`, a row for each sequence and kv head.
        k: Keys as the fine level reads them `[rows, tokens, d]`, at least of the blocks that have statistics; of use to
            two levels.
        statistics: `[rows, num_blocks, width]` of the full selection blocks below the last position's.
        positions: `[queries]` int64, ascending; consecutive where tiles share a selection.
        params: What to select.
        sinks: Logits of the heads' sinks `[rows, group, 1]`; None without sinks.

    Returns:
        `[rows, queries or tiles, num_attended]` bool, of all the `attended_block` that the selection blocks consist of.
    """
    group, num_blocks = q.shape[1], statistics.shape[1]

    def by_query(scores: Tensor) -> Tensor:
        """`[rows, group * queries, blocks]` as `[queries, rows, 1, group, blocks]`."""
        return scores.unflatten(1, (group, -1)).permute(2, 0, 1, 3)[:, :, None]

    def complete_blocks(tiles: Tiles) -> Tensor:
        """Whether a block is of a complete page `[tiles, num_blocks]`."""
        num_complete = tiles.ends[:, None] // params.page_size * params.blocks_per_page
        return torch.arange(num_blocks, device=q.device) < num_complete

    tiles = Tiles(positions, params)
    complete = complete_blocks(tiles)
    if params.tile > 1 and int(tiles.ends[-1]) < params.whole_tokens:
        return torch.zeros(q.shape[0], *complete.shape, dtype=torch.bool, device=q.device).repeat_interleave(
            params.selection_block // params.attended_block, -1
        )
    coarse = coarse_parameters(params) if params.fine_block else params
    # The tiles that share what statistics choose: the candidates, or what one level selects.
    coarse_tiles = tiles if coarse.tile == params.tile else Tiles(positions, coarse, tiles.voters)
    coarse_complete = complete_blocks(coarse_tiles)
    if params.tile_step > 1:
        q = q[:, :, tiles.voters]
    flat = q.flatten(1, 2)  # [rows, group * queries, d]
    scores = by_query(get_selector(params.selector).score(flat, statistics, params.selection_block))
    forced, num_free, _ = forced_blocks(coarse_tiles.ends[:, None], coarse_complete, coarse)
    of_heads = None if sinks is None else sinks[:, None, :, 0]  # as the scores, without blocks
    of_scores = of_heads if get_selector(params.selector).has_mass else None
    grouped = group_scores(scores, coarse_tiles.by_voter(coarse_complete), of_scores)  # [voters, rows, 1, num_blocks]
    chosen = select_blocks(coarse_tiles.share(grouped), forced, num_free, coarse.top_p)
    chosen = coarse_tiles.by_tile(chosen, tiles)  # [tiles, rows, 1, num_blocks]
    if params.fine_block:
        # Tokens vary slowest: on a CPU sums over the tokens of a block take half of the time.
        logits = (k[:, : num_blocks * params.selection_block] @ round_queries(flat, params).mT).mT
        scores = by_query(fine_scores(logits, params.fine_block))  # logits are [rows, group * queries, tokens]
        forced, num_free = forced_fine_blocks(tiles.ends[:, None], complete, params)
        chosen = select_fine_blocks(scores, chosen, forced, num_free, params.top_p, of_heads, tiles)
        complete = complete.repeat_interleave(params.selection_block // params.fine_block, -1)
    return (complete[:, None] & ~chosen[:, :, 0]).transpose(0, 1)


def _chunk_elements(device: torch.device) -> int:
    """Elements of a float32 tensor of a chunk, of which there are a few: 256 MiB, or 1/128 of a GPU's memory."""
    return torch.cuda.get_device_properties(device).total_memory // 512 if device.type == "cuda" else 1 << 26


@cache
def _compiled_flex_attention() -> Any:
    # Uncompiled, FlexAttention makes all logits.
    return torch.compile(flex_attention)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, rest: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Attention to every token before that is not of the rest, by FlexAttention (arXiv 2412.05496).

    Args:
        q: Scaled queries `[batch, H, T, d]`.
        k: `[batch, G, T, d]`.
        v: As `k`.
        rest: Blocks left out `[batch, G, T, num_blocks]` bool, without a last one that is not full.
        block: Tokens a block.

    Returns:
        Output `[batch, H, T, d]` in the dtype of `q`, and the log of the sum of exponentials `[batch, H, T]`.
    """
    attend = _compiled_flex_attention() if q.is_cuda else flex_attention
    mask = flex_mask(rest, block, q.shape[1] // k.shape[1])
    output, aux = attend(q, k, v, block_mask=mask, scale=1.0, enable_gqa=True, return_aux=AuxRequest(lse=True))
    return output, aux.lse


def flex_mask(rest: Tensor, block: int, group: int) -> BlockMask:
    """The mask of `attend_flex`, by the tokens and by the tiles in which there are any; arguments as there, with
    `group` query heads a kv head."""
    length, device = rest.shape[2], rest.device
    tile = math.lcm(FLEX_QUERIES, block)  # tokens
    num_tiles, num_query_tiles = -(-length // tile), -(-length // FLEX_QUERIES)
    padding = (0, num_tiles * tile // block - rest.shape[3], 0, num_query_tiles * FLEX_QUERIES - length)
    rest = pad(rest, padding)  # what is padded is never looked up, except the block that is not full

    def visible(b: Tensor, h: Tensor, query: Tensor, token: Tensor) -> Tensor:
        return (token <= query) & ~rest[b, h // group, query, token // block]

    some = (~rest).unflatten(3, (num_tiles, -1)).any(-1).unflatten(2, (num_query_tiles, -1)).any(3)
    last_query = torch.arange(1, num_query_tiles + 1, device=device)[:, None] * FLEX_QUERIES - 1
    some &= torch.arange(num_tiles, device=device) * tile <= last_query  # [batch, G, num_query_tiles, num_tiles]
    some = some.repeat_interleave(group, 1)
    order = some.int().argsort(dim=-1, descending=True, stable=True).int()  # tiles to look at first, ascending
    return BlockMask.from_kv_blocks(
        some.sum(-1, dtype=torch.int32),
        order,
        BLOCK_SIZE=(FLEX_QUERIES, tile),
        mask_mod=visible,
        seq_lengths=(length, length),
    )


def _attend_masked(
    q: Tensor, k: Tensor, v: Tensor, rest: Tensor, positions: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """As `attend_flex` by masked logits, arguments as those of `_attend`: output and log of the sum of exponentials."""
    group, tokens = q.shape[1], k.shape[1]
    rest_tokens = rest.repeat_interleave(block, -1)
    rest_tokens = pad(rest_tokens, (0, tokens - rest_tokens.shape[-1]))  # [rows, queries, tokens]
    visible = (torch.arange(tokens, device=q.device) <= positions[:, None]) & ~rest_tokens
    # One matrix product for all heads of a group, so that keys are not copied for each.
    logits = q.flatten(1, 2) @ k.mT  # [rows, group * queries, tokens]
    seen = torch.where(visible[:, None], logits.unflatten(1, (group, -1)), -torch.inf)  # [rows, group, queries, tokens]
    return (seen.softmax(-1).flatten(1, 2) @ v).unflatten(1, (group, -1)), seen.logsumexp(-1)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: Tensor,
    attended: tuple[Tensor, Tensor] | None,
    sinks: Tensor | None,
    *weights: Tensor,
    rest: Tensor,
    positions: Tensor,
    params: SplaParameters,
    residual: Residual | None,
    reader: BlockReader | None,
    states: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """One chunk of queries.

    Args:
        q: `[rows, group, queries, d]`.
        k: `[rows, tokens, d]`, up to the last position.
        v: As `k`.
        statistics: `[rows, num_blocks, width]`.
        attended: The exact part, `[rows, group, queries, d]`, and the log of its sum of exponentials, `[rows, group,
            queries]`, without sinks; None if it is to be made.
        sinks: `[rows, group, 1]`; None without sinks.
        weights: Learned parameters of the combination, `[rows, group, 1]` or two of `[rows, group, 1, d]`.
        rest: From `unselected_blocks`, `[rows, queries or tiles, num_attended]`.
        positions: `[queries]`.
        params: What to compute.
        residual: What stands for the rest.
        reader: What reads its blocks, as in `spla_attention`.
        states: Of tiles, from `tiles.prefix_states`.

    Returns:
        `[rows, group, queries, d]`.
    """
    group, block = q.shape[1], params.attended_block
    reading: Reading | None = None
    if params.tile > 1:
        exact, lse, reading = attend_selected(q, k, v, rest, positions, states, params, residual)
        rest = Tiles(positions, params).by_token(rest, 1)  # [rows, queries, num_attended]
    else:
        exact, lse = _attend_masked(q, k, v, rest, positions, block) if attended is None else attended
    if sinks is not None:
        exact, lse = with_sinks(exact, lse, sinks)
    has_rest = rest.any(-1)[:, None]  # [rows, 1, queries]
    if residual is None:
        if params.combine == "shared_normalizer":
            return exact
        tail = torch.zeros_like(exact)
    else:
        flat = q.flatten(1, 2)  # [rows, group * queries, d]
        of_heads = rest[:, None].expand(-1, group, -1, -1).flatten(1, 2)  # [rows, group * queries, num_attended]
        keys, values = (x[:, : rest.shape[-1] * block] for x in (k, v))
        # What is read from the state is linear in it: the reading of the rest, without a detour over all - selected.
        if reading is not None:
            pass  # of tiles, from their states
        elif reader is None and block < q.shape[-1]:
            reading = residual.read_tokens(flat, keys, values, of_heads.repeat_interleave(block, -1))
        else:
            keys, values = (x.unflatten(1, (-1, block)) for x in (keys, values))
            reading = residual.read_blocks(flat, keys, values, of_heads, reader)
        num_rest = of_heads.sum(-1).to(q.dtype) * block
        tail = residual.tail(reading, num_rest).unflatten(1, (group, -1))
        tail = torch.where(has_rest[..., None], tail, 0.0)
    if params.combine == "double_rmsnorm":
        return double_rmsnorm(exact, tail, weights[0], weights[1], params.rms_norm_eps)
    mass = get_selector(params.selector).mass(flat, statistics, params.selection_block).unflatten(1, (group, -1))
    # Of a selection block whose fine blocks are selected in part the mass is taken to be spread evenly.
    share = rest.unflatten(-1, (mass.shape[-1], params.selection_block // block)).to(mass.dtype).mean(-1)
    share = share[:, None]  # [rows, 1, queries, num_blocks]
    # Rows without a rest sum to -inf, whose gradient is NaN: they take any finite mass, and nothing of it.
    kept = torch.where(share > 0, mass + share.log(), torch.where(has_rest.mT[:, None], -torch.inf, mass))
    log_mass = kept.logsumexp(-1) if kept.shape[-1] else torch.zeros_like(exact[..., 0])
    if weights:
        log_mass = log_mass + weights[0]
    combined = shared_normalizer(exact, lse, tail, log_mass)
    return torch.where(has_rest[..., None], combined, exact)
