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
from dataclasses import replace
from typing import ClassVar

import torch
import triton
from tqdm import tqdm

from ...interface import Limits
from ..launch import Beside, Join, Launch, current_stream, layer_of
from ..layer import GpuLayer
from ..scratch import Shapes, shared_scratch
from .attend import Attend, attend_blocks
from .bound import BoundLayer
from .pass_launches import PassLaunches
from .plan import Folds, Pass, Planner, round_up_units
from .sizes import PrefillSizes, PrefillTuning
from .state_launches import StateLaunches

SCRATCH_BYTES = 1 << 30
"""What a pass may take, beside what FlashAttention allocates."""
DECODED_BYTES = 1 << 26
"""What the decoded statistics of a pass's rows may take, if it is enough for one row."""


class PrefillPasses:
    """Sparse prefill of one layer.

    Args:
        layer: Which layer.
        limits: The largest step; where all tokens of a sequence attend to everything, no scratch is taken.
        tuning: Launch shapes.
        scratch_bytes: What a pass may take.

    Attributes:
        sizes: What its kernels are laid out for.
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
        self.sizes = sizes = PrefillSizes(layer, tuning)
        self.params = params = sizes.params
        # Layers of any budget share scratch, and so passes: laid out for the largest.
        largest = max(limits.largest_budget, params.budget_blocks)
        self._largest = replace(params, budget_blocks=largest)
        self._max_pages = -(-limits.max_model_len // params.page_size)
        self._most_units = self._max_pages * params.blocks_per_page
        self._max_units = round_up_units(self._most_units)
        self._max_num_rows = limits.max_num_rows
        limit = -(-limits.max_num_tokens // params.coarse_tile) + 2 * limits.max_num_rows  # candidate tiles of a step
        row = self._max_units * layer.num_kv_heads * layer.page_layout.statistics_stride * 2  # bytes
        max_places = max(1, DECODED_BYTES // row) * self._max_units
        per_group = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._group_shapes(1).values())
        max_groups = max(1, min(limit, scratch_bytes // per_group))
        self.planner = Planner(
            params, layer.num_kv_heads, limits, layer.device, max_groups=max_groups, max_places=max_places,
            fold_programs=sizes.fold_programs, fold_pages=sizes.tuning.fold_pages,
        )  # fmt: skip
        self._sparse = limits.max_model_len > self.dense_below
        self.scratch = shared_scratch(self._shapes(), layer.device, layer.scratch_pool)
        # Layers of one geometry launch the same kernels.
        weights = layer.gain, *layer.norm_weights
        named = dict(zip(("gain", "exact_weight", "tail_weight"), weights, strict=True))
        self.weights = named if layer.sinks is None else named | {"sinks": layer.sinks}
        geometry = (str(layer.device), self._shapes_key(), params, sizes.tuning, layer.scale, layer.cache_dtype,
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
            places = max(1, self.sizes.fold_programs // self.layer.num_kv_heads)
            sums = places, self.layer.num_kv_heads, self.sizes.state_rows + 1, self.layer.head_size
            folding["partial"] = sums, torch.float32
        if not self._sparse:
            return folding
        layout = self.layer.page_layout
        if layout.fp8_statistics:
            decoded = self.layer.num_kv_heads * self.planner.max_places, layout.statistics_stride
            folding["decoded"] = decoded, torch.float16
        return folding | self._group_shapes(self.planner.max_groups)

    def _group_shapes(self, groups: int) -> Shapes:
        """What grows with the candidate tiles of a pass, for so many of them."""
        layer, params = self.layer, self.params
        heads, d, rows = layer.num_kv_heads, layer.head_size, self.sizes.voters
        tiles, tokens = groups * self.sizes.tiles, groups * params.coarse_tile
        # Splits are there only while passes are small: as many programs as there are multiprocessors.
        split = groups * heads + 2 * layer.num_sms
        split_tiles = tokens * heads + 2 * layer.num_sms * params.coarse_tile
        shapes: Shapes = {
            "gathered": ((heads * tokens, layer.group, d), layer.cache_dtype),
            "exact": ((heads * tokens, layer.group, d), layer.cache_dtype),
            "lse": ((split, rows), torch.float32),
            "shares": ((groups * heads, self._max_units), torch.float32),
            "table": ((heads * tiles, self._largest.budget_blocks * self.sizes.per_unit), torch.int32),
            "used": ((heads * tiles,), torch.int32),
            "count": ((heads * tiles,), torch.int32),
        }
        if self.sizes.candidates:
            most = self._largest.candidate_blocks
            blocks = most * self.sizes.per_unit
            shapes |= {
                "candidates": ((groups * heads, 2, most), torch.int32),
                "num": ((groups * heads,), torch.int32),
                "fine": ((groups * heads, blocks + blocks // self.sizes.fine_blocks, rows), torch.float32),
                "norm": ((split, rows), torch.float32),
            }
        if params.residual != "none":
            state = groups, heads, self.sizes.state_rows + 1, d
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
                    self.layer, launch.gathered, own["kv"], launch.table, launch.used, step.start_loc, self.params.tile,
                    launch.exact,
                )  # fmt: skip
                addresses["lse"] = own["lse"].data_ptr()
            else:
                launch(addresses, tensors, stream)

    def bind(
        self, step: Pass | Folds, own: dict[str, torch.Tensor], alike: tuple
    ) -> Iterator[Launch | Beside | Join | Attend]:
        """The launches for all layers of which `alike` is true (`layer_of`), `own` one of them's tensors."""
        bound = BoundLayer(self.layer, self.sizes, self.scratch, own, alike)
        states = StateLaunches(bound)
        if isinstance(step, Folds):
            yield from states.of_rows(step)
            return
        if self.params.residual != "none":
            launch = states.at_every_page(step)
            yield Beside(launch, self.device) if step.in_two_streams else launch
        yield from PassLaunches(bound, step)
