"""SPLA prefill over the engine's paged cache on a GPU: what a step needs, and the launches of one layer.

Every token selects for itself the pages that it would select in decode; where decode selects in two levels, it selects
whole selection blocks, in one level of the same budget. Tokens below `dense_below` attend to everything, through
FlashAttention (`gpu/attention.py`); all others go through the passes planned here, whatever rows and chunks they come
in. The plain reference of the whole is `reference.spla_sequence`.

A pass is a number of tiles (`select`) that fits into the scratch. Its launches, for some kv heads at
a time:

1. `prefill_state_kernel`, for all kv heads: the recurrent state at every page
2. `prefill_score_kernel`, NORMALISE, then SHARE; `prefill_select_kernel`
3. `prefill_work_kernel`, `prefill_list_kernel`: the tokens that selected a block, as a list cut into work items; mass
   and mean logit of what was not selected
4. `page_attend_kernel`, `prefill_merge_kernel`

A short chunk is a small pass: its scores are cut into more splits, its merge into more programs, and the launches are
bound once a step for all layers (`gpu/launch`), because the host would take longer than the device.

Where the scratch does not take all kv heads, they run for some of them after the others rather than for fewer tokens:
the more tokens chose a block, the more often is it used once it is on chip.

What depends on lengths is planned on the host, from lengths that the host knows; nothing waits for the device.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import triton
from tqdm import tqdm

from ...interface import Limits
from ...layout import STATE_MAGIC
from ..dense import DenseRows
from ..launch import Launch, current_stream, layer_of
from ..layer import GpuLayer
from ..residual import RESIDUAL_CODES
from ..scratch import Shapes, shared_scratch
from .attend import page_attend_kernel, prefill_merge_kernel
from .select import (
    MODES,
    prefill_list_kernel,
    prefill_score_kernel,
    prefill_select_kernel,
    prefill_work_kernel,
)
from .state import fold_pages_kernel, fold_sum_kernel, prefill_state_kernel

SCRATCH_BYTES = 1 << 30
"""What the parts of a pass may take: a larger pass gives every selection block a longer list of tokens."""


SUB = 16
"""Neighbouring selection blocks that selection looks at only if the best of them is good enough."""

Tile = tuple[int, int, int, int]
"""Row, first token in the batch, tokens, position of the first token."""


@dataclass(frozen=True)
class Pass:
    """Tiles of sparse tokens."""

    tiles: torch.Tensor  # [tiles, 4] int32: row, first token, tokens, position of the first token
    tile_run: torch.Tensor  # [tiles] int32
    tile_state: torch.Tensor  # [tiles] int32
    runs: torch.Tensor  # [runs, 3] int32: first tile, tiles, row
    max_complete: int  # at least the selection blocks of every tile's complete pages
    heads: int  # kv heads at a time
    small: bool  # whether it leaves multiprocessors idle unless cut into small pieces
    launches: dict[tuple, list[Launch]] = field(default_factory=dict, compare=False)  # by what layers differ in


@dataclass(frozen=True)
class Folds:
    """Rows that end within what attends to everything: their state is brought up to date."""

    rows: torch.Tensor  # [folds, 4] int32: row, its complete pages, splits, place of the first split's sums
    items: torch.Tensor  # [items, 2] int32: fold, split
    most_splits: int  # of a row
    launches: dict[tuple, list[Launch]] = field(default_factory=dict, compare=False)  # by what layers differ in


@dataclass(frozen=True)
class PrefillPlan:
    """One step's prefill rows; all device memory in one buffer, copied once."""

    dense: list[DenseRows]
    passes: list[Pass]
    folds: Folds | None


@dataclass(frozen=True)
class PrefillTuning:
    """Launch shapes."""

    normalise_chunk: int = 64
    normalise_warps: int = 8
    normalise_registers: int | None = None
    normalise_stages: int = 3
    share_chunk: int = 32
    share_warps: int = 8
    share_registers: int | None = 128
    share_stages: int = 2
    tile_rows: int = 128
    select_rows: int = 4  # tokens a program
    select_elements: int = 1024  # pages a warp
    select_registers: int | None = 128
    list_warps: int = 1
    attend_rows: int = 64
    attend_span: int = 8  # steps of a work item
    attend_programs: int = 3  # a multiprocessor
    attend_stages: int = 2
    attend_warps: int = 4
    attend_registers: int | None = 168
    merge_rows: int = 128
    merge_stages: int = 4
    merge_warps: int = 8
    merge_registers: int | None = None
    # Of small passes.
    small_attend_rows: int = 16
    small_attend_programs: int = 3
    small_attend_stages: int = 3
    small_attend_registers: int | None = 168
    small_merge_rows: int = 16
    small_merge_stages: int = 6
    small_merge_forced_stages: int = 3
    small_merge_warps: int = 4
    dependent: bool = True  # kernels are launched while the ones before them still run
    state_slice: int = 16
    state_stages: int = 3
    state_warps: int = 4
    fold_slice: int = 128
    fold_stages: int = 4
    fold_pages: int = 4  # the fewest of a split where a row has several
    fold_sum_slice: int = 8


