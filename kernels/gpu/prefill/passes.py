"""SPLA prefill over the engine's paged cache on a GPU: the launches of one layer, for the passes of a step (`plan.py`).

Neighbouring tokens at fixed positions, a tile, share their selection (`algorithm/tiles.py`). The plain reference of the
whole is `reference.spla_sequence`.

A pass is a number of candidate tiles that fits into the scratch. Its launches:

1. `prefill_state_kernel`: the recurrent state at every page (`state.py`), one page after the other, which leaves most
   of a GPU idle: in long passes beside the launches up to 6, on a stream of its own; `prompt_statistics_kernel`:
   statistics that are bytes, decoded (`decode_statistics.py`)
2. `prompt_score_kernel`, NORMALISE, then SHARE: scores of selection blocks (`score.py`)
3. `prompt_candidates_kernel`, `prompt_fine_kernel`, `prompt_select_kernel`: what is attended to (`select.py`)
4. `prompt_mass_kernel`: the mass of what is left out (`score.py`)
5. `prompt_gather_kernel`, then FlashAttention over what was selected (`attend.py`)
6. `prompt_rest_kernel`, `prompt_combine_kernel`: the state less the selected, and the output (`combine.py`)

In a small pass, loops over blocks are cut into splits. Launches are bound once a step for all layers (`gpu/launch`),
because the host would take longer than the device.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import triton
from tqdm import tqdm

from ...interface import Limits
from ...layout import STATE_MAGIC
from ..launch import Beside, Join, Launch, current_stream, layer_of
from ..layer import GpuLayer
from ..residual import RESIDUAL_CODES
from ..scratch import Shapes, shared_scratch
from .attend import Attend, address_unit, attend_blocks, prompt_gather_kernel
from .combine import prompt_combine_kernel, prompt_rest_kernel
from .decode_statistics import KINDS, prompt_statistics_kernel
from .plan import SHORT_STEP, Folds, Pass, Planner, prompt_parameters, round_up_units
from .score import MODES, prompt_mass_kernel, prompt_score_kernel
from .select import prompt_candidates_kernel, prompt_fine_kernel, prompt_select_kernel
from .state import fold_pages_kernel, fold_sum_kernel, prefill_state_kernel

SCRATCH_BYTES = 1 << 30
"""What a pass may take, beside what FlashAttention allocates."""
DECODED_BYTES = 1 << 26
"""What the decoded statistics of a pass's rows may take, if it is enough for one row."""
VOTERS = 16
"""Rows of a matrix product at least."""


@dataclass(frozen=True)
class PrefillTuning:
    """Launch shapes."""

    score_chunk: int = 32  # selection blocks at a time
    score_stages: int = 4
    mass_rows: int = 128
    mass_chunk: int = 32
    mass_stages: int = 4
    mass_warps: int = 8
    fine_keys: int = 64
    fine_stages: int = 3
    select_blocks: int = 512  # a warp
    select_voters: int = 16  # at a time
    rest_keys: int = 64
    rest_slice: int = 128
    rest_stages: int = 3
    rest_warps: int = 4
    combine_rows: int = 64
    combine_features: int = 64
    combine_warps: int = 4
    most_splits: int = 8  # of a loop, in small passes
    state_slice: int = 16
    state_stages: int = 3
    state_warps: int = 4
    fold_slice: int = 128
    fold_stages: int = 4
    fold_pages: int = 4  # the fewest of a split where a row has several
    fold_sum_slice: int = 8


SMALL = PrefillTuning(score_stages=2, mass_rows=64, mass_stages=2, mass_warps=4,
                      fine_stages=2, rest_keys=32, rest_slice=64, rest_stages=2, combine_rows=32,
                      combine_features=32)  # fmt: skip
"""Where the others do not fit into shared memory: large heads."""
NARROW = replace(SMALL, score_chunk=16, mass_chunk=16, fine_keys=32, fold_slice=64, fold_stages=2)
"""Where thread blocks have less of it (`capability.is_narrow`). It was compiled for such GPUs, not measured on them."""


