"""The launches of states: those of a pass's pages, and of rows that attend to everything (`state.py`)."""

from collections.abc import Iterator
from typing import Any

import torch
import triton

from ...layout import STATE_MAGIC
from ..launch import Launch
from .bound import BoundLayer
from .plan import Folds, Pass
from .state import fold_pages_kernel, fold_sum_kernel, prefill_state_kernel


class StateLaunches:
    """Launches for all layers that are alike, `bound` one of them."""

    def __init__(self, bound: BoundLayer) -> None:
        self._bound, layer, own = bound, bound.layer, bound.own
        kv_int, state = own["kv"].view(torch.int32), own["state"].view(torch.float32)
        # Strides are in int32 words of pages and in float32 of state blocks.
        self._states: dict[str, Any] = {
            "kv_int_ptr": "kv_int",
            "state_ptr": "state",
            "state_int_ptr": "state_int",
            "block_table_ptr": "block_table",
            "state_table_ptr": "state_table",
            "arrivals_ptr": bound.scratch["arrivals"],
            "int_page_stride": kv_int.stride(0),
            "int_head_stride": kv_int.stride(1),
            "block_stride": state.stride(0),
            "block_head_stride": state.stride(1),
            "block_table_stride": own["block_table"].stride(0),
            "state_table_stride": own["state_table"].stride(0),
        }
        self._constants: dict[str, Any] = {
            "MAGIC": STATE_MAGIC,
            "STAMP_WORD": layer.page_layout.stamp_word,
            "NUM_BLOCKS": layer.state_layout.num_blocks,
            "BODY": layer.state_layout.rows_per_block - 1,
            "D": layer.head_size,
            "DP": layer.dp,
            "S_ROWS": bound.sizes.state_rows,
        }
        self._page_sizes: dict[str, Any] = {"PAGE": layer.params.page_size, "TILE": layer.fold_tile, "PHI": layer.phi}

    def at_every_page(self, step: Pass) -> Launch:
        """States at every page of a pass."""
        bound, layer, sizes, tuning = self._bound, self._bound.layer, self._bound.sizes, self._bound.sizes.tuning
        slices = triton.cdiv(sizes.state_rows, tuning.state_slice) + (not sizes.linear)
        return bound.launch(
            prefill_state_kernel,
            (slices, layer.num_kv_heads, step.runs.shape[0]),
            {
                **bound.pages,
                **self._states,
                "runs_ptr": step.runs,
                "groups_ptr": step.groups,
                "group_state_ptr": step.group_state,
                "states_ptr": bound.scratch["states"],
            },
            {
                **self._constants,
                **self._page_sizes,
                "SLICES": slices,
                "SLICE": tuning.state_slice,
                "STAGES": tuning.state_stages,
                "num_warps": tuning.state_warps,
            },
        )

    def of_rows(self, folds: Folds) -> Iterator[Launch]:
        """Sums over the splits of rows' pages, and their sum where there are several."""
        bound, layer, sizes, tuning = self._bound, self._bound.layer, self._bound.sizes, self._bound.sizes.tuning
        # Launched while the one before still runs.
        chain = {"DEPENDENT": True, "launch_pdl": True} if layer.dependent else {"DEPENDENT": False}
        arguments = {**self._states, "folds_ptr": folds.rows, "partial_ptr": bound.scratch["partial"]}
        yield bound.launch(
            fold_pages_kernel,
            (sizes.fold_slices, layer.num_kv_heads, folds.items.shape[0]),
            {**arguments, **bound.pages, "items_ptr": folds.items},
            {
                **self._constants,
                **self._page_sizes,
                **chain,
                "SLICES": sizes.fold_slices,
                "SLICE": sizes.fold_slice,
                "STAGES": tuning.fold_stages,
                "num_warps": 8 if sizes.fold_slice == 128 else 4,
            },
        )
        if folds.most_splits == 1:
            return
        slices = triton.cdiv(sizes.state_rows, tuning.fold_sum_slice)
        yield bound.launch(
            fold_sum_kernel,
            (slices, layer.num_kv_heads, folds.rows.shape[0]),
            arguments,
            {**self._constants, **chain, "SLICES": slices, "SLICE": tuning.fold_sum_slice, "num_warps": 4},
        )
