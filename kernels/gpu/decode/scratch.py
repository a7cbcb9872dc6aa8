"""Buffers between the launches of a decode step."""

import itertools
from collections.abc import Callable

import torch
import triton

from ...interface import Limits
from ..layer import GpuLayer
from ..scratch import Shapes, shared_scratch
from .tuning import DecodeSizes, Tuning, select_width


def decode_scratch(
    layer: GpuLayer, sizes: DecodeSizes, limits: Limits, tuning: Callable[[int, int, int], Tuning]
) -> dict[str, torch.Tensor]:
    """Buffers for every step within `limits`, by name; `tuning` gives the launch shapes for rows, query tokens of a row
    and budget."""
    rows, group, kv_heads, units = limits.max_num_rows, layer.group_p, layer.num_kv_heads, sizes.max_units
    tokens, budget = rows * limits.max_query_len, sizes.largest_budget
    batches = itertools.product(range(1, rows + 1), range(1, limits.max_query_len + 1))
    tunings = [(n * query_len, tuning(n, query_len, budget)) for n, query_len in batches]
    parts = max(n * kv_heads * shapes.attend_splits for n, shapes in tunings)
    lse = max(n * shapes.score_splits for n, shapes in tunings)
    mass = max(n * shapes.mass_splits for n, shapes in tunings)
    fine_lse = max(n * shapes.fine_splits for n, shapes in tunings)
    slices = max(1, sizes.slices)
    f32, i32 = torch.float32, torch.int32
    two_levels: Shapes = {}
    if sizes.candidates:
        candidates, fine = sizes.largest_candidates, sizes.largest_candidates * sizes.per_unit
        fine_p = triton.next_power_of_2(fine)
        two_levels = {
            "candidates": ((tokens, kv_heads, candidates), i32),
            "candidate_units": ((tokens, kv_heads, candidates), i32),
            "candidate_count": ((tokens, kv_heads), i32),
            "fine_scores": ((tokens, kv_heads, fine, group), f32),
            "fine_lse": ((fine_lse, kv_heads, group), f32),  # [tokens, G, fine splits, GROUP_P]
            "fine_grouped": ((tokens, kv_heads, fine) if select_width(fine_p, layer) < fine_p else (1,), f32),
        }
    return shared_scratch(
        {
            "scores": ((tokens, kv_heads, units, group), f32),
            "mass": ((tokens, kv_heads, units, group) if sizes.write_mass else (1,), f32),
            "lse": ((lse, kv_heads, group), f32),  # [tokens, G, score splits, GROUP_P]
            "grouped": ((tokens, kv_heads, units) if sizes.width < sizes.units_p else (1,), f32),
            "table": ((tokens, kv_heads, sizes.largest_table), i32),  # layers with smaller budgets take the beginning
            "count": ((tokens, kv_heads), i32),
            "flags": ((tokens, kv_heads, units), torch.int8),
            **two_levels,
            "part_out": ((parts, sizes.attend_n, layer.dp), f32),
            "part_sum": ((parts, 2, sizes.attend_n), f32),
            "rest_mass": ((mass, kv_heads, group), f32),  # [tokens, G, MASS_SPLITS, GROUP_P]
            "read": ((tokens, kv_heads, slices, group, layer.dp), f32),
            "read_z": ((tokens, kv_heads, slices, group), f32),
            "read_v": ((tokens, kv_heads, layer.dp), f32),
            "fold_arrivals": ((rows, kv_heads), i32),
            "attend_arrivals": ((tokens, kv_heads), i32),
        },
        layer.device,
        layer.scratch_pool,
    )
