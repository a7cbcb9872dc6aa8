"""SPLA over paged memory in vectorised torch: the plain peer of the compiled kernels, and what the CPU engine runs
where they do not reach.

Decode rows are a batch; prefill rows go one after the other in tiles of the tokens of one page, so that all
tokens of a tile share their complete pages and the recurrent state. `plan` does once a step what all layers share.

A decode step of a layer is small: what it costs is as much the number of operations as the bytes. Hence the masks
made in `plan`, numpy for arithmetic on a few indices, and leading dimensions of rows and kv heads in one
(`requests = rows * kv_heads`), which spares matmul its reshaping.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ...algorithm.attention import masked_attention
from ...algorithm.combine import double_rmsnorm, shared_normalizer, with_sinks
from ...algorithm.page_table import (
    PaddedSlots,
    PageTablePlan,
    SparsePageTable,
    fill_page_table,
    pad_slots,
    plan_page_table,
)
from ...algorithm.parameters import SplaParameters, check_sinks
from ...algorithm.residual import Reading, make_residual
from ...algorithm.selection import forced_blocks, group_scores, select_blocks
from ...algorithm.selectors import get_selector
from ...algorithm.two_level import coarse_parameters, fine_scores, forced_fine_blocks, select_fine_blocks
from ..interface import Layer, Plan, Step
from ..layout import STAMP_WORDS, STATE_HEADER_WORDS, STATE_MAGIC, layouts, new_salt

_FOLD_PAGES = 64  # pages folded at a time: bounds the scratch of a rebuild
_DECODE_ELEMENTS = 1 << 21  # keys and values of decode rows attended to at a time: their float32 stays in the cache

States = tuple[torch.Tensor, torch.Tensor]
"""`S [requests, s_rows, head_size]` and `z [requests, z_size]`, float32."""


@dataclass(frozen=True)
class Tile:
    """Query tokens that share their complete pages: one decode token a row, or the tokens of one page of one row."""

    rows: NDArray[np.int64]  # [rows], rows of the batch
    tokens: torch.Tensor | slice  # where the queries `[rows, tokens]` are, row by row
    num_tokens: int  # tokens a row
    positions: torch.Tensor  # [rows, tokens] int64
    pages: NDArray[np.int64]  # [rows, pages], ids of the complete pages, 0 where a row has fewer
    complete: torch.Tensor | None  # [rows, num_blocks] bool; None where all are
    forced: torch.Tensor  # [rows, tokens, num_blocks] bool; with two levels what is forced to be a candidate
    num_free: torch.Tensor | int  # [rows, tokens] int64; an int where all are the same
    fine: tuple[torch.Tensor, torch.Tensor] | None  # with two levels, see `forced_fine_blocks`
    choosing: bool  # some block may be left out of what the statistics choose
    complete_tokens: torch.Tensor  # [requests, 1] float32, tokens of complete pages
    num_rest: torch.Tensor | None  # [requests, tokens * group] float32, tokens left out; None if top-p decides
    sparse: bool  # some block may be left out
    all_sparse: bool  # for every token some block is left out


@dataclass(frozen=True)
class StatePlan:
    """The rows whose state speaks for complete pages from before this step, and what a state in order says."""

    rows: NDArray[np.int64]  # [n]
    num_targets: NDArray[np.int64]  # [n], complete pages before this step, at least 1
    last_pages: NDArray[np.int64]  # [n], page ids of the last of them
    headers: NDArray[np.int32]  # [n, K, kv_heads, 8], stamps left out


@dataclass(frozen=True)
class DecodeRows:
    """Some rows of one query token."""

    tile: Tile
    table: PageTablePlan
    num_current: torch.Tensor  # [rows * kv_heads] int64, blocks of the current page
    slots: PaddedSlots | None  # None where top-p lets the lists' lengths depend on the layer


@dataclass(frozen=True)
class PrefillRow:
    """A row of several query tokens: a dense head, where everything fits into the budget, then the tokens that select,
    those of one page at a time."""

    row: int
    first_token: int
    start: int  # position of the first query token
    dense_end: int  # positions below attend to everything
    pages: torch.Tensor  # [pages] int64, all pages of the row
    spans: list[tuple[int, int]]  # positions `start .. stop - 1` of one page each, from `dense_end` on

    def tokens(self, start: int, stop: int) -> slice:
        """Where the query tokens at positions `start .. stop - 1` are."""
        return slice(start - self.start + self.first_token, stop - self.start + self.first_token)


@dataclass(frozen=True)
class StepRows:
    """The rows of a step, before it is planned how their tokens that select are computed."""

    starts: list[int]  # [rows + 1], where each row's query tokens begin
    lens: list[int]  # [rows], tokens of each sequence
    block_table: torch.Tensor  # [rows, max_pages] int64
    decode: list[int]  # rows of one query token
    prefill: list[PrefillRow]
    states: StatePlan | None

    def first_tokens(self, rows: list[int]) -> slice | torch.Tensor:
        """Where the first query tokens of some rows are; a slice where they stand side by side."""
        first = [self.starts[row] for row in rows]
        together = first == list(range(first[0], first[0] + len(first)))
        return slice(first[0], first[0] + len(first)) if together else torch.tensor(first)


@dataclass(frozen=True)
class CpuPlan(Plan):
    """One step's geometry, shared by all layers."""

    block_table: torch.Tensor  # [rows, max_pages] int64
    decode: list[DecodeRows]
    prefill: list[PrefillRow]
    tiles: list[list[Tile]]  # of each prefill row, its tokens from `dense_end` on
    states: StatePlan | None  # None where no row needs its state