class PrefillPasses:
    """Sparse prefill of one layer.

    Args:
        layer: Which layer.
        limits: The largest step; where all tokens of a sequence attend to everything, no scratch is taken.
        tuning: Launch shapes.
        scratch_bytes: What a pass may take.

    Attributes:
        params: What prompt tokens compute.
        planner: Cuts the prompt tokens of a step for `run` and `fold`.
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
        self.params = params = prompt_parameters(layer.params, layer.group)
        d = layer.head_size
        if tuning is None:
            tuning = NARROW if layer.narrow else SMALL if d > 128 else PrefillTuning()
            if layer.tensor_memory and d > 128:
                tuning = replace(tuning, fold_slice=64)
            if layer.selector.sets_per_block > 1:
                chunk = 16 if layer.narrow and d > 128 else 32
                tuning = replace(tuning, score_chunk=chunk, mass_chunk=chunk)
        self.tuning = tuning
        self.tile, self.group_tokens = params.tile, params.coarse_tile
        self._tiles = self.group_tokens // self.tile  # of a candidate tile
        self._rows = max(VOTERS, self.group_tokens // params.tile_step * layer.group_p)  # voters
        self._per_unit = params.selection_block // params.attended_block
        self._most = params.candidate_blocks
        # Fine blocks at a time: a power of two, as their sizes are.
        keys = math.gcd(self.tuning.fine_keys, params.selection_block)
        self._fine_blocks = max(1, keys // params.attended_block)
        # Layers of any budget share scratch, and so passes: laid out for the largest.
        largest = max(limits.largest_budget, params.budget_blocks)
        self._largest = replace(params, budget_blocks=largest)
        self._linear = params.residual == "linear"
        self._s_rows = layer.state_layout.s_rows
        self._max_pages = -(-limits.max_model_len // params.page_size)
        self._most_units = self._max_pages * params.blocks_per_page
        self._max_units = round_up_units(self._most_units)
        self._max_num_rows = max_num_rows = limits.max_num_rows
        limit = -(-limits.max_num_tokens // self.group_tokens) + 2 * max_num_rows  # candidate tiles of a step
        row = self._max_units * layer.num_kv_heads * layer.page_layout.statistics_stride * 2  # bytes
        self._max_places = max(1, DECODED_BYTES // row) * self._max_units
        per_group = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._group_shapes(1).values())
        self._max_groups = max(1, min(limit, scratch_bytes // per_group))
        # A program of `linear` takes few features: each needs all of a key.
        self._fold_slice = min(16 if self._linear else self.tuning.fold_slice, layer.dp)
        self._fold_slices = triton.cdiv(d, self._fold_slice)
        self._fold_programs = layer.num_sms * (2 if self._linear else 1) // self._fold_slices
        self.planner = Planner(
            params, layer.num_kv_heads, limits, layer.device, max_groups=self._max_groups, max_places=self._max_places,
            fold_programs=self._fold_programs, fold_pages=self.tuning.fold_pages,
        )  # fmt: skip
        self._sparse = limits.max_model_len > self.dense_below
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
        layer, params = self.layer, self.params
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
        folds = self.planner.plan(0, [0, 1], [pages * params.page_size]).folds if pages else None
        if folds is not None:
            self.fold(folds, kv_cache, kv_cache, block_table, state_table)
        # One length for every power of two that the kernels of selection are compiled for.
        positions = [max(self.dense_below, 1)] if self._sparse else []
        units = triton.next_power_of_2(round_up_units(self.dense_below // params.selection_block))
        while self._sparse and units + params.blocks_per_page < self._most_units:
            positions.append(units * params.selection_block + params.page_size)
            units *= 2
        for position in tqdm(positions, desc="Compiling SPLA prefill kernels", disable=len(positions) < 2):
            (step,) = self.planner.plan(0, [0, 1], [position + 1]).passes
            self.run(step, query, kv_cache, kv_cache, block_table, state_table, torch.empty_like(query))
        torch.cuda.synchronize(self.device)

    def _shapes_key(self) -> tuple:
        return tuple(sorted(self._shapes().items()))

    def _shapes(self) -> Shapes:
        folding: Shapes = {"arrivals": ((self._max_num_rows, self.layer.num_kv_heads), torch.int32)}
        if self.params.residual != "none":
            places = max(1, self._fold_programs // self.layer.num_kv_heads)
            sums = places, self.layer.num_kv_heads, self._s_rows + 1, self.layer.head_size
            folding["partial"] = sums, torch.float32
        if not self._sparse:
            return folding
        layout = self.layer.page_layout
        if layout.fp8_statistics:
            decoded = self.layer.num_kv_heads * self._max_places, layout.statistics_stride
            folding["decoded"] = decoded, torch.float16
        return folding | self._group_shapes(self._max_groups)

    def _group_shapes(self, groups: int) -> Shapes:
        """What grows with the candidate tiles of a pass, for so many of them."""
        layer, params = self.layer, self.params
        heads, d, rows = layer.num_kv_heads, layer.head_size, self._rows
        tiles, tokens = groups * self._tiles, groups * self.group_tokens
        # Splits are there only while passes are small: as many programs as there are multiprocessors.
        split = groups * heads + 2 * layer.num_sms
        split_tiles = tokens * heads + 2 * layer.num_sms * self.group_tokens
        shapes: Shapes = {
            "gathered": ((heads * tokens, layer.group, d), layer.cache_dtype),
            "exact": ((heads * tokens, layer.group, d), layer.cache_dtype),
            "lse": ((split, rows), torch.float32),
            "shares": ((groups * heads, self._max_units), torch.float32),
            "table": ((heads * tiles, self._largest.budget_blocks * self._per_unit), torch.int32),
            "used": ((heads * tiles,), torch.int32),
            "count": ((heads * tiles,), torch.int32),
        }
        if self._most:
            most = self._largest.candidate_blocks
            blocks = most * self._per_unit
            shapes |= {
                "candidates": ((groups * heads, 2, most), torch.int32),
                "num": ((groups * heads,), torch.int32),
                "fine": ((groups * heads, blocks + blocks // self._fine_blocks, rows), torch.float32),
                "norm": ((split, rows), torch.float32),
            }
        if params.residual != "none":
            state = groups, heads, self._s_rows + 1, d
            shapes["states"] = state, torch.float32
            shapes["rest"] = (tiles * heads, 2, d, d), layer.cache_dtype
            shapes["rest_sums"] = (tiles * heads, 2, d), torch.float32
        if layer.has_mass:
            shapes["left"] = (tiles * heads, self._max_units), torch.float32
            shapes["mass"] = (split_tiles, layer.group_p), torch.float32
        return shapes

    @property
    def dense_below(self) -> int:
        """Tokens at positions below it attend to everything."""
        return self.planner.dense_below

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch, shared by all layers of one geometry."""
        return sum(x.nbytes for x in self.scratch.values())

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
        if self.params.residual != "none" and (state_cache is None or state_table is None):
            raise ValueError(f"residual {self.params.residual!r} needs a state cache and its table")
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
            if isinstance(launch, Attend):
                assert isinstance(step, Pass)
                own["lse"] = attend_blocks(
                    self.layer, launch.gathered, own["kv"], launch.table, launch.used, step.start_loc, self.tile,
                    launch.exact,
                )  # fmt: skip
                addresses["lse"] = own["lse"].data_ptr()
            else:
                launch(addresses, tensors, stream)

    def bind(
        self, step: Pass | Folds, own: dict[str, torch.Tensor], alike: tuple
    ) -> Iterator[Launch | Beside | Join | Attend]:
        """The launches for all layers of which `alike` is true (`layer_of`), `own` one of them's tensors."""
        if isinstance(step, Folds):
            yield from self._fold_launches(step, own, alike)
            return
        if self.params.residual != "none":
            states = self._state_launch(step, own, alike)
            yield Beside(states, self.device) if self._in_two_streams(step) else states
        yield from self._pass_launches(step, own, alike)

    def _in_two_streams(self, step: Pass) -> bool:
        """Whether states are made beside the scores: to change streams takes 70 us of a processor, which waits for the
        device in long passes only."""
        return step.num_tokens >= SHORT_STEP

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
        }

    def _fold_launches(self, folds: Folds, own: dict[str, torch.Tensor], alike: tuple) -> Iterator[Launch]:
        """Sums over the splits of the pages, and their sum where there are several."""
        layer, tuning = self.layer, self.tuning
        # Launched while the one before still runs.
        chain = {"DEPENDENT": True, "launch_pdl": True} if layer.dependent else {"DEPENDENT": False}
        constants = self._state_constants() | chain
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
        slices = triton.cdiv(self._s_rows, tuning.state_slice) + (not self._linear)
        return Launch(
            prefill_state_kernel,
            (slices, layer.num_kv_heads, step.runs.shape[0]),
            {
                **self._state_arguments(own),
                **self._page_arguments(own),
                "runs_ptr": step.runs,
                "groups_ptr": step.groups,
                "group_state_ptr": step.group_state,
                "states_ptr": self.scratch["states"],
            },
            {
                "SLICES": slices,
                "SLICE": tuning.state_slice,
                "PAGE": layer.params.page_size,
                "TILE": layer.fold_tile,
                "STAGES": tuning.state_stages,
                "PHI": layer.phi,
                "num_warps": tuning.state_warps,
                **self._state_constants(),
            },
            alike,
        )

    def _pass_launches(
        self, step: Pass, own: dict[str, torch.Tensor], alike: tuple
    ) -> Iterator[Launch | Join | Attend]:
        """A pass, from scores to outputs."""
        layer, params, t, pool = self.layer, self.params, self.tuning, self.scratch
        heads, d, dp = layer.num_kv_heads, layer.head_size, layer.dp
        groups, tiles = len(step.groups), len(step.groups) * self._tiles
        max_units = step.max_complete  # of this pass: scratch is laid out anew each time
        kv, query, output = own["kv"], own["query"], own["output"]
        sms, pairs = layer.num_sms, groups * heads
        address = address_unit(kv)
        block, slots = params.attended_block, params.budget_blocks * self._per_unit
        addresses = {"page_stride": kv.stride(0) // address, "head_stride": kv.stride(1) // address}
        queries = {
            "query_ptr": "query",
            "query_token_stride": query.stride(0),
            "query_head_stride": query.stride(1),
        }
        table = {"block_table_ptr": "block_table", "block_table_stride": own["block_table"].stride(0)}
        of_groups = {"groups_ptr": step.groups}
        shape = {"GROUP": layer.group, "GROUP_P": layer.group_p, "D": d, "DP": dp}
        tiling = {"C": self.group_tokens, "T": self.tile}
        voters = {**tiling, "STEP": params.tile_step, "ROWS": self._rows}
        units = {"PAGE": params.page_size, "UNIT": params.selection_block}
        forced = {"FIRST": params.first_blocks, "LAST": params.last_blocks}
        decoded = {
            "decoded_ptr": pool.get("decoded"),
            "group_place_ptr": step.group_place,
            "num_places": step.num_places,
        }
        statistics = {
            "STRIDE": layer.page_layout.statistics_stride,
            "LOG2_UNIT": math.log2(params.selection_block),
            "SELECTOR": layer.gpu_selector,
        }

        def splits(programs: int, steps: int) -> int:
            """Of loops of so many steps: a program for every multiprocessor, if each has two steps or more."""
            return max(1, min(t.most_splits, sms // programs, steps // 2))

        norms = splits(pairs, max_units // t.score_chunk)
        warps = max(4, min(8, self._rows // 16))

        def score(mode: str) -> Launch:
            return Launch(
                prompt_score_kernel,
                (groups, heads, norms),
                {
                    **queries,
                    **table,
                    **of_groups,
                    **decoded,
                    **self._page_arguments(own),
                    "lse_ptr": pool["lse"],
                    "shares_ptr": pool["shares"],
                    "sink_ptr": None if layer.score_sinks is None else "sinks",
                    "max_units": max_units,
                    "num_norms": norms,
                    "scale": layer.scale,
                },
                {
                    **shape,
                    **voters,
                    **units,
                    **statistics,
                    "MODE": MODES[mode],
                    "CHUNK": t.score_chunk,
                    "STAGES": t.score_stages,
                    "num_warps": warps,
                },
                alike,
            )

        formats = layer.page_layout.formats
        if formats is not None:
            yield Launch(
                prompt_statistics_kernel,
                (triton.cdiv(max_units, 16), heads, len(step.runs)),
                {**table, **of_groups, **decoded, **self._page_arguments(own), "runs_ptr": step.runs},
                {
                    **units,
                    "D": d,
                    "STRIDE": layer.page_layout.statistics_stride,
                    "KINDS": tuple(KINDS[kind] for kind, _ in formats),
                    "SIZES": tuple(size for _, size in formats),
                    "SIZE_P": triton.next_power_of_2(max(size for _, size in formats)),
                    "UNITS": 16,
                    "num_warps": 4,
                },
                alike,
            )
        yield score("normalise")
        yield score("share")
        left = pool.get("left")
        last_page = {"last_page": len(kv) - 1}
        units_p = max(16, triton.next_power_of_2(max_units))
        fine_splits = 1
        if self._most:
            yield Launch(
                prompt_candidates_kernel,
                (groups, heads),
                {
                    **table,
                    **of_groups,
                    **addresses,
                    **last_page,
                    "shares_ptr": pool["shares"],
                    "candidates_ptr": pool["candidates"],
                    "num_ptr": pool["num"],
                    "left_ptr": left,
                    "unit_stride": params.selection_block * 2 * d // address,
                    "max_units": max_units,
                },
                {
                    **tiling,
                    **units,
                    **forced,
                    "MOST": self._most,
                    "UNITS_P": units_p,
                    "num_warps": self._select_warps(units_p),
                },
                alike,
            )
            keys = self._fine_blocks * block
            fine_splits = splits(pairs, self._most * params.selection_block // keys)
            yield Launch(
                prompt_fine_kernel,
                (groups, heads, fine_splits),
                {
                    **queries,
                    **of_groups,
                    "kv_ptr": "kv",
                    "candidates_ptr": pool["candidates"],
                    "num_ptr": pool["num"],
                    "fine_ptr": pool["fine"],
                    "norm_ptr": pool["norm"],
                    "scale": layer.scale,
                },
                {
                    **shape,
                    **voters,
                    "ADDRESS": address,
                    "UNIT": params.selection_block,
                    "FINE": block,
                    "MOST": self._most,
                    "KEYS": keys,
                    "STAGES": t.fine_stages,
                    "num_warps": warps,
                },
                alike,
            )
            units_p = max(16, triton.next_power_of_2(self._most))
        of_two_levels = {
            "candidates_ptr": pool.get("candidates"),
            "num_ptr": pool.get("num"),
            "fine_ptr": pool.get("fine"),
            "norm_ptr": pool.get("norm"),
        }
        yield Launch(
            prompt_select_kernel,
            (tiles, heads),
            {
                **table,
                **of_groups,
                **addresses,
                **last_page,
                **of_two_levels,
                "shares_ptr": pool["shares"],
                "sink_ptr": None if layer.sinks is None else "sinks",
                "table_ptr": pool["table"],
                "used_ptr": pool["used"],
                "count_ptr": pool["count"],
                "left_ptr": left,
                "block_stride": block * 2 * d // address,
                "max_units": max_units,
                "splits": fine_splits,
            },
            {
                **voters,
                **units,
                **forced,
                "GROUP": layer.group,
                "GROUP_P": layer.group_p,
                "BLOCK": block,
                "BUDGET": params.budget_blocks,
                "MOST": self._most,
                "SLOTS": slots,
                "UNITS_P": units_p,
                "CURRENT_P": triton.next_power_of_2(params.page_size // block),
                "FINE_BLOCKS": self._fine_blocks,
                "SOME": min(t.select_voters, max(1, self._rows // self._tiles)),
                "TOP_P": layer.top_p,
                "num_warps": max(4 if self._most else 1, self._select_warps(units_p * self._per_unit)),
            },
            alike,
        )
        mass_splits = 1
        if layer.has_mass:
            mass_tokens = max(1, min(self.tile, t.mass_rows // layer.group_p))
            mass_programs = tiles * heads * (self.tile // mass_tokens)
            mass_splits = splits(mass_programs, max_units // t.mass_chunk)
            yield Launch(
                prompt_mass_kernel,
                (tiles * (self.tile // mass_tokens), heads, mass_splits),
                {
                    **queries,
                    **table,
                    **of_groups,
                    **decoded,
                    **self._page_arguments(own),
                    "left_ptr": left,
                    "mass_ptr": pool["mass"],
                    "max_units": max_units,
                    "scale": layer.scale,
                },
                {
                    **shape,
                    **tiling,
                    **units,
                    **statistics,
                    "TM": mass_tokens,
                    "CHUNK": t.mass_chunk,
                    "STAGES": t.mass_stages,
                    "num_warps": t.mass_warps,
                },
                alike,
            )
        gather_tokens = max(1, min(self.group_tokens, 32 // layer.group_p))
        yield Launch(
            prompt_gather_kernel,
            (groups, heads, self.group_tokens // gather_tokens),
            {
                **queries,
                **of_groups,
                "places_ptr": step.places,
                "gathered_ptr": pool["gathered"],
                "num_tokens": step.num_tokens,
            },
            {**shape, "TM": gather_tokens, "num_warps": 4},
            alike,
        )
        total = heads * step.num_tokens
        yield Attend(
            gathered=pool["gathered"][:total],
            table=pool["table"].flatten()[: heads * tiles * slots].view(heads * tiles, slots),
            used=pool["used"][: heads * tiles],
            exact=pool["exact"][:total],
        )
        if params.residual != "none":
            if self._in_two_streams(step):
                yield Join(self.device)
            rest_slice = dp if self._linear else min(dp, t.rest_slice)
            yield Launch(
                prompt_rest_kernel,
                (tiles, heads, dp // rest_slice),
                {
                    **of_groups,
                    "kv_ptr": "kv",
                    "group_state_ptr": step.group_state,
                    "table_ptr": pool["table"],
                    "count_ptr": pool["count"],
                    "state_ptr": pool["states"],
                    "rest_ptr": pool["rest"],
                    "sums_ptr": pool["rest_sums"],
                },
                {
                    **tiling,
                    "D": d,
                    "DP": dp,
                    "ADDRESS": address,
                    "PAGE": params.page_size,
                    "BLOCK": block,
                    "SLOTS": slots,
                    "KEYS": t.rest_keys,
                    "SLICE": rest_slice,
                    "S_ROWS": self._s_rows,
                    "STAGES": t.rest_stages,
                    "PHI": layer.phi,
                    "num_warps": t.rest_warps,
                },
                alike,
            )
        combine_tokens = max(1, min(self.tile, t.combine_rows // layer.group_p))
        yield Launch(
            prompt_combine_kernel,
            (tiles * (self.tile // combine_tokens), heads),
            {
                **queries,
                **of_groups,
                "places_ptr": step.places,
                "count_ptr": pool["count"],
                "mass_ptr": pool.get("mass"),
                "rest_ptr": pool.get("rest"),
                "sums_ptr": pool.get("rest_sums"),
                "exact_ptr": pool["exact"],
                "lse_ptr": "lse",
                "sink_ptr": None if layer.sinks is None else "sinks",
                "gain_ptr": "gain",
                "exact_weight_ptr": "exact_weight",
                "tail_weight_ptr": "tail_weight",
                "output_ptr": "output",
                "output_token_stride": output.stride(0),
                "output_head_stride": output.stride(1),
                "num_tokens_of_pass": step.num_tokens,
                "mass_splits": mass_splits,
                "scale": layer.scale,
                "residual_scale": params.residual_scale,
                "norm_eps": params.rms_norm_eps,
            },
            {
                **shape,
                **tiling,
                **units,
                "TM": combine_tokens,
                "BLOCK": block,
                "FEATURES": dp if self._linear else min(dp, t.combine_features),
                "RESIDUAL": RESIDUAL_CODES[params.residual],
                "PHI": layer.phi,
                "DOUBLE_NORM": params.combine == "double_rmsnorm",
                "num_warps": t.combine_warps,
            },
            alike,
        )

    def _select_warps(self, blocks: int) -> int:
        return min(16, max(1, blocks // self.tuning.select_blocks))
