"""How a decode step is cut for the GPU: sizes that all its launches share, and launch shapes by the size of a batch.

Everything here is a function of shapes, never of lengths, so that a step can be captured in a CUDA graph.
"""

import math
from dataclasses import dataclass, replace

import triton

from ...interface import Limits
from ..layer import GpuLayer

SELECT_ELEMENTS = 32768
"""Scores that selection keeps in registers; more are gone through in pieces."""


@dataclass(frozen=True)
class DecodeSizes:
    """What the launches of all batches are specialised for."""

    max_pages: int  # of a sequence
    max_units: int  # selection blocks of a sequence
    units_p: int  # the same, padded to a power of two
    width: int  # units that selection goes through at a time; units_p where all of them fit
    columns: int  # heads of a group, padded for the tensor cores (C of the kernels)
    attend_n: int  # columns with those of the residual (N of the kernels)
    slice_size: int  # features of a slice of the state
    slices: int  # slices of the state; 0 without a residual
    write_mass: bool  # masses are other numbers than scores
    budget: int  # blocks that a token attends to: selection blocks, with two levels fine blocks
    largest_budget: int  # of all layers that share scratch
    table: int  # entries of a token's page table: blocks of a row up to which all of it is attended to
    largest_table: int  # of all layers that share scratch
    per_unit: int  # fine blocks a selection block; 1 with one level
    candidates: int  # selection blocks among which the fine level chooses; 0 with one level
    largest_candidates: int  # of all layers that share scratch
    fine_p: int  # fine blocks of the candidates, padded to a power of two
    fine_width: int  # as `width`, of fine blocks

    @classmethod
    def of(cls, layer: GpuLayer, limits: Limits) -> "DecodeSizes":
        """The sizes of a layer."""
        params = layer.params
        has_residual = params.residual != "none"
        max_pages = -(-limits.max_model_len // params.page_size)
        max_units = max_pages * params.blocks_per_page
        units_p = triton.next_power_of_2(max_units)
        # `wgmma` is chosen for matrix products of 16 columns.
        columns = max(4 if has_residual else 16, layer.group_p)
        slice_size = min(32, layer.dp)
        largest_budget = max(limits.largest_budget, params.budget_blocks)
        per_unit = params.selection_block // params.attended_block
        largest = replace(params, budget_blocks=largest_budget)
        candidates = min(params.candidate_blocks, max_units)
        fine_p = triton.next_power_of_2(max(1, candidates * per_unit))
        return cls(
            max_pages=max_pages,
            max_units=max_units,
            units_p=units_p,
            width=select_width(units_p, layer),
            columns=columns,
            attend_n=4 * columns if has_residual else columns,
            slice_size=slice_size,
            slices=-(-layer.head_size // slice_size) if has_residual else 0,
            write_mass=layer.own_mass,
            budget=params.budget_blocks * per_unit,
            largest_budget=largest_budget * per_unit,
            table=params.whole_blocks * per_unit,
            largest_table=largest.whole_blocks * per_unit,
            per_unit=per_unit,
            candidates=candidates,
            largest_candidates=min(largest.candidate_blocks, max_units),
            fine_p=fine_p,
            fine_width=select_width(fine_p, layer),
        )


@dataclass(frozen=True)
class Tuning:
    """Launch shapes of one batch size."""

    score_splits: int
    attend_splits: int
    chunk: int = 64  # selection blocks a scoring step
    score_stages: int = 3
    score_warps: int = 4
    tile: int = 64  # tokens an attention step
    attend_stages: int = 3
    attend_warps: int = 4
    mass_splits: int = 1  # programs that sum the mass of the blocks left out
    select_warps: int = 8
    score_registers: int | None = 168  # cap, for more programs on a multiprocessor
    fine_splits: int = 1  # of the candidates of a (token, kv head)
    fine_tile: int = 64  # tokens a step of these
    fine_stages: int = 3  # for more programs on a multiprocessor
    fine_warps: int = 4
    fine_select_warps: int = 4


def choose_tuning(layer: GpuLayer, sizes: DecodeSizes, num_rows: int, query_len: int, budget: int) -> Tuning:
    """Launch shapes for `num_rows` rows of up to `query_len` query tokens; `budget` in blocks that are attended to."""
    params = layer.params
    chunk = 64 if layer.dp <= 128 else 32
    chunk //= layer.selector.sets_per_block
    tile = 64 if layer.dp <= 128 else 32
    pairs = num_rows * layer.num_kv_heads
    score_splits = max(1, min(-(-sizes.max_units // chunk), _power(512 / pairs), 32))
    # Where statistics are bytes a long row takes twice as many a step; with more columns registers would spill.
    few_columns = layer.group_p * query_len <= 8
    wide = layer.page_layout.fp8_statistics and few_columns and sizes.max_units >= 32 * chunk * score_splits
    if wide:
        chunk *= 2
    # More splits than tiles would be idle; past 16, merging costs more than reading gains.
    tiles = -(-budget * params.attended_block // tile)
    pairs *= query_len
    attend_splits = min(tiles, 16, max(_power(128 / pairs), 2 if pairs <= 256 else 1))
    candidates = replace(params, budget_blocks=budget // sizes.per_unit).candidate_blocks
    tokens = min(candidates, sizes.max_units) * params.selection_block
    # What a step of a sketch costs beside its tokens is a third of it: mean keys, addresses, barriers.
    fine_tile = 128 if params.has_sketch and layer.dp <= 128 else Tuning.fine_tile
    candidate_tiles = -(-tokens // fine_tile) if sizes.candidates else 1
    return Tuning(
        score_splits,
        attend_splits,
        chunk=chunk,
        score_stages=2 if layer.narrow and not (few_columns and layer.dp <= 128) else Tuning.score_stages,
        tile=tile,
        mass_splits=min(8, _power(64 / pairs)),
        select_warps=_select_warps(min(sizes.units_p * layer.group_p, SELECT_ELEMENTS)),
        score_registers=None if wide else Tuning.score_registers,
        fine_tile=fine_tile,
        fine_splits=max(1, min(candidate_tiles, _power(512 / pairs), 32)),
        fine_select_warps=_select_warps(min(sizes.fine_p * layer.group_p, SELECT_ELEMENTS)),
    )


def select_width(units_p: int, layer: GpuLayer) -> int:
    """Units that selection goes through at a time; `units_p`, a power of two, where all of them fit."""
    return min(units_p, max(16, SELECT_ELEMENTS // layer.group_p))


def _select_warps(num_scores: int) -> int:
    """Warps that select by so many scores at a time."""
    return min(32, max(4, num_scores // 1024))


def _power(x: float) -> int:
    """The nearest power of two, at least 1."""
    return 1 << max(0, round(math.log2(max(x, 1.0))))
