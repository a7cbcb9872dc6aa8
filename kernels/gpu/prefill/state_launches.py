"""The launches of states: those of a pass's pages, and of rows that attend to everything (`state.py`)."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton

from ...layout import STATE_MAGIC
from ..launch import Launch
from ..layer import GpuLayer
from .plan import Folds, Pass
from .sizes import PrefillSizes
from .state import fold_pages_kernel, fold_sum_kernel, prefill_state_kernel


class StateLaunches:
    """Launches for all layers that are alike.

    Args:
        layer: One of them.
        sizes: Its sizes.
        scratch: Its scratch.
        own: Its tensors.
        alike: What is equal for layers that may share a launch.
    """

    def __init__(
        self,
        layer: GpuLayer,
        sizes: PrefillSizes,
        scratch: Mapping[str, torch.Tensor],
        own: Mapping[str, torch.Tensor],
        alike: tuple,
    ) -> None:
        self._layer, self._sizes, self._scratch, self._alike = layer, sizes, scratch, alike
        kv, kv_int, state = own["kv"], own["kv"].view(torch.int32), own["state"].view(torch.float32)
        self._pages: dict[str, Any] = {
            "kv_ptr": "kv",
            "page_stride": kv.stride(0),
            "head_stride": kv.stride(1),
            "last_page": len(kv) - 1,
        }
        # Strides are in int32 words of pages and in float32 of state blocks.
        self._states: dict[str, Any] = {
            "kv_int_ptr": "kv_int",
            "state_ptr": "state",
            "state_int_ptr": "state_int",
            "block_table_ptr": "block_table",
            "state_table_ptr": "state_table",
            "arrivals_ptr": scratch["arrivals"],
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
            "S_ROWS": sizes.state_rows,
        }
        self._page_sizes: dict[str, Any] = {"PAGE": layer.params.page_size, "TILE": layer.fold_tile, "PHI": layer.phi}

    def at_every_page(self, step: Pass) -> Launch:
        """States at every page of a pass."""
        layer, sizes, tuning = self._layer, self._sizes, self._sizes.tuning
        slices = triton.cdiv(sizes.state_rows, tuning.state_slice) + (not sizes.linear)
        return Launch(
            prefill_state_kernel,
            (slices, layer.num_kv_heads, step.runs.shape[0]),
            {
                **self._pages,
                **self._states,
                "runs_ptr": step.runs,
                "groups_ptr": step.groups,
                "group_state_ptr": step.group_state,
                "states_ptr": self._scratch["states"],
            },
            {
                **self._constants,
                **self._page_sizes,
                "SLICES": slices,
                "SLICE": tuning.state_slice,
                "STAGES": tuning.state_stages,
                "num_warps": tuning.state_warps,
            },
            self._alike,
        )

    def of_rows(self, folds: Folds) -> Iterator[Launch]:
        """Sums over the splits of rows' pages, and their sum where there are several."""
        layer, sizes, tuning = self._layer, self._sizes, self._sizes.tuning
        # Launched while the one before still runs.
        chain = {"DEPENDENT": True, "launch_pdl": True} if layer.dependent else {"DEPENDENT": False}
        arguments = {**self._states, "folds_ptr": folds.rows, "partial_ptr": self._scratch["partial"]}
        yield Launch(
            fold_pages_kernel,
            (sizes.fold_slices, layer.num_kv_heads, folds.items.shape[0]),
            {**arguments, **self._pages, "items_ptr": folds.items},
            {
                **self._constants,
                **self._page_sizes,
                **chain,
                "SLICES": sizes.fold_slices,
                "SLICE": sizes.fold_slice,
                "STAGES": tuning.fold_stages,
                "num_warps": 8 if sizes.fold_slice == 128 else 4,
            },
            self._alike,
        )
        if folds.most_splits == 1:
            return
        slices = triton.cdiv(sizes.state_rows, tuning.fold_sum_slice)
        yield Launch(
            fold_sum_kernel,
            (slices, layer.num_kv_heads, folds.rows.shape[0]),
            arguments,
            {**self._constants, **chain, "SLICES": slices, "SLICE": tuning.fold_sum_slice, "num_warps": 4},
            self._alike,
        )