def _gather(
    cache: torch.Tensor,
    page: NDArray[np.int64] | int,
    head: NDArray[np.int64] | int,
    row: NDArray[np.int64] | int,
    size: int,
) -> torch.Tensor:
    """`[n, size]`: the elements from row `row` of head `head` of page `page` on; the three broadcast, in row-major
    order.

    Indexing by several tensors takes six times as long as `index_select`, which copies whole slices. So the cache is
    seen as slices that begin at every multiple of the steps between pages, heads and rows, whatever their order.

    Args:
        cache: `[pages, heads, rows, row size]`, rows dense.
        page: Page ids.
        head: Kv heads.
        row: First rows.
        size: Elements of a slice; it stays within the page.
    """
    steps = cache.stride()[:3]
    stride = math.gcd(*steps)
    start = page * (steps[0] // stride) + head * (steps[1] // stride) + row * (steps[2] // stride)
    end = sum((count - 1) * step for count, step in zip(cache.shape[:3], steps, strict=True)) + cache.shape[3]
    slices = cache.as_strided(((end - size) // stride + 1, size), (stride, 1))
    return slices.index_select(0, torch.from_numpy(np.asarray(start).reshape(-1)))


def _places(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where `chosen [n, blocks]` is true, and which of these places exist, `[n, places]` each, as many as the most that
    are chosen: a row with fewer names one of its own again instead of a block that it did not choose."""
    places = torch.sort(chosen.int(), dim=-1, descending=True, stable=True).indices[:, : int(chosen.sum(-1).max())]
    exists = chosen.gather(-1, places)
    return torch.where(exists, places, places[:, :1]), exists


class VectorisedAttention:
    """`PagedAttention` of one layer on a CPU.

    Args:
        params: What to compute.
        layer: Of which layer.
        prefill_dense_below: Prefill tokens at positions below it attend to everything, as those of short rows do.
    """

    scratch_bytes = 0

    def __init__(self, params: SplaParameters, layer: Layer, prefill_dense_below: int = 0) -> None:
        self.params = params
        self._coarse = coarse_parameters(params) if params.fine_block else params  # what statistics choose
        self.prefill_dense_below = max(prefill_dense_below, params.whole_tokens)
        self.num_heads, self.num_kv_heads, self.head_size = layer.num_heads, layer.num_kv_heads, layer.head_size
        self.group = layer.num_heads // layer.num_kv_heads
        self.scale = layer.scale
        self.cache_dtype = layer.cache_dtype
        self._log_gain = None if layer.gain is None else self._by_kv_head(layer.gain.float().log())
        if layer.sinks is not None:
            check_sinks(params.combine)
        self._sinks = layer.sinks
        ones = torch.ones(layer.num_heads, layer.head_size)
        self.norm_weights = (ones, ones) if layer.norm_weights is None else layer.norm_weights
        self.selector = get_selector(params.selector)
        self.residual = make_residual(params, layer.head_size, layer.feature_weight)
        self.page_layout, self.state_layout = layouts(params, layer.head_size, layer.cache_dtype)
        body = torch.arange(self.state_layout.body_rows)
        rows = self.state_layout.rows_per_block - 1
        self._body_block, self._body_row = body // rows, 1 + body % rows
        self._head = np.arange(layer.num_kv_heads)[:, None]
        self._salt = new_salt()
        self._counter = 0
        self.tokens_read: NDArray[np.int32] | None = None

    # Writing ----------------------------------------------------------------------------------------------------

    def update_cache(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """See `PagedAttention.update_cache`."""
        slots = slot_mapping.numpy()
        if (slots < 0).any():
            used = torch.from_numpy(slots >= 0)
            key, value, slots = key[used], value[used], slots[slots >= 0]
        page, offset = np.divmod(slots, self.params.page_size)
        kv = torch.cat([key, value], -1).to(kv_cache.dtype)
        kv_cache[torch.from_numpy(page), :, torch.from_numpy(offset)] = kv
        finished = page[offset == self.params.page_size - 1]
        if finished.size:
            self._write_statistics(kv_cache, torch.from_numpy(np.unique(finished)))

    def _write_statistics(self, kv_cache: torch.Tensor, pages: torch.Tensor) -> None:
        params, layout, d = self.params, self.page_layout, self.head_size
        keys = kv_cache[pages, :, : params.page_size, :d].float()  # [pages, kv_heads, page_size, head_size]
        shape = (pages.numel(), self.num_kv_heads, layout.statistics_rows * 2 * d)
        area = torch.zeros(shape, dtype=kv_cache.dtype)
        blocks = keys.unflatten(2, (params.blocks_per_page, params.selection_block))
        layout.store(area, self.selector.statistics(blocks))
        if params.has_sketch:
            layout.store_sketch(area, keys)
        self._counter += 1
        stamp = torch.empty(pages.numel(), STAMP_WORDS, dtype=torch.int32)
        stamp[:, :2], stamp[:, 2], stamp[:, 3] = self._salt, self._counter, pages
        area[..., layout.stamp_offset :] = stamp.view(kv_cache.dtype)[:, None]
        kv_cache[pages, :, params.page_size :] = area.unflatten(-1, (layout.statistics_rows, 2 * d))

    # Planning ---------------------------------------------------------------------------------------------------

    @property
    def plan_key(self) -> Hashable:
        """See `PagedAttention.plan_key`."""
        params = self.params
        levels = params.fine_block, params.candidate_blocks
        return params.budget_blocks, *levels, params.top_p, params.residual, params.combine

    def plan(self, step: Step) -> CpuPlan:
        """See `PagedAttention.plan`. Everything is on the host: rows of one query token are decode rows wherever they
        stand. Decode rows of several go through tiles as prefill rows do, but no more of their tokens are dense than if
        they came one by one."""
        rows = self._rows(step)
        tiles = [[self._plan_tile(row, *span, rows.block_table) for span in row.spans] for row in rows.prefill]
        return CpuPlan(rows.block_table, self._plan_decodes(rows), rows.prefill, tiles, rows.states)

    def _rows(self, step: Step) -> StepRows:
        starts, lens = step.query_start_loc.tolist(), step.seq_lens.tolist()
        query_lens = [b - a for a, b in pairwise(starts)]
        table = step.block_table.long()
        params = self.params
        whole_tokens = params.whole_tokens
        decode_rows, prefill, targets = [], [], []
        for row, (query_len, seq_len) in enumerate(zip(query_lens, lens, strict=False)):
            if query_len == 0 or seq_len == 0:
                continue
            if query_len == 1:
                decode_rows.append(row)
            else:
                dense_below = whole_tokens if row < step.num_decodes else self.prefill_dense_below
                prefill.append(self._plan_prefill(row, starts[row], seq_len - query_len, seq_len, table, dense_below))
            if seq_len > whole_tokens and seq_len - query_len >= params.page_size:
                targets.append((row, (seq_len - query_len) // params.page_size))
        return StepRows(starts, lens, table, decode_rows, prefill, self._plan_states(targets, table))

    def _plan_decodes(self, rows: StepRows) -> list[DecodeRows]:
        # Rows of much the same length go together: a short one is padded to the longest.
        batch_rows = sorted(rows.decode, key=lambda row: rows.lens[row])
        at_once = max(1, _DECODE_ELEMENTS // (self._coarse.budget_tokens * self.num_kv_heads * 2 * self.head_size))
        return [
            self._plan_decode(batch_rows[first : first + at_once], rows) for first in range(0, len(batch_rows), at_once)
        ]

    def _plan_states(self, targets: list[tuple[int, int]], table: torch.Tensor) -> StatePlan | None:
        """Plan for `(row, complete pages before this step)`."""
        if self.residual is None or not targets:
            return None
        rows, num_targets = np.array(targets).T
        last_pages = table.numpy()[rows, num_targets - 1]
        num_blocks = self.state_layout.num_blocks
        headers = np.zeros((len(rows), num_blocks, self.num_kv_heads, STATE_HEADER_WORDS), np.int32)
        headers[..., 0], headers[..., 1] = STATE_MAGIC, num_targets[:, None, None]
        headers[..., 2 + STAMP_WORDS] = np.arange(num_blocks)[:, None]
        return StatePlan(rows, num_targets, last_pages, headers)

    def _plan_decode(self, batch_rows: list[int], rows: StepRows) -> DecodeRows:
        params, heads, table = self.params, self.num_kv_heads, rows.block_table
        some = torch.tensor(batch_rows)
        positions = torch.tensor([rows.lens[row] - 1 for row in batch_rows])
        tile = self._tile(some, rows.first_tokens(batch_rows), positions[:, None], table)
        page_table = plan_page_table(table[some], positions, heads, params)
        num_current = page_table.in_current_page.sum(-1).flatten()
        slots = None
        if page_table.indptr is not None:
            slots = pad_slots(page_table.indptr, page_table.last_page_len, num_current, params.attended_block)
        return DecodeRows(tile, page_table, num_current, slots)

    def _plan_prefill(
        self, row: int, first_token: int, start: int, end: int, table: torch.Tensor, dense_below: int
    ) -> PrefillRow:
        page_size = self.params.page_size
        dense_end = max(start, min(end, dense_below))
        spans = []
        position = dense_end
        while position < end:
            stop = min(end, (position // page_size + 1) * page_size)
            spans.append((position, stop))
            position = stop
        return PrefillRow(row, first_token, start, dense_end, table[row, : -(-end // page_size)], spans)

    def _plan_tile(self, row: PrefillRow, start: int, stop: int, table: torch.Tensor) -> Tile:
        """The tokens at positions `start .. stop - 1` of a row, all of one page."""
        return self._tile(torch.tensor([row.row]), row.tokens(start, stop), torch.arange(start, stop)[None], table)

    def _tile(
        self, rows: torch.Tensor, tokens: torch.Tensor | slice, positions: torch.Tensor, table: torch.Tensor
    ) -> Tile:
        params = self.params
        num_pages = positions[:, -1] // params.page_size  # [rows]
        width = int(num_pages.max())
        pages = table[rows, :width]
        pages = pages.masked_fill(torch.arange(width) >= num_pages[:, None], 0)
        num_complete = num_pages * params.blocks_per_page
        block = torch.arange(width * params.blocks_per_page)
        complete = block < num_complete[:, None]  # [rows, num_blocks]
        forced, num_free, choosing = forced_blocks(positions, complete, self._coarse)
        fine = forced_fine_blocks(positions, complete, params) if params.fine_block else None
        sparse = positions >= params.whole_tokens
        complete_tokens = (num_pages * params.page_size).float()[:, None].repeat_interleave(self.num_kv_heads, 0)
        num_rest = None
        if params.top_p is None:
            all_forced, all_free = fine or (forced, num_free)
            selected = (
                all_forced.sum(-1) + all_free
            ) * params.attended_block  # tokens of complete pages [rows, tokens]
            num_rest = (num_complete[:, None] * params.selection_block - selected).float()
            num_rest = num_rest.repeat_interleave(self.num_kv_heads, 0).repeat_interleave(self.group, 1)
        return Tile(
            rows.numpy(),
            tokens,
            positions.shape[1],
            positions,
            pages.numpy(),
            None if bool(complete.all()) else complete,
            forced,
            int(num_free[0, 0]) if bool((num_free == num_free[0, 0]).all()) else num_free,
            fine,
            bool(choosing.any()),
            complete_tokens,
            num_rest,
            bool(sparse.any()),
            bool(sparse.all()),
        )

    # Running ----------------------------------------------------------------------------------------------------

    def run(
        self,
        plan: CpuPlan,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        state_cache: torch.Tensor | None,
        state_table: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """See `PagedAttention.run`."""
        if plan.states is not None:
            assert state_cache is not None and state_table is not None
            self._fold(plan, plan.states, kv_cache, state_cache, state_table)
        for rows in plan.decode:
            states = None
            if self.residual is not None and rows.tile.sparse:
                assert state_cache is not None and state_table is not None
                states = self._states(self._read_bodies(state_cache, state_table, rows.tile.rows))
            self._decode(rows, query, kv_cache, states, output)
        for row, tiles in zip(plan.prefill, plan.tiles, strict=True):
            states = None
            if self.residual is not None and tiles:
                assert state_cache is not None and state_table is not None
                states = self._states(self._read_bodies(state_cache, state_table, np.array([row.row])))
                if row.start < self.params.page_size:  # nothing was folded: what the blocks hold is another's
                    states = (torch.zeros_like(states[0]), torch.zeros_like(states[1]))
            self._prefill(row, tiles, query, kv_cache, states, output)

    def grouped(self, query: torch.Tensor, tile: Tile) -> torch.Tensor:
        """Scaled float32 queries `[requests, tokens * group, head_size]`."""
        return self._in_groups(query, tile).float() * self.scale

    def _in_groups(self, query: torch.Tensor, tile: Tile) -> torch.Tensor:
        """Queries of a tile as they came `[requests, tokens * group, head_size]`."""
        q = query[tile.tokens]  # [rows * tokens, heads, head_size]
        if tile.num_tokens == 1:
            return q.reshape(-1, self.group, self.head_size)
        q = q.reshape(-1, tile.num_tokens, self.num_kv_heads, self.group, self.head_size).transpose(1, 2)
        return q.reshape(-1, tile.num_tokens * self.group, self.head_size)

    def _statistics(self, kv_cache: torch.Tensor, tile: Tile) -> torch.Tensor:
        """Statistics of the complete pages `[requests, num_blocks, width]` float32."""
        layout = self.page_layout
        size = layout.statistics_bytes // kv_cache.itemsize
        area = _gather(kv_cache, tile.pages[:, None], self._head, layout.page_size, size)
        num_blocks = tile.pages.shape[1] * layout.blocks_per_page
        return layout.load(area).view(-1, num_blocks, layout.statistics_width)

    def select(self, tile: Tile, q: torch.Tensor, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Selected complete blocks `[rows, kv_heads, tokens, num_attended]` and the log mass of the rest
        `[requests, tokens * group]` (None where nothing asks for it)."""
        params = self.params
        if not tile.sparse:
            forced = tile.forced if tile.fine is None else tile.fine[0]
            return forced[:, None].expand(-1, self.num_kv_heads, -1, -1), None
        scores = mass = None
        if self.residual is not None and params.combine == "shared_normalizer":
            scores, mass = self.selector.score_and_mass(q, self._statistics(kv_cache, tile), params.selection_block)
        elif tile.choosing:
            scores = self.selector.score(q, self._statistics(kv_cache, tile), params.selection_block)
        by_head = (-1, self.num_kv_heads, tile.num_tokens, self.group, tile.forced.shape[-1])
        selected = tile.forced[:, None].expand(-1, self.num_kv_heads, -1, -1)
        if tile.choosing:
            assert scores is not None
            sinks = self._sinks_by_kv_head() if self.selector.has_mass else None
            grouped = group_scores(scores.view(by_head), tile.complete, sinks)
            selected = select_blocks(grouped, tile.forced, tile.num_free, self._coarse.top_p)
        if tile.fine is not None:
            selected = self._select_fine(tile, q, kv_cache, selected)
        if mass is None:
            return selected, None
        share = 1 - selected.unflatten(-1, (tile.forced.shape[-1], -1)).float().mean(-1)
        if tile.complete is not None:
            share.masked_fill_(~tile.complete[:, None, None], 0.0)
        share = share.unsqueeze(-2)  # of each block's tokens in the rest [rows, kv_heads, tokens, 1, num_blocks]
        of_rest = (mass.view(by_head) + share.log()).masked_fill(share <= 0, -torch.inf)
        return selected, of_rest.logsumexp(-1).view(q.shape[:2])

    def _select_fine(
        self, tile: Tile, q: torch.Tensor, kv_cache: torch.Tensor, candidates: torch.Tensor
    ) -> torch.Tensor:
        """Selected fine blocks of complete pages `[rows, kv_heads, tokens, num_fine]`, by the keys of the candidates
        `[rows, kv_heads, tokens, num_blocks]` or by their sketches."""
        params, layout = self.params, self.page_layout
        assert tile.fine is not None
        size = params.page_size if params.has_sketch else params.selection_block  # tokens that are read together
        # Neighbouring tokens have much the same candidates: the union is read once.
        wanted = candidates.any(2).flatten(0, 1).unflatten(-1, (-1, size // params.selection_block)).any(-1)
        slots, _ = _places(wanted)  # [requests, slots]
        page, of_page = np.divmod(slots.numpy(), params.page_size // size)
        pages = np.take_along_axis(tile.pages.repeat(self.num_kv_heads, 0), page, 1)[..., None]
        heads = np.tile(self._head, (len(tile.rows), 1))[..., None]  # [requests, 1, 1]
        if params.has_sketch:
            elements = layout.statistics_rows * 2 * self.head_size
            keys = layout.sketched_keys(_gather(kv_cache, pages, heads, layout.page_size, elements))
        else:
            rows = of_page[..., None] * size + np.arange(size)
            keys = _gather(kv_cache, pages, heads, rows, self.head_size).float()
        keys = keys.view(len(slots), -1, self.head_size)  # [requests, slots * size, head_size]
        scores = fine_scores(q @ keys.mT, params.fine_block)  # [requests, tokens * group, slots * per_slot]
        per_slot = size // params.fine_block
        where = (slots[..., None] * per_slot + torch.arange(per_slot)).flatten(1)[:, None].expand(scores.shape)
        every = scores.new_full((*q.shape[:2], wanted.shape[-1] * per_slot), -torch.inf).scatter_(-1, where, scores)
        every = every.view(-1, self.num_kv_heads, tile.num_tokens, self.group, every.shape[-1])
        return select_fine_blocks(every, candidates, *tile.fine, params.top_p, self._sinks_by_kv_head())

    def _decode(
        self,
        rows: DecodeRows,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        states: States | None,
        output: torch.Tensor,
    ) -> None:
        tile = rows.tile
        q = self.grouped(query, tile)  # [requests, group, head_size]
        selected, log_mass = self.select(tile, q, kv_cache)
        table = fill_page_table(rows.table, selected[:, :, 0])
        slots = rows.slots
        if slots is None:
            slots = pad_slots(table.indptr, table.last_page_len, rows.num_current, self.params.attended_block)
        self.tokens_read = self.params.attended_block * table.indptr.diff().view(-1, self.num_kv_heads).numpy()
        keys, values = self._read_slots(kv_cache, table, slots)  # [requests, tokens, head_size]
        logits = q @ keys.mT  # [requests, group, tokens]
        weights: list[torch.Tensor] = []
        if states is not None:
            assert self.residual is not None
            weights = self.residual.token_weights(q, keys, logits, slots.complete_tokens.unsqueeze(1))
        exact, lse, products = masked_attention(logits, values, slots.visible.flatten(1).unsqueeze(1), weights)
        reading = None
        if states is not None:
            assert self.residual is not None
            reading = self.residual.reading(weights, products)
        self._combine(tile, q, exact, lse, selected, reading, log_mass, states, output)

    def _read_slots(
        self, kv_cache: torch.Tensor, table: SparsePageTable, slots: PaddedSlots
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the slots `[requests, slots * attended_block, head_size]` float32, finite."""
        ids = table.indices if slots.even else table.indices[slots.where]
        kv = self._gather_blocks(kv_cache, ids.numpy()).view(*slots.visible.shape, 2 * self.head_size)
        # Behind the last token, and in the place of a missing block, stands whatever the page held before.
        if slots.even:
            kv[:, -1].masked_fill_(~slots.visible[:, -1, :, None], 0.0)
        else:
            kv.masked_fill_(~slots.visible[..., None], 0.0)
        keys, values = kv.flatten(1, 2).split(self.head_size, -1)
        return keys.float(), values.float()

    def _gather_blocks(self, kv_cache: torch.Tensor, ids: NDArray[np.integer]) -> torch.Tensor:
        """`[n, attended_block * 2 * head_size]` of the page-table ids `ids`, in row-major order."""
        block = self.params.attended_block
        pages, blocks = np.divmod(ids.astype(np.int64), self.params.page_size // block)
        pages, heads = np.divmod(pages, self.num_kv_heads)
        return _gather(kv_cache, pages, heads, blocks * block, block * 2 * self.head_size)

    def _prefill(
        self,
        row: PrefillRow,
        tiles: list[Tile],
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        states: States | None,
        output: torch.Tensor,
    ) -> None:
        if row.dense_end > row.start:
            self._dense(row, query, kv_cache, output)
        covered = None
        for tile in tiles:
            if states is not None:
                covered = self._advance(row, tile.pages.shape[1], covered, kv_cache, states)
            self._prefill_tile(tile, row, query, kv_cache, states, output)

    def _dense(self, row: PrefillRow, query: torch.Tensor, kv_cache: torch.Tensor, output: torch.Tensor) -> None:
        """Causal attention of the positions `start .. dense_end - 1`, whose every block fits into the budget."""
        pages = row.pages[: -(-row.dense_end // self.params.page_size)]
        tokens = row.tokens(row.start, row.dense_end)
        # In the order of the tokens [dense_end, kv_heads, 2 d].
        kv = kv_cache[pages, :, : self.params.page_size].transpose(1, 2).flatten(0, 1)[: row.dense_end]
        exact = self._causal(query[tokens], *kv.split(self.head_size, -1))
        if self.params.combine == "double_rmsnorm":
            exact = exact.float()
            exact = double_rmsnorm(exact, torch.zeros_like(exact), *self.norm_weights, self.params.rms_norm_eps)
        output[tokens] = exact.to(output.dtype)

    def _causal(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Dense causal attention of the last tokens of a sequence.

        Args:
            query: `[queries, heads, head_size]`, unscaled.
            keys: `[tokens, kv_heads, head_size]`.
            values: `[tokens, kv_heads, head_size]`.

        Returns:
            `[queries, heads, head_size]` in the dtype of the keys.
        """
        queries, tokens = query.shape[0], keys.shape[0]
        mask = None
        if queries < tokens:
            seen = torch.arange(tokens) <= torch.arange(tokens - queries, tokens)[:, None]
            mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[None, None]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query.transpose(0, 1).to(keys.dtype)[None],  # [1, heads, queries, head_size]
            keys.repeat_interleave(self.group, 1).transpose(0, 1)[None],
            values.repeat_interleave(self.group, 1).transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
        )
        sinks = self._sinks_now()
        if sinks is not None:
            out, _ = with_sinks(out, lse, sinks[:, None])
        return out[0].transpose(0, 1).to(keys.dtype)

    def _prefill_tile(
        self,
        tile: Tile,
        row: PrefillRow,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        states: States | None,
        output: torch.Tensor,
    ) -> None:
        params, block_size, heads = self.params, self.params.attended_block, self.num_kv_heads
        per_page = params.page_size // block_size
        q = self.grouped(query, tile)  # [kv_heads, tokens * group, head_size]
        selected, log_mass = self.select(tile, q, kv_cache)
        # Neighbouring tokens choose much the same blocks: gather the union once, mask per token.
        union = selected[0].any(1)  # [kv_heads, num_blocks]
        slots, exists = _places(union)  # [kv_heads, slots]
        page, block = np.divmod(slots.numpy(), per_page)
        ids = (tile.pages[0][page] * heads + self._head) * per_page + block
        kv = self._gather_blocks(kv_cache, ids).view(*slots.shape, block_size, 2 * self.head_size)
        chosen = selected[0].gather(-1, slots[:, None].expand(-1, tile.num_tokens, -1)) & exists[:, None]
        chosen = chosen.repeat_interleave(self.group, 1)  # [kv_heads, tokens * group, slots]

        end = int(tile.positions[0, -1]) % params.page_size + 1
        current = kv_cache[row.pages[tile.pages.shape[1]], :, :end]  # [kv_heads, end, 2 d]
        causal = torch.arange(end) <= (tile.positions[0] % params.page_size)[:, None]
        causal = causal.repeat_interleave(self.group, 0).expand(heads, -1, -1)
        keys, values = torch.cat([kv.flatten(1, 2), current], 1).unsqueeze(1).split(self.head_size, -1)
        visible = torch.cat([chosen.repeat_interleave(block_size, -1), causal], -1)
        # The kv heads are its batch, so that a group shares its keys. It is the one torch kernel with an LSE. It takes
        # queries as they came: the scale need not be a power of two, and in 16 bits they would be rounded once more.
        exact, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            self._in_groups(query, tile).to(keys.dtype).unsqueeze(1),
            keys.contiguous(),
            values.contiguous(),
            attn_mask=torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, -torch.inf).unsqueeze(1),
            scale=self.scale,
        )
        reading = None
        if states is not None:
            assert self.residual is not None
            keys, values = kv.float().split(self.head_size, -1)
            reading = self.residual.read_blocks(q, keys, values, chosen)
        self._combine(tile, q, exact.float().squeeze(1), lse.squeeze(1), selected, reading, log_mass, states, output)

    def _combine(
        self,
        tile: Tile,
        q: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        selected: torch.Tensor,
        reading: Reading | None,
        log_mass: torch.Tensor | None,
        states: States | None,
        output: torch.Tensor,
    ) -> None:
        """Tail and combination of a tile.

        Args:
            tile: The tile.
            q: `[requests, tokens * group, head_size]`.
            out: Exact part, as `q`.
            lse: `[requests, tokens * group]`.
            selected: Selected complete blocks `[rows, kv_heads, tokens, num_attended]`.
            reading: Reading of the selected complete blocks; None where nothing is left out.
            log_mass: Log mass of the rest, as `lse`.
            states: States of the tile's rows.
            output: `[tokens, heads, head_size]`.
        """
        tail = None
        if reading is not None:
            assert states is not None
            tail = self._tail(tile, q, selected, reading, states)
        by_head = (-1, self.num_kv_heads, tile.num_tokens, self.group)  # of `[requests, tokens * group]`
        sinks = self._sinks_by_kv_head()
        if sinks is not None:
            of_rows = sinks.expand(lse.view(by_head).shape).reshape(lse.shape)
            out, lse = with_sinks(out, lse, of_rows)
        if self.params.combine == "double_rmsnorm":
            w_exact, w_tail = (self._by_kv_head(w) for w in self.norm_weights)
            tail = torch.zeros_like(out) if tail is None else tail
            out, tail = out.view(*by_head, self.head_size), tail.view(*by_head, self.head_size)
            out = double_rmsnorm(out, tail, w_exact, w_tail, self.params.rms_norm_eps)
        elif tail is not None:
            assert log_mass is not None
            if self._log_gain is not None:
                log_mass = (log_mass.view(by_head) + self._log_gain).view(lse.shape)
            out = shared_normalizer(out, lse, tail, log_mass)
        if tile.num_tokens > 1:
            out = out.reshape(*by_head, self.head_size).transpose(1, 2)
        output[tile.tokens] = out.reshape(-1, self.num_heads, self.head_size).to(output.dtype)

    def _tail(
        self, tile: Tile, q: torch.Tensor, selected: torch.Tensor, reading: Reading, states: States
    ) -> torch.Tensor:
        """The tail's output, as `q`; zero where nothing is left out."""
        assert self.residual is not None
        num_rest = tile.num_rest
        if num_rest is None:
            num_selected = selected.sum(-1).repeat_interleave(self.group, -1).flatten(0, 1)
            num_rest = tile.complete_tokens - num_selected * self.params.attended_block
        whole = self.residual.read(q, states[0], states[1].unsqueeze(-1))
        rest = tuple(a - b for a, b in zip(whole, reading, strict=True))
        tail = self.residual.tail(rest, num_rest)
        return tail if tile.all_sparse else tail.masked_fill((num_rest <= 0).unsqueeze(-1), 0.0)

    def _sinks_now(self) -> torch.Tensor | None:
        """The sinks `[heads]` float32 as the model has them now; None where it has none."""
        return None if self._sinks is None else self._sinks.detach().float()

    def _sinks_by_kv_head(self) -> torch.Tensor | None:
        sinks = self._sinks_now()
        return None if sinks is None else self._by_kv_head(sinks)

    def _by_kv_head(self, per_head: torch.Tensor) -> torch.Tensor:
        """`[heads, ...]` as `[kv_heads, 1, group, ...]`."""
        return per_head.unflatten(0, (self.num_kv_heads, 1, self.group))

    # Recurrent state --------------------------------------------------------------------------------------------

    def _state_rows(self, state_cache: torch.Tensor) -> torch.Tensor:
        """The state blocks as `[num_blocks, kv_heads, rows_per_block, head_size]` float32.

        `view` and nothing else: a copy would take every write to a state with it.
        """
        rows = state_cache.view(torch.float32)  # [num_blocks, kv_heads, rows, 2 d * itemsize / 4]
        return rows.view(*rows.shape[:2], self.state_layout.rows_per_block, self.head_size)

    def _stamp(self, kv_cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Stamps `[pages, kv_heads, 4]` int32."""
        words = STAMP_WORDS * 4 // kv_cache.element_size()
        return kv_cache[pages, :, -1, -words:].contiguous().view(torch.int32)

    def _fold(
        self,
        plan: CpuPlan,
        wanted: StatePlan,
        kv_cache: torch.Tensor,
        state_cache: torch.Tensor,
        state_table: torch.Tensor,
    ) -> None:
        """Bring the stored states of the plan's rows up to date (docs/design.md, 6)."""
        behind = np.flatnonzero(~self._up_to_date(wanted, kv_cache, state_cache, state_table))
        if behind.size == 0:
            return
        rows_view = self._state_rows(state_cache)
        for i in behind:
            row, target = int(wanted.rows[i]), int(wanted.num_targets[i])
            blocks = state_table[row, : self.state_layout.num_blocks].long()
            self._fold_row(rows_view, blocks, target, kv_cache, plan.block_table[row])

    def _up_to_date(
        self, wanted: StatePlan, kv_cache: torch.Tensor, state_cache: torch.Tensor, state_table: torch.Tensor
    ) -> NDArray[np.bool_]:
        """Which stored states `[n]` cover just what the plan wants: the steady state, one look for all rows."""
        blocks = state_table.numpy()[wanted.rows, : self.state_layout.num_blocks]
        # Only the first row of a block is seen as int32, for a view of the whole need not exist.
        headers = state_cache[:, :, 0].view(torch.int32)[..., :STATE_HEADER_WORDS].numpy()[blocks]
        stamps = kv_cache[:, :, -1].view(torch.int32)[..., -STAMP_WORDS:].numpy()[wanted.last_pages]
        expected = wanted.headers.copy()  # [n, K, kv_heads, 8]
        expected[..., 2 : 2 + STAMP_WORDS] = stamps[:, None]
        return (headers == expected).reshape(len(expected), -1).all(1)

    def _fold_row(
        self,
        rows_view: torch.Tensor,
        blocks: torch.Tensor,
        target: int,
        kv_cache: torch.Tensor,
        pages: torch.Tensor,
    ) -> None:
        """Bring the state in `blocks` to the first `target` of `pages`."""
        layout = self.state_layout
        covered = self.covered_pages(rows_view, blocks, target, kv_cache, pages)
        if covered:
            s, z = self._read_body(rows_view, blocks)
        else:
            s = torch.zeros(self.num_kv_heads, layout.s_rows, self.head_size)
            z = torch.zeros(self.num_kv_heads, layout.z_size)
        for first in range(covered, target, _FOLD_PAGES):
            self.add_pages(s, z, kv_cache, pages[first : min(first + _FOLD_PAGES, target)])
        self._write_state(rows_view, blocks, target, self._stamp(kv_cache, pages[target - 1 : target])[0], s, z)

    def _read_bodies(
        self, state_cache: torch.Tensor, state_table: torch.Tensor, rows: NDArray[np.int64]
    ) -> torch.Tensor:
        """A copy of the bodies of the stored states of rows of the batch `[requests, >= body_rows, head_size]`."""
        layout = self.state_layout
        blocks = state_table.numpy()[rows, : layout.num_blocks].astype(np.int64)[:, None]  # [rows, 1, K]
        per_block = layout.rows_per_block - 1 if layout.num_blocks > 1 else layout.body_rows
        body = _gather(self._state_rows(state_cache), blocks, self._head, 1, per_block * self.head_size)
        return body.view(-1, layout.num_blocks * per_block, self.head_size)

    def _states(self, body: torch.Tensor) -> States:
        """Views of bodies from `_read_bodies`."""
        layout = self.state_layout
        z = body[:, layout.s_rows : layout.body_rows].flatten(1)
        return body[:, : layout.s_rows], z[:, : layout.z_size]

    def covered_pages(
        self, rows_view: torch.Tensor, blocks: torch.Tensor, target: int, kv_cache: torch.Tensor, pages: torch.Tensor
    ) -> int:
        """Pages that the stored state covers for this very sequence; 0 where it cannot be trusted."""
        header = rows_view[blocks, :, 0, :STATE_HEADER_WORDS].contiguous().view(torch.int32)  # [K, kv_heads, 8]
        covered = int(header[0, 0, 1])
        if not 0 < covered <= target:
            return 0
        expected = torch.zeros_like(header)
        expected[..., 0], expected[..., 1] = STATE_MAGIC, covered
        expected[..., 2 : 2 + STAMP_WORDS] = self._stamp(kv_cache, pages[covered - 1 : covered])
        expected[..., 2 + STAMP_WORDS] = torch.arange(blocks.numel())[:, None]
        return covered if torch.equal(header, expected) else 0

    def _read_body(self, rows_view: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        layout = self.state_layout
        body = rows_view[blocks[self._body_block], :, self._body_row].transpose(0, 1)  # [kv_heads, body_rows, d]
        s, z = body.split([layout.s_rows, layout.z_rows], 1)
        return s, z.flatten(1)[:, : layout.z_size]

    def _write_state(
        self,
        rows_view: torch.Tensor,
        blocks: torch.Tensor,
        covered: int,
        stamp: torch.Tensor,
        s: torch.Tensor,
        z: torch.Tensor,
    ) -> None:
        layout = self.state_layout
        z = F.pad(z, (0, layout.z_rows * self.head_size - layout.z_size)).unflatten(-1, (-1, self.head_size))
        rows_view[blocks[self._body_block], :, self._body_row] = torch.cat([s, z], 1).transpose(0, 1)
        header = torch.zeros(blocks.numel(), self.num_kv_heads, STATE_HEADER_WORDS, dtype=torch.int32)
        header[..., 0], header[..., 1], header[..., 2 : 2 + STAMP_WORDS] = STATE_MAGIC, covered, stamp
        header[..., 2 + STAMP_WORDS] = torch.arange(blocks.numel())[:, None]
        rows_view[blocks, :, 0, :STATE_HEADER_WORDS] = header.view(torch.float32)

    def add_pages(self, s: torch.Tensor, z: torch.Tensor, kv_cache: torch.Tensor, pages: torch.Tensor) -> None:
        """Add whole pages to `s [kv_heads, s_rows, d]` and `z [kv_heads, z_size]` in place."""
        assert self.residual is not None
        kv = kv_cache[pages, :, : self.params.page_size].float().transpose(0, 1).flatten(1, 2)
        ds, dz = self.residual.contribution(*kv.split(self.head_size, -1))
        s += ds
        z += dz

    def _advance(
        self,
        row: PrefillRow,
        needed: int,
        covered: int | None,
        kv_cache: torch.Tensor,
        states: States,
    ) -> int:
        """Add to a prefill row's state the pages that this very step completed, up to the first `needed`."""
        covered = row.start // self.params.page_size if covered is None else covered
        if needed > covered:
            self.add_pages(*states, kv_cache, row.pages[covered:needed])
        return needed
