"""SPLA over paged memory on a GPU: decode rows, sparse prefill tokens, and FlashAttention for the prefill tokens that
attend to everything."""

from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from ...algorithm.combine import rms_norm
from ...algorithm.parameters import SplaParameters
from ...algorithm.selectors import get_selector
from ..interface import Layer, Limits, Plan, Pool, Step
from .checks import refuse_what_does_not_fit
from .decode.steps import DecodeSteps
from .dense import attend_densely
from .layer import GpuLayer
from .prefill.passes import PrefillPasses
from .prefill.plan import PrefillPlan
from .store import Store

DENSE_BELOW = {(64, 1): 8192, (64, 2): 10240, (16, 1): 12288}
"""Position from which a sparse prompt token costs less than a dense one at a budget of 2048 tokens, by tokens of a
selection block (or more) and by its sets of vectors (2: `km2-rem`): measured on an H200 (`benchmarks/NOTES.md`)."""


def default_dense_below(params: SplaParameters, max_model_len: int) -> int:
    """Where prompt tokens begin to select unless the user says: what a sparse token costs grows with the budget.

    Never in blocks of less than 16, nor with two sets of vectors in blocks of less than 64, which were not measured.
    """
    sets = get_selector(params.selector).sets_per_block
    block = max((size for size, of in DENSE_BELOW if of == sets and size <= params.selection_block), default=0)
    if block == 0:
        return max_model_len
    return DENSE_BELOW[block, sets] * max(params.budget_tokens, 2048) // 2048


@dataclass(frozen=True)
class GpuPlan(Plan):
    """One step's geometry: decode rows stand before prefill rows. Lengths on the device are read by no one here."""

    step: Step
    prefill: PrefillPlan | None


class GpuAttention:
    """`PagedAttention` of one layer on a GPU.

    Args:
        params: What to compute.
        layer: Of which layer.
        limits: The largest step.
        device: Where the cache lives.
        executor: What attends to the selected pages in decode, see `SplaOptions`.
        scratch_pool: Where scratch lies, see `dispatch.make`.
    """

    tokens_read = None

    def __init__(
        self,
        params: SplaParameters,
        layer: Layer,
        limits: Limits,
        device: torch.device,
        executor: str = "spla",
        scratch_pool: Pool = nullcontext,
    ) -> None:
        self.layer = GpuLayer(params, layer, device, scratch_pool)
        self.page_layout, self.state_layout = self.layer.page_layout, self.layer.state_layout
        store = Store(self.layer)
        self.update_cache = store.update_cache
        self.steps = DecodeSteps(self.layer, limits, executor=executor)
        self.passes = PrefillPasses(self.layer, limits)
        with refuse_what_does_not_fit(layer.head_size, self.layer.capability):
            for part in (store, self.steps, self.passes):
                part.warm_up()

    @property
    def prefill_dense_below(self) -> int:
        """See `PagedAttention.prefill_dense_below`."""
        return self.passes.dense_below

    @property
    def scratch_bytes(self) -> int:
        """See `PagedAttention.scratch_bytes`."""
        return self.steps.scratch_bytes + self.passes.scratch_bytes

    @property
    def plan_key(self) -> Hashable:
        """See `PagedAttention.plan_key`. Passes are as large as the scratch, which all layers share, allows."""
        params = self.passes.params
        return self.passes.dense_below, params.tile, params.coarse_tile

    def plan(self, step: Step) -> GpuPlan:
        """See `PagedAttention.plan`."""
        prefill = None
        if step.prefill_lens:
            prefill = self.passes.planner.plan(step.num_decodes, step.prefill_starts, step.prefill_lens)
        return GpuPlan(step, prefill)

    def run(
        self,
        plan: GpuPlan,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        state_cache: torch.Tensor | None,
        state_table: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """See `PagedAttention.run`."""
        step = plan.step
        n, tokens = step.num_decodes, step.num_decode_tokens
        if n:
            self.steps.decode(
                query[:tokens],
                kv_cache,
                state_cache,
                step.query_start_loc[: n + 1],
                step.seq_lens[:n],
                step.block_table[:n],
                None if state_table is None else state_table[:n],
                output[:tokens],
                step.decode_query_len,
                steady=plan.prefill is None,
            )
        if plan.prefill is not None:
            run_prefill(self.passes, plan.prefill, query, kv_cache, state_cache, step.block_table, state_table, output)


def run_prefill(
    passes: PrefillPasses,
    plan: PrefillPlan,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    state_cache: torch.Tensor | None,
    block_table: torch.Tensor,
    state_table: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """The prefill rows of a step of one layer: their states, their dense tokens, their sparse ones."""
    layer = passes.layer
    # At once: the tokens that were just stored are still in the second-level cache.
    if plan.folds is not None and state_cache is not None and state_table is not None:
        passes.fold(plan.folds, kv_cache, state_cache, block_table, state_table)
    for rows in plan.dense:
        attend_densely(layer, rows, query, kv_cache, block_table, output)
        if layer.params.combine == "double_rmsnorm":
            exact = output[rows.first_token : rows.first_token + rows.num_tokens]
            # There is no tail where nothing is left out.
            exact.copy_(rms_norm(exact.float(), layer.norm_weights[0], layer.params.rms_norm_eps))
    for part in plan.passes:
        passes.run(part, query, kv_cache, state_cache, block_table, state_table, output)