SMALL = PrefillTuning(
    normalise_chunk=32,
    normalise_registers=128,
    normalise_stages=2,
    merge_rows=64,
    merge_stages=3,
    merge_warps=4,
    small_merge_stages=3,
)
"""Where the others do not fit into shared memory: large heads, and `linear`, whose merge reads two matrices."""
NARROW = replace(SMALL, share_chunk=16, fold_slice=64, fold_stages=2)
"""Where thread blocks have less of it (`capability.is_narrow`). It was compiled for such GPUs, not measured on them."""


def _round_up(units: int) -> int:
    """Selection blocks that rows of scratch are laid out for, so that they begin at aligned addresses."""
    return -(-units // 16) * 16


def _align(numbers: list[int]) -> int:
    """Fill up to a multiple of 16 bytes, which kernels are specialised for; the length then."""
    numbers += [0] * (-len(numbers) % 4)
    return len(numbers)


class PrefillPasses:
    """Sparse prefill of one layer.

    Args:
        layer: Which layer.
        limits: The largest step; where all tokens of a sequence attend to everything, no scratch is taken.
        tuning: Launch shapes.
        scratch_bytes: What the parts of a pass may take.

    Attributes:
        dense_below: Tokens at positions below it attend to everything; at least the budget.
        scratch: Buffers between the launches, which all layers of one geometry share.
    """

    _warm: ClassVar[set[tuple]] = set()
    _geometries: ClassVar[dict[tuple, int]] = {}

    def __init__(
        self,
        layer: GpuLayer,
        limits: Limits,
        *,
        tuning: PrefillTuning | None = None,
        scratch_bytes: int = SCRATCH_BYTES,
    ) -> None:
        self.layer, self.device = layer, layer.device
        max_num_tokens, max_num_rows = limits.max_num_tokens, limits.max_num_rows
        params, d = layer.params, layer.head_size
        small = d > 128 or params.residual == "linear" or layer.narrow
        if tuning is None:
            tuning = NARROW if layer.narrow else SMALL if small else PrefillTuning()
            if layer.tensor_memory and d > 128:
                tuning = replace(tuning, fold_slice=64)
            if layer.selector.sets_per_block > 1:
                tuning = replace(tuning, normalise_chunk=16 if layer.narrow and d > 128 else 32)
            elif layer.page_layout.fp8_statistics and not small:
                # Bytes pass through registers before a matrix product; a tile of few rows has registers for more.
                if min(32, params.selection_block & -params.selection_block) * layer.group_p <= 64:
                    tuning = replace(tuning, share_chunk=64)
                else:
                    tuning = replace(tuning, normalise_chunk=32, normalise_registers=128)
        self.tuning = tuning
        self.dense_below = max(limits.prefill_dense_below, params.budget_blocks * params.selection_block)
        dependent = layer.dependent and self.tuning.dependent
        self._chain = {"DEPENDENT": True, "launch_pdl": True} if dependent else {"DEPENDENT": False}
        wide = 1 if layer.dp <= 128 else 2
        rows = self.tuning.tile_rows // wide
        self.tile_tokens = max(1, min(32, rows // layer.group_p, params.selection_block & -params.selection_block))
        self._merge_tokens = max(1, min(self.tile_tokens, self.tuning.merge_rows // wide // layer.group_p))
        self._small_merge_tokens = max(1, min(self._merge_tokens, self.tuning.small_merge_rows // layer.group_p))
        self._attend_tokens = max(1, self.tuning.attend_rows // wide // layer.group_p)
        self._small_attend_tokens = max(1, self.tuning.small_attend_rows // layer.group_p)
        self.slots = params.budget_blocks - 1
        self._largest_budget = max(limits.largest_budget, params.budget_blocks)
        # Selection blocks that a token selects at most without being forced to: the others are first or last ones.
        self._parts = params.budget_blocks - params.first_blocks - params.last_blocks
        self._most_parts = self._largest_budget - params.first_blocks - params.last_blocks
        self._linear = params.residual == "linear"
        self._keeps_mass = layer.score_sinks is not None and layer.top_p > 0  # of a token's heads, without their sinks
        self._s_rows = layer.state_layout.s_rows
        # Bytes a token and kv head: its parts, or the group's scores that stand in the same place before.
        part = layer.group * d * layer.cache_dtype.itemsize + 2 * layer.group_p * 4
        part += (layer.group * d + layer.group_p) * 4 if self._linear else 0
        self._max_pages = -(-limits.max_model_len // params.page_size)
        self._most_units = self._max_pages * params.blocks_per_page
        self._max_units = _round_up(self._most_units)
        per_token = max(self._most_parts * part, self._max_units * 4)
        limit = -(-max_num_tokens // self.tile_tokens) + 2 * max_num_rows  # tiles of a step
        # Tiles times kv heads of a pass, and rows times kv heads: every one of the latter has lists of its own, whose
        # last steps are not full.
        self._max_pairs = max(1, min(limit * layer.num_kv_heads, scratch_bytes // (per_token * self.tile_tokens)))
        step = self._attend_tokens * (8 + (8 * layer.group_p if params.residual == "regression" else 0))  # bytes
        self._max_lists = max(1, scratch_bytes // 16 // (self._max_units * step))
        self._max_lists = min(self._max_lists, max_num_rows * layer.num_kv_heads, self._max_pairs)
        self.max_tiles, self.max_runs = self._max_pairs, min(max_num_rows, self._max_lists)
        # States are made for all kv heads at once: page comes after page there, so that few heads take as long as all.
        state = layer.num_kv_heads * (self._s_rows + 1) * d * 4  # bytes
        self.max_states = max(1, min(limit, scratch_bytes // 4 // state)) if params.residual != "none" else limit
        # Tiles times kv heads that leave multiprocessors idle unless they are cut into small pieces.
        self._small_pairs = layer.num_sms * self._merge_tokens // self.tile_tokens // 2
        # A program of `linear` takes few features: each needs all of a key.
        self._fold_slice = min(16 if self._linear else self.tuning.fold_slice, layer.dp)
        self._fold_slices = triton.cdiv(d, self._fold_slice)
        self.fold_programs = layer.num_sms * (2 if self._linear else 1) // self._fold_slices
        self._sparse = limits.max_model_len > self.dense_below
        self._max_num_rows = max_num_rows
        self.scratch = shared_scratch(self._shapes(), layer.device, layer.scratch_pool)
        # Layers of one geometry launch the same kernels.
        weights = layer.gain, *layer.norm_weights
        named = dict(zip(("gain", "exact_weight", "tail_weight"), weights, strict=True))
        self.weights = named if layer.sinks is None else named | {"sinks": layer.sinks}
        geometry = (str(layer.device), self._shapes_key(), params, self.tuning, layer.scale, layer.cache_dtype,
                    layer.num_heads, layer.state_layout, layer.sink_dtype,
                    *(w.data_ptr() % 16 for w in self.weights.values()))  # fmt: skip
        self._geometry = self._geometries.setdefault(geometry, len(self._geometries))
        self._weight_addresses = {name: w.data_ptr() for name, w in self.weights.items()}

    def warm_up(self) -> None:
        """Compile what the passes of every length need, so that no request has to wait for it."""
        if self.device.type != "cuda":
            return
        layer, params = self.layer, self.layer.params
        key = (self.device, self._shapes_key(), params, layer.cache_dtype, layer.sink_dtype)
        if key in self._warm:
            return
        self._warm.add(key)
        kv_cache = layer.empty_pages(1 + layer.state_layout.num_blocks)
        query = layer.zeros(1, layer.num_heads, layer.head_size)
        block_table = torch.zeros(1, self._max_pages + 1, dtype=torch.int32, device=self.device)
        state_table = torch.arange(1, len(kv_cache), dtype=torch.int32, device=self.device).repeat(1, 1)
        if state_table.shape[1] == 0:
            state_table = block_table
        # The longest row is cut if any is.
        pages = min(self.dense_below // params.page_size, self._max_pages)
        folds = self.plan(0, [0, 1], [pages * params.page_size]).folds if pages else None
        if folds is not None:
            self.fold(folds, kv_cache, kv_cache, block_table, state_table)
        # One length for every power of two that `prefill_select_kernel` is compiled for.
        positions = [max(self.dense_below, 1)] if self._sparse else []
        units = triton.next_power_of_2(_round_up(self.dense_below // params.selection_block))
        while self._sparse and units + params.blocks_per_page < self._most_units:
            positions.append(units * params.selection_block + params.page_size)
            units *= 2
        for position in tqdm(positions, desc="Compiling SPLA prefill kernels", disable=len(positions) < 2):
            (step,) = self.plan(0, [0, 1], [position + 1]).passes
            for small in (True, False):
                size = replace(step, small=small, launches={})
                self.run(size, query, kv_cache, kv_cache, block_table, state_table, torch.empty_like(query))
        torch.cuda.synchronize(self.device)

    def _shapes_key(self) -> tuple:
        return tuple(sorted(self._shapes().items()))

    def _shapes(self) -> Shapes:
        folding: Shapes = {"arrivals": ((self._max_num_rows, self.layer.num_kv_heads), torch.int32)}
        if self.layer.params.residual != "none":
            places = max(1, self.fold_programs // self.layer.num_kv_heads)
            sums = places, self.layer.num_kv_heads, self._s_rows + 1, self.layer.head_size
            folding["partial"] = sums, torch.float32
        if not self._sparse:
            return folding
        layer, pairs = self.layer, self._max_pairs
        tokens, m = pairs * self.tile_tokens, self.tile_tokens * layer.group_p
        parts = max(1, tokens * self._most_parts)
        grouped = tokens * self._max_units * 4 // layer.cache_dtype.itemsize
        rest = layer.params.residual != "none"
        regression = layer.params.residual == "regression"
        lists = self._max_lists * self._max_units
        steps = min(parts, parts // self._attend_tokens + lists)  # every list ends with a step that is not full
        small = min(pairs, self._small_pairs) * self.tile_tokens * self._most_parts
        small = min(small, small // self._small_attend_tokens + lists)
        entries = max(steps * self._attend_tokens, small * self._small_attend_tokens)
        return folding | {
            "out": ((max(parts * layer.group * layer.head_size, grouped),), layer.cache_dtype),
            "part_sum": ((parts, 2, layer.group_p), torch.float32),
            "part_tail": ((parts if self._linear else 1, layer.group, layer.head_size), torch.float32),
            "part_z": ((parts if self._linear else 1, layer.group_p), torch.float32),
            "lse": ((max(pairs, layer.num_sms), m), torch.float32),
            "tail": ((pairs, 2, m), torch.float32),
            "sums": ((max(pairs, layer.num_sms), 3, m), torch.float32),
            "best": ((tokens, self._max_units // SUB), torch.float32),
            "table": ((tokens, self._largest_budget - 1), torch.int32),
            "rank": ((tokens, self._largest_budget - 1), torch.int32),
            "count": ((tokens,), torch.int32),
            **({"mass": ((tokens,), torch.float32)} if self._keeps_mass else {}),
            "totals": ((lists,), torch.int32),
            "first": ((lists,), torch.int32),
            "counters": ((2,), torch.int32),
            "list": ((entries, 2), torch.int32),
            "list_tail": ((entries if regression else 1, 2, layer.group_p), torch.float32),
            "work": ((max(steps, small), 4), torch.int32),
            "states": (
                (self.max_states if rest else 1, layer.num_kv_heads, self._s_rows + 1, layer.head_size),
                torch.float32,
            ),
        }

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch, shared by all layers of one geometry."""
        return sum(x.nbytes for x in self.scratch.values())

    # Planning ---------------------------------------------------------------------------------------------------

    def plan(self, first_row: int, starts: list[int], seq_lens: list[int]) -> PrefillPlan:
        """Dense rows and passes of a step's prefill rows.

        Args:
            first_row: Row of the batch of the first of them.
            starts: `[rows + 1]`, offsets of their query tokens in the batch.
            seq_lens: `[rows]`, tokens of each, this step's included.
        """
        page, size = self.layer.params.page_size, self.tile_tokens
        numbers: list[int] = []  # everything that goes to the device
        dense: list[list[Any]] = []
        tiles: list[Tile] = []
        folds: list[tuple[int, int]] = []
        for index, seq_len in enumerate(seq_lens):
            row, first, stop = first_row + index, starts[index], starts[index + 1]
            start = seq_len - (stop - first)  # position of the row's first token
            split = min(max(self.dense_below, start), seq_len)
            if split > start:
                if dense and dense[-1][-1] == first:
                    dense[-1][1].append((row, first, split - start, split))
                    dense[-1][-1] = first + split - start
                else:
                    dense.append([first, [(row, first, split - start, split)], first + split - start])
            if split == seq_len and seq_len >= page and self.layer.params.residual != "none":
                folds.append((row, seq_len // page))
            position = split
            while position < seq_len:
                end = min(seq_len, position // size * size + size)
                tiles.append((row, first + position - start, end - position, position))
                position = end
        plans: list[tuple[int, int, Any]] = []
        for first, members, stop in dense:
            at = _align(numbers)
            numbers += [token - first for _, token, _, _ in members] + [stop - first]
            numbers += [seq_len for *_, seq_len in members]
            plans.append((at, len(members), (first, stop - first, members)))
        passes: list[tuple[list[int], int, int, int]] = []
        for some in self._cut(tiles):
            runs: list[list[int]] = []
            tile_run, tile_state, states, last = [], [], -1, None
            for number, (row, _, _, position) in enumerate(some):
                if not runs or runs[-1][2] != row:
                    runs.append([number, 0, row])
                runs[-1][1] += 1
                tile_run.append(len(runs) - 1)
                if last != (row, position // page):
                    states, last = states + 1, (row, position // page)
                tile_state.append(states)
            where = []
            for values in (itertools.chain(*some), tile_run, tile_state, itertools.chain(*runs)):
                where.append(_align(numbers))
                numbers += values
            passes.append(
                (
                    where,
                    len(some),
                    len(runs),
                    _round_up(max(position for *_, position in some) // page * self.layer.params.blocks_per_page),
                )
            )
        fold_rows, fold_items = self._cut_folds(folds)
        folds_at = _align(numbers)
        numbers += itertools.chain(*fold_rows, *fold_items)
        host = torch.tensor(numbers, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        buffer = host.to(self.device, non_blocking=True)
        dense_rows = [
            DenseRows(
                first_token=first,
                num_tokens=count,
                first_row=members[0][0],
                start_loc=buffer[at : at + n + 1],
                seq_lens=buffer[at + n + 1 : at + 2 * n + 1],
                max_query_len=max(m[2] for m in members),
                max_seq_len=max(m[3] for m in members),
            )
            for at, n, (first, count, members) in plans
        ]
        steps = [
            Pass(
                tiles=buffer[tiles_at : tiles_at + 4 * n].view(n, 4),
                tile_run=buffer[run_at : run_at + n],
                tile_state=buffer[state_at : state_at + n],
                runs=buffer[runs_at : runs_at + 3 * r].view(r, 3),
                max_complete=complete,
                heads=self._heads(n, r),
                small=self._heads(n, r) * n <= self._small_pairs,
            )
            for (tiles_at, run_at, state_at, runs_at), n, r, complete in passes
        ]
        if not folds:
            return PrefillPlan(dense_rows, steps, None)
        rows, items = buffer[folds_at:].split([4 * len(fold_rows), 2 * len(fold_items)])
        most = max(splits for _, _, splits, _ in fold_rows)
        return PrefillPlan(dense_rows, steps, Folds(rows.view(-1, 4), items.view(-1, 2), most))

    def _cut_folds(self, folds: list[tuple[int, int]]) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """The rows of `Folds` and their splits: as many of all rows together as programs run at a time, and one of each
        row at least."""
        programs = max(1, self.fold_programs // self.layer.num_kv_heads)
        share = max(self.tuning.fold_pages, -(-sum(pages for _, pages in folds) // programs))
        rows, items, place = [], [], 0
        for fold, (row, pages) in enumerate(folds):
            splits = max(1, pages // share)
            rows.append([row, pages, splits, place])
            items += [(fold, split) for split in range(splits)]
            place += splits if splits > 1 else 0
        return rows, items

    def _heads(self, num_tiles: int, num_runs: int) -> int:
        """The most kv heads that the scratch takes at a time."""
        heads = self.layer.num_kv_heads
        fit = (n for n in range(heads, 0, -1) if heads % n == 0)
        return next((n for n in fit if n * num_tiles <= self._max_pairs and n * num_runs <= self._max_lists), 1)

    def _cut(self, tiles: list[Tile]) -> Iterator[list[Tile]]:
        """Tiles of one pass after the other: at most `max_tiles`, of `max_runs` rows, with `max_states` states."""
        page = self.layer.params.page_size
        some: list[Tile] = []
        rows = states = 0
        for tile in tiles:
            another = not some or some[-1][0] != tile[0]
            new = another or some[-1][3] // page != tile[3] // page
            full = len(some) == self.max_tiles or rows + another > self.max_runs or states + new > self.max_states
            if some and full:
                yield some
                some, rows, states, another, new = [], 0, 0, True, True
            some.append(tile)
            rows, states = rows + another, states + new
        if some:
            yield some

    # Attention --------------------------------------------------------------------------------------------------

    def run(
        self,
        step: Pass,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        state_cache: torch.Tensor | None,
        block_table: torch.Tensor,
        state_table: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """One pass of one layer.

        Args:
            step: What to do.
            query: `[tokens, H, d]` of the whole batch, unscaled, heads dense.
            kv_cache: `[num_pages, G, page_size + statistics_rows, 2 d]`, this step's tokens already in it.
            state_cache: State blocks of the same geometry; may be None without a residual.
            block_table: `[rows, pages]` int32 of the whole batch.
            state_table: `[rows, >= K]` int32; may be None without a residual.
            output: `[tokens, H, d]` of the whole batch.

        Raises:
            ValueError: A residual without its state.
        """
        if self.layer.params.residual != "none" and (state_cache is None or state_table is None):
            raise ValueError(f"residual {self.layer.params.residual!r} needs a state cache and its table")
        if state_cache is None or state_table is None:
            state_cache, state_table = kv_cache, block_table
        own = {"query": query, "kv": kv_cache, "state": state_cache, "block_table": block_table,
               "state_table": state_table, "output": output}  # fmt: skip
        self._launch(step, own)

    def fold(
        self,
        folds: Folds,
        kv_cache: torch.Tensor,
        state_cache: torch.Tensor,
        block_table: torch.Tensor,
        state_table: torch.Tensor,
    ) -> None:
        """Bring the states of a plan's `folds` up to date, so that their first decode steps find them.

        Args:
            folds: Whose.
            kv_cache: `[num_pages, G, page_size + statistics_rows, 2 d]`, this step's tokens already in it.
            state_cache: State blocks of the same geometry.
            block_table: `[rows, pages]` int32 of the whole batch.
            state_table: `[rows, >= K]` int32.
        """
        own = {"kv": kv_cache, "state": state_cache, "block_table": block_table, "state_table": state_table}
        self._launch(folds, own)

    def _launch(self, step: Pass | Folds, own: dict[str, torch.Tensor]) -> None:
        """A pass, or states alone, of a layer with these tensors."""
        addresses, alike = layer_of(own)
        alike = (self._geometry, len(own["kv"]), *alike)
        launches = step.launches.get(alike)
        if launches is None:
            launches = list(self.bind(step, own, alike))
            step.launches[alike] = launches
        addresses |= self._weight_addresses
        addresses["kv_int"], addresses["state_int"] = addresses["kv"], addresses["state"]

        def tensors() -> dict[str, torch.Tensor]:
            state = own["state"]
            views = {"kv_int": own["kv"].view(torch.int32), "state_int": state.view(torch.int32)}
            return own | self.weights | views | {"state": state.view(torch.float32)}

        stream = current_stream(self.device)
        for launch in launches:
            launch(addresses, tensors, stream)

    def bind(self, step: Pass | Folds, own: dict[str, torch.Tensor], alike: tuple) -> Iterator[Launch]:
        """The launches for all layers of which `alike` is true (`layer_of`), `own` one of them's tensors."""
        if isinstance(step, Folds):
            yield from self._fold_launches(step, own, alike)
            return
        if self.layer.params.residual != "none":
            yield self._state_launch(step, own, alike)
        for first_head in range(0, self.layer.num_kv_heads, step.heads):
            yield from self._head_launches(first_head, step, own, alike)

    def _state_arguments(self, own: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Pages and states, with strides in int32 words of pages and in float32 of state blocks."""
        kv_int, state = own["kv"].view(torch.int32), own["state"].view(torch.float32)
        return {
            "kv_int_ptr": "kv_int",
            "state_ptr": "state",
            "state_int_ptr": "state_int",
            "block_table_ptr": "block_table",
            "state_table_ptr": "state_table",
            "arrivals_ptr": self.scratch["arrivals"],
            "int_page_stride": kv_int.stride(0),
            "int_head_stride": kv_int.stride(1),
            "block_stride": state.stride(0),
            "block_head_stride": state.stride(1),
            "block_table_stride": own["block_table"].stride(0),
            "state_table_stride": own["state_table"].stride(0),
        }

    def _page_arguments(self, own: dict[str, torch.Tensor]) -> dict[str, Any]:
        kv = own["kv"]
        return {
            "kv_ptr": "kv",
            "page_stride": kv.stride(0),
            "head_stride": kv.stride(1),
            "last_page": len(kv) - 1,
        }

    def _state_constants(self) -> dict[str, Any]:
        layer = self.layer
        return {
            "MAGIC": STATE_MAGIC,
            "STAMP_WORD": layer.page_layout.stamp_word,
            "NUM_BLOCKS": layer.state_layout.num_blocks,
            "BODY": layer.state_layout.rows_per_block - 1,
            "D": layer.head_size,
            "DP": layer.dp,
            "S_ROWS": self._s_rows,
            **self._chain,
        }

    def _fold_launches(self, folds: Folds, own: dict[str, torch.Tensor], alike: tuple) -> Iterator[Launch]:
        """Sums over the splits of the pages, and their sum where there are several."""
        layer, tuning, constants = self.layer, self.tuning, self._state_constants()
        arguments = {
            **self._state_arguments(own),
            "folds_ptr": folds.rows,
            "partial_ptr": self.scratch["partial"],
        }
        slices = self._fold_slices
        yield Launch(
            fold_pages_kernel,
            (slices, layer.num_kv_heads, folds.items.shape[0]),
            {**arguments, **self._page_arguments(own), "items_ptr": folds.items},
            {
                "SLICES": slices,
                "SLICE": self._fold_slice,
                "PAGE": layer.params.page_size,
                "TILE": layer.fold_tile,
                "STAGES": tuning.fold_stages,
                "PHI": layer.phi,
                "num_warps": 8 if self._fold_slice == 128 else 4,
                **constants,
            },
            alike,
        )
        if folds.most_splits == 1:
            return
        slices = triton.cdiv(self._s_rows, tuning.fold_sum_slice)
        yield Launch(
            fold_sum_kernel,
            (slices, layer.num_kv_heads, folds.rows.shape[0]),
            arguments,
            {"SLICES": slices, "SLICE": tuning.fold_sum_slice, "num_warps": 4, **constants},
            alike,
        )

    def _state_launch(self, step: Pass, own: dict[str, torch.Tensor], alike: tuple) -> Launch:
        """States at every page of a pass."""
        layer, tuning = self.layer, self.tuning
        slices = triton.cdiv(self._s_rows, tuning.state_slice)
        return Launch(
            prefill_state_kernel,
            (slices, layer.num_kv_heads, step.runs.shape[0]),
            {
                **self._state_arguments(own),
                **self._page_arguments(own),
                "runs_ptr": step.runs,
                "tiles_ptr": step.tiles,
                "tile_state_ptr": step.tile_state,
                "states_ptr": self.scratch["states"],
            },
            {
                "SLICES": slices,
                "SLICE": tuning.state_slice,
                "PAGE": layer.params.page_size,
                "TILE": layer.fold_tile,
                "STAGES": tuning.state_stages,
                "PHI": layer.phi,
                "KEEP_Z": self._linear or layer.page_layout.fp8_statistics,
                "num_warps": tuning.state_warps,
                **self._state_constants(),
            },
            alike,
        )

    def _head_launches(
        self, first_head: int, step: Pass, own: dict[str, torch.Tensor], alike: tuple
    ) -> Iterator[Launch]:
        """A pass of the kv heads from `first_head` on."""
        layer, t, pool = self.layer, self.tuning, self.scratch
        params, heads = layer.params, step.heads
        num_tiles, num_runs = step.tiles.shape[0], step.runs.shape[0]
        num_parts = num_tiles * self.tile_tokens * self._parts
        max_units = step.max_complete  # of this pass: scratch is laid out anew each time
        residual = RESIDUAL_CODES[params.residual]
        query, output = own["query"], own["output"]
        unit_p, stride = triton.next_power_of_2(params.selection_block), layer.page_layout.statistics_stride
        fp8 = layer.page_layout.fp8_statistics
        mass = {"mass_ptr": pool["mass"] if self._keeps_mass else None}
        deep = unit_p * layer.dp <= 8192  # whether several selection blocks are in shared memory at a time
        grouped = pool["out"].view(torch.float32)
        # Arguments and constants of several kernels.
        inputs = {
            **self._page_arguments(own),
            "query_ptr": "query",
            "query_token_stride": query.stride(0),
            "query_head_stride": query.stride(1),
            "first_head": first_head,
            "scale": layer.scale,
        }
        table = {"block_table_ptr": "block_table", "block_table_stride": own["block_table"].stride(0)}
        parts = {
            "part_out_ptr": pool["out"],
            "part_sum_ptr": pool["part_sum"],
            "part_tail_ptr": pool["part_tail"],
            "part_z_ptr": pool["part_z"],
            "num_parts": num_parts,
            "residual_scale": params.residual_scale,
        }
        shape = {
            "GROUP": layer.group,
            "GROUP_P": layer.group_p,
            "D": layer.head_size,
            "DP": layer.dp,
            "PAGE": params.page_size,
            "UNIT": params.selection_block,
            **self._chain,
        }
        forced = {"FIRST": params.first_blocks, "LAST": params.last_blocks}
        scores = {
            "STRIDE": stride,
            "FP8": fp8,
            "LOG2_UNIT": math.log2(params.selection_block),
            "SELECTOR": layer.gpu_selector,
            "MASS": layer.has_mass,
        }
        lists = num_runs * heads * max_units
        # A few programs to a multiprocessor, each of at least two chunks.
        sms, pairs = layer.num_sms, heads * num_tiles
        norms = max(1, min(max_units // (2 * t.normalise_chunk), sms // pairs))
        splits = max(
            1, min(max_units // (4 * t.share_chunk), 8), min(max_units // (2 * t.share_chunk), 2 * sms // pairs)
        )

        def score(mode: str, splits: int, chunk: int, stages: int, warps: int, registers: int | None) -> Launch:
            return Launch(
                prefill_score_kernel,
                (heads, num_tiles, splits),
                {
                    **inputs,
                    **table,
                    "tiles_ptr": step.tiles,
                    "lse_ptr": pool["lse"],
                    "sums_ptr": pool["sums"],
                    "grouped_ptr": grouped,
                    "best_ptr": pool["best"],
                    "totals_ptr": pool["totals"],
                    "counters_ptr": pool["counters"],
                    "sink_ptr": None if layer.score_sinks is None else "sinks",
                    **mass,
                    "max_units": max_units,
                    "num_lists": lists,
                    "num_norms": norms,
                },
                {
                    **shape,
                    **scores,
                    "MODE": MODES[mode],
                    "TQ": self.tile_tokens,
                    "OWN_MASS": layer.own_mass,
                    "CHUNK": chunk,
                    "SUB": SUB,
                    "STAGES": stages,
                    "num_warps": warps,
                    "maxnreg": registers,
                },
                alike,
            )

        yield score("normalise", norms, t.normalise_chunk, t.normalise_stages, t.normalise_warps, t.normalise_registers)
        yield score("share", splits, t.share_chunk, t.share_stages, t.share_warps, t.share_registers)
        subs = max(16, triton.next_power_of_2(max_units // SUB))
        slots = {"SLOTS": self.slots, "SLOTS_P": max(16, triton.next_power_of_2(self.slots))}
        # Registers of a multiprocessor end at 16 warps: large budgets spill.
        warps = min(16, max(1, max(subs, slots["SLOTS_P"] * SUB) // t.select_elements))
        rows = 1 if step.small else min(t.select_rows, self.tile_tokens)
        yield Launch(
            prefill_select_kernel,
            (heads, num_tiles, self.tile_tokens // rows),
            {
                "tiles_ptr": step.tiles,
                "tile_run_ptr": step.tile_run,
                "grouped_ptr": grouped,
                "best_ptr": pool["best"],
                "table_ptr": pool["table"],
                "rank_ptr": pool["rank"],
                "count_ptr": pool["count"],
                "totals_ptr": pool["totals"],
                **mass,
                "max_units": max_units,
                "num_rows": rows,
            },
            {
                **slots,
                **forced,
                **self._chain,
                "TQ": self.tile_tokens,
                "PAGE": params.page_size,
                "UNIT": params.selection_block,
                "GROUP": layer.group,
                "SUB": SUB,
                "SUBS": subs,
                "LANES": min(subs, 128 * warps),
                "TOP_P": layer.top_p,
                "num_warps": warps,
                "maxnreg": t.select_registers,
            },
            alike,
        )
        width = 32
        step_tokens, span = self._attend_tokens, t.attend_span
        if step.small:
            step_tokens, span = self._small_attend_tokens, 1
        yield Launch(
            prefill_work_kernel,
            (triton.cdiv(max_units, width), heads, num_runs),
            {
                **table,
                "runs_ptr": step.runs,
                "totals_ptr": pool["totals"],
                "first_ptr": pool["first"],
                "counters_ptr": pool["counters"],
                "work_ptr": pool["work"],
                "list_ptr": pool["list"],
                "max_units": max_units,
            },
            {
                "PER_PAGE": params.blocks_per_page,
                "TM": step_tokens,
                "SPAN": span,
                "WIDTH": width,
                "num_warps": 1,
                **self._chain,
            },
            alike,
        )
        yield Launch(
            prefill_list_kernel,
            (heads, num_tiles, self.tile_tokens),
            {
                **inputs,
                **table,
                "tiles_ptr": step.tiles,
                "tile_run_ptr": step.tile_run,
                "table_ptr": pool["table"],
                "rank_ptr": pool["rank"],
                "count_ptr": pool["count"],
                "first_ptr": pool["first"],
                "sums_ptr": pool["sums"],
                "gain_ptr": "gain",
                "tail_ptr": pool["tail"],
                "list_ptr": pool["list"],
                "list_tail_ptr": pool["list_tail"],
                "max_units": max_units,
                "num_norms": norms,
                "tile_state_ptr": step.tile_state,
                "state_ptr": pool["states"],
                "num_kv_heads": layer.num_kv_heads,
            },
            {
                **shape,
                **scores,
                **slots,
                **forced,
                "TQ": self.tile_tokens,
                "TM": step_tokens,
                "PARTS": self._parts,
                "S_ROWS": self._s_rows,
                "LIST_TAIL": layer.has_mass and params.residual == "regression",
                "num_warps": min(16, t.list_warps * max(1, slots["SLOTS_P"] * layer.dp // 4096)),
            },
            alike,
        )
        yield Launch(
            page_attend_kernel,
            ((t.small_attend_programs if step.small else t.attend_programs) * sms,),
            {
                **inputs,
                **parts,
                "work_ptr": pool["work"],
                "num_items_ptr": pool["counters"],
                "list_ptr": pool["list"],
                "list_tail_ptr": pool["list_tail"],
            },
            {
                **shape,
                "TM": step_tokens,
                "SPAN": span,
                "UNIT_P": unit_p,
                "RESIDUAL": residual,
                "PHI": layer.phi,
                "STAGES": t.attend_stages if not step.small else t.small_attend_stages if deep else 2,
                "num_warps": t.attend_warps,
                "maxnreg": t.small_attend_registers if step.small else t.attend_registers,
            },
            alike,
        )
        tokens = self._small_merge_tokens if step.small else self._merge_tokens
        yield Launch(
            prefill_merge_kernel,
            (heads, num_tiles, self.tile_tokens // tokens),
            {
                **inputs,
                **table,
                **parts,
                "tiles_ptr": step.tiles,
                "tile_state_ptr": step.tile_state,
                "count_ptr": pool["count"],
                "tail_ptr": pool["tail"],
                "state_ptr": pool["states"],
                "sink_ptr": None if layer.sinks is None else "sinks",
                "exact_weight_ptr": "exact_weight",
                "tail_weight_ptr": "tail_weight",
                "output_ptr": "output",
                "output_token_stride": output.stride(0),
                "output_head_stride": output.stride(1),
                "num_kv_heads": layer.num_kv_heads,
                "norm_eps": params.rms_norm_eps,
            },
            {
                **shape,
                **forced,
                "TQ": self.tile_tokens,
                "TM": tokens,
                "UNIT_P": unit_p,
                "PARTS": self._parts,
                "S_ROWS": self._s_rows,
                "STAGES": t.small_merge_stages if step.small else t.merge_stages,
                "FORCED_STAGES": t.small_merge_forced_stages if step.small and deep else 1,
                "RESIDUAL": residual,
                "PHI": layer.phi,
                "DOUBLE_NORM": params.combine == "double_rmsnorm",
                "num_warps": t.small_merge_warps if step.small else t.merge_warps,
                "maxnreg": t.merge_registers,
            },
            alike,
        )
