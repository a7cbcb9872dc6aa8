"""What the kernels of a layer's prompts are laid out for: tiles, voters and launch shapes."""

import math
from dataclasses import dataclass, replace

import triton

from ..layer import GpuLayer
from .plan import prompt_parameters

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


def tuning_of(layer: GpuLayer) -> PrefillTuning:
    """The launch shapes of a layer."""
    large = layer.head_size > 128
    tuning = NARROW if layer.narrow else SMALL if large else PrefillTuning()
    if layer.tensor_memory and large:
        tuning = replace(tuning, fold_slice=64)
    if layer.selector.sets_per_block > 1:
        chunk = 16 if layer.narrow and large else 32
        tuning = replace(tuning, score_chunk=chunk, mass_chunk=chunk)
    return tuning


class PrefillSizes:
    """Sizes of one layer.

    Args:
        layer: Which layer.
        tuning: Launch shapes; None for those of the layer.

    Attributes:
        params: What prompt tokens compute.
        tuning: Launch shapes.
        tiles: Of a candidate tile.
        voters: Rows of a matrix of a candidate tile's scored tokens, heads of a group and padding included.
        per_unit: Attended blocks of a selection block.
        candidates: Selection blocks, of two levels; 0 with one.
        fine_blocks: Fine blocks at a time.
        fine_keys: Their keys.
        linear: Whether the residual is linear attention.
        state_rows: Rows of a state's S.
        fold_slice: Features of a program that sums pages.
        fold_slices: Such programs of a split.
        fold_programs: Splits times kv heads that run at a time.
    """

    def __init__(self, layer: GpuLayer, tuning: PrefillTuning | None) -> None:
        self.params = params = prompt_parameters(layer.params, layer.group)
        self.tuning = tuning or tuning_of(layer)
        self.tiles = params.coarse_tile // params.tile
        self.voters = max(VOTERS, params.coarse_tile // params.tile_step * layer.group_p)
        self.per_unit = params.selection_block // params.attended_block
        self.candidates = params.candidate_blocks
        # A power of two, as the sizes of fine blocks are.
        keys = math.gcd(self.tuning.fine_keys, params.selection_block)
        self.fine_blocks = max(1, keys // params.attended_block)
        self.fine_keys = self.fine_blocks * params.attended_block
        self.linear = params.residual == "linear"
        self.state_rows = layer.state_layout.s_rows
        # A program of `linear` takes few features: each needs all of a key.
        self.fold_slice = min(16 if self.linear else self.tuning.fold_slice, layer.dp)
        self.fold_slices = triton.cdiv(layer.head_size, self.fold_slice)
        self.fold_programs = layer.num_sms * (2 if self.linear else 1) // self.fold_slices

    @property
    def voter_warps(self) -> int:
        """Of a program that multiplies with the voters."""
        return max(4, min(8, self.voters // 16))

    def select_warps(self, blocks: int) -> int:
        """Of a program that chooses among so many blocks."""
        return min(16, max(1, blocks // self.tuning.select_blocks))
