"""A layer that attends to everything beside layers of SPLA on a GPU: FlashAttention over the same pages."""

import itertools
from collections.abc import Hashable
from dataclasses import dataclass

import torch

from ...algorithm.parameters import SplaParameters
from ..interface import Layer, Limits, Plan, Step
from .checks import refuse_what_does_not_fit
from .dense import DenseRows, attend_densely
from .layer import GpuLayer
from .store import Store


@dataclass(frozen=True)
class DensePlan(Plan):
    """One step's geometry."""

    rows: list[DenseRows]  # decode rows, then prefill rows, where there are any
    block_table: torch.Tensor  # [rows, max_pages] int32


class GpuDenseAttention:
    """`PagedAttention` that selects nothing and has no state. Its pages are as `GpuAttention`'s, statistics included.

    It records no lengths of the host but the most tokens of a row, so that CUDA graphs replay it.

    Args:
        params: What the other layers compute.
        layer: Which layer this is.
        limits: The largest step.
        device: Where the cache lives.
    """

    scratch_bytes = 0
    tokens_read = None
    plan_key: Hashable = "dense"

    def __init__(self, params: SplaParameters, layer: Layer, limits: Limits, device: torch.device) -> None:
        self.layer = GpuLayer(params, layer, device)
        self.page_layout, self.state_layout = self.layer.page_layout, self.layer.state_layout
        self.prefill_dense_below = self._max_model_len = limits.max_model_len
        store = Store(self.layer)
        self.update_cache = store.update_cache
        with refuse_what_does_not_fit(layer.head_size, self.layer.capability):
            store.warm_up()

    def plan(self, step: Step) -> DensePlan:
        """See `PagedAttention.plan`."""
        return plan_dense(step, self._max_model_len)

    def run(
        self,
        plan: DensePlan,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        state_cache: torch.Tensor | None,
        state_table: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """See `PagedAttention.run`. The states are not looked at."""
        for rows in plan.rows:
            attend_densely(self.layer, rows, query, kv_cache, plan.block_table, output)


def plan_dense(step: Step, max_model_len: int) -> DensePlan:
    """Decode rows and prefill rows in a call of their own each."""
    n, starts, lens, rows = step.num_decodes, step.prefill_starts, step.prefill_lens, []
    if n:
        rows.append(
            DenseRows(
                first_token=0,
                num_tokens=step.num_decode_tokens,
                first_row=0,
                start_loc=step.query_start_loc[: n + 1],
                seq_lens=step.seq_lens[:n],
                max_query_len=step.decode_query_len,
                max_seq_len=max_model_len,
            )
        )
    if lens:
        end = n + len(lens)
        rows.append(
            DenseRows(
                first_token=starts[0],
                num_tokens=starts[-1] - starts[0],
                first_row=n,
                start_loc=step.query_start_loc[n : end + 1] - starts[0],
                seq_lens=step.seq_lens[n:end],
                max_query_len=max(b - a for a, b in itertools.pairwise(starts)),
                max_seq_len=max(lens),
            )
        )
    return DensePlan(rows, step.block_table)
