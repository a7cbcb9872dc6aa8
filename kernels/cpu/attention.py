"""SPLA over paged memory on a CPU: `VectorisedAttention` with its two hot paths compiled.

Single query tokens, of decode rows and of the sparse part of prefill rows alike, go through `compiled`. Query
tokens of a prefill whose every block fits into the budget go through vLLM's own dense CPU kernel, so that a budget
which holds everything gives the very numbers of CPU_ATTN. Parameters that are not compiled (feature maps, selectors of
a user's own, double RMSNorm) stay with the tensor operations.
"""

from dataclasses import dataclass, replace

import numba
import numpy as np
import torch
from numba.np.ufunc import parallel
from numpy.typing import NDArray

from ...algorithm.parameters import SplaParameters
from ...algorithm.selectors import get_selector
from ...patches import llvmlite_wrapper
from ..interface import Layer, Limits, Step
from . import compiled, dense
from .vectorised import CpuPlan, PrefillRow, StatePlan, StepRows, VectorisedAttention

llvmlite_wrapper.apply()  # numba, which was just imported, brings llvmlite
if not parallel._is_initialized:
    # As many threads as torch, and where possible the same ones: vLLM binds the first thread of a process to one core,
    # and that core alone is what numba counted when it was imported.
    numba.config.NUMBA_NUM_THREADS = parallel.NUM_THREADS = torch.get_num_threads()
    numba.config.THREADING_LAYER_PRIORITY = ["omp", "workqueue", "tbb"]

# The dtype under which the compiled code sees elements of a cache.
_AS_NUMPY = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}


@dataclass(frozen=True)
class QueryTokens:
    """Query tokens that are computed in one call."""

    where: slice | torch.Tensor  # in query and output
    positions: NDArray[np.int64]  # [tokens]
    rows: NDArray[np.int64]  # [tokens], rows of the batch
    sparse: bool  # some token has more blocks than the budget


@dataclass(frozen=True)
class CompiledPlan(CpuPlan):
    """A step whose tokens go through `compiled`; `decode` and `tiles`, for tensor operations, are empty."""

    decode_tokens: QueryTokens | None  # None without decode rows
    prefill_tokens: list[list[QueryTokens]]  # of each prefill row, in the place of `tiles`


@dataclass(frozen=True)
class FlatCache:
    """A cache as the compiled code takes it, without copying."""

    tensor: torch.Tensor  # `[pages, kv_heads, rows, 2 * head_size]`
    elements: NDArray[np.number]  # [elements from the first to the last], of a dtype that stands for the tensor's
    words: NDArray[np.int32]  # the same bytes
    bytes: NDArray[np.uint8]  # the same bytes
    steps: tuple[int, ...]  # elements from page to page, kv head to kv head, row to row
    word_steps: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "FlatCache":
        """Flatten `tensor`, whose rows are dense."""
        steps = tensor.stride()[:3]
        extent = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        elements = tensor.as_strided((extent,), (1,)).view(_AS_NUMPY[tensor.dtype]).numpy()
        itemsize = tensor.element_size()
        word_steps = tuple(step * itemsize // 4 for step in steps)
        return cls(tensor, elements, elements.view(np.int32), elements.view(np.uint8), steps, word_steps)


@dataclass(frozen=True)
class StateBodies:
    """Where the bodies of the states of some query tokens are; see `compiled.attend`."""

    floats: NDArray[np.float32]
    steps: tuple[int, int]
    starts: NDArray[np.int64]  # [tokens, blocks]


def is_compiled(params: SplaParameters) -> bool:
    """Whether `compiled` computes `params`."""
    return (
        type(get_selector(params.selector)) in compiled.SELECTORS  # by class: any may be registered under their names
        and params.residual in ("none", "regression")
        and params.combine == "shared_normalizer"
    )


class CpuAttention(VectorisedAttention):
    """As `VectorisedAttention`; compiles, or reads the compiled code from disk, when constructed."""

    def __init__(self, params: SplaParameters, layer: Layer, prefill_dense_below: int = 0) -> None:
        super().__init__(params, layer, prefill_dense_below)
        self._compiled = is_compiled(params)
        if self._compiled:
            self._rule = (
                compiled.SELECTORS.index(type(self.selector)),
                params.budget_blocks,
                params.whole_blocks,
                params.candidate_blocks,
                params.first_blocks,
                params.last_blocks,
            )
        self._sizes = params.page_size, params.selection_block, params.attended_block
        formats = self.page_layout.formats or ()
        parts = [(compiled.FORMATS.index(kind), size) for kind, size in formats]
        self._formats = np.array(parts, np.int64).reshape(-1, 2)
        # All of the mass takes all of the budget, whatever the rounding.
        self._share_wanted = np.inf if params.top_p is None or params.top_p >= 1 else float(params.top_p)
        gain = torch.zeros(self.num_heads) if self._log_gain is None else self._log_gain
        self._flat_log_gain = gain.reshape(-1).numpy()
        self._no_sinks = np.full(self.num_heads, -np.inf, np.float32)
        self._flat: dict[int, FlatCache] = {}
        self._warm_up()

    def _warm_up(self) -> None:
        """Store one token and attend to it: what has to be compiled is compiled now and not for the first request."""
        cache = torch.zeros(1, self.num_kv_heads, self.page_layout.rows, 2 * self.head_size, dtype=self.cache_dtype)
        row = torch.zeros(1, self.num_kv_heads, 2 * self.head_size, dtype=self.cache_dtype)
        key, value = row.split(self.head_size, -1)
        self.update_cache(key, value, cache, torch.zeros(1, dtype=torch.int64))
        if self.residual is not None:
            wanted = self._plan_states([(0, 1)], torch.zeros(1, 1, dtype=torch.int64))
            assert wanted is not None
            self._up_to_date(wanted, cache, cache, torch.zeros(1, self.state_layout.num_blocks, dtype=torch.int32))
        if self._compiled:
            query = torch.zeros(1, self.num_heads, self.head_size)
            step = Step.of(torch.tensor([0, 1]), torch.tensor([1]), torch.zeros(1, 1, dtype=torch.int32))
            self.run(self.plan(step), query, cache, None, None, query)
        self._flat.clear()

    def _flatten(self, cache: torch.Tensor) -> FlatCache:
        """`FlatCache.of`, once for every tensor: the engine comes with the same two at every step."""
        flat = self._flat.get(id(cache))
        if flat is None:
            if len(self._flat) > 1:
                self._flat.clear()
            flat = self._flat[id(cache)] = FlatCache.of(cache)
        return flat

    def update_cache(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """See `PagedAttention.update_cache`."""
        if not key.dtype == value.dtype == kv_cache.dtype:
            super().update_cache(key, value, kv_cache, slot_mapping)
            return
        cache, slots = self._flatten(kv_cache), slot_mapping.numpy()
        elements = _AS_NUMPY[key.dtype]
        page_size = self.params.page_size
        compiled.store(
            key.view(elements).numpy(), value.view(elements).numpy(), cache.elements, cache.steps, slots, page_size
        )
        finished = slots[(slots % page_size == page_size - 1) & (slots >= 0)]
        if finished.size:
            self._write_statistics(kv_cache, torch.from_numpy(np.unique(finished // page_size)))

    # Planning ---------------------------------------------------------------------------------------------------

    def plan(self, step: Step) -> CpuPlan:
        """See `PagedAttention.plan`."""
        if not self._compiled:
            return super().plan(step)
        rows = self._rows(step)
        tokens = [[self._tokens_of_page(row, *span) for span in row.spans] for row in rows.prefill]
        decode = self._decode_tokens(rows) if rows.decode else None
        return CompiledPlan(rows.block_table, [], rows.prefill, [], rows.states, decode, tokens)

    def _decode_tokens(self, rows: StepRows) -> QueryTokens:
        positions = np.array([rows.lens[row] - 1 for row in rows.decode])
        sparse = positions >= self.params.whole_tokens
        return QueryTokens(rows.first_tokens(rows.decode), positions, np.array(rows.decode), bool(sparse.any()))

    @staticmethod
    def _tokens_of_page(row: PrefillRow, start: int, stop: int) -> QueryTokens:
        return QueryTokens(row.tokens(start, stop), np.arange(start, stop), np.full(stop - start, row.row), True)

    # Running ----------------------------------------------------------------------------------------------------

    def run(
        self,
        plan: CpuPlan,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        state_cache: torch.Tensor | None,
        state_table: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """See `PagedAttention.run`."""
        if not isinstance(plan, CompiledPlan):
            super().run(plan, query, kv_cache, state_cache, state_table, output)
            return
        if plan.states is not None:
            assert state_cache is not None and state_table is not None
            self._fold(plan, plan.states, kv_cache, state_cache, state_table)
        if plan.decode_tokens is not None:
            tokens = plan.decode_tokens
            bodies = self._no_bodies(tokens)
            if self.residual is not None and tokens.sparse:
                assert state_cache is not None and state_table is not None
                bodies = self._stored_bodies(tokens, state_cache, state_table)
            num_read = self._attend(tokens, query, kv_cache, plan.block_table, bodies, output)
            self.tokens_read = self.params.attended_block * num_read
        for row, of_row in zip(plan.prefill, plan.prefill_tokens, strict=True):
            if row.dense_end > row.start:
                self._dense(row, query, kv_cache, output)
            if of_row:
                self._sparse(row, of_row, plan, query, kv_cache, state_cache, state_table, output)

    @staticmethod
    def _no_bodies(tokens: QueryTokens) -> StateBodies:
        return StateBodies(np.empty(0, np.float32), (0, 1), np.empty((len(tokens.rows), 0), np.int64))

    def _stored_bodies(self, tokens: QueryTokens, state_cache: torch.Tensor, state_table: torch.Tensor) -> StateBodies:
        """The states in the cache; a block's first row is its header."""
        cache, layout = self._flatten(state_cache), self.state_layout
        blocks = state_table.numpy()[tokens.rows, : layout.num_blocks]
        starts = blocks.astype(np.int64) * cache.word_steps[0] + self.head_size
        steps = cache.word_steps[1], layout.rows_per_block - 1
        return StateBodies(cache.words.view(np.float32), steps, starts)

    def _up_to_date(
        self, wanted: StatePlan, kv_cache: torch.Tensor, state_cache: torch.Tensor, state_table: torch.Tensor
    ) -> NDArray[np.bool_]:
        """See `VectorisedAttention._up_to_date`."""
        cache, states = self._flatten(kv_cache), self._flatten(state_cache)
        stale = np.empty(len(wanted.rows), np.bool_)
        compiled.find_stale(
            cache.words,
            cache.word_steps,
            self.page_layout.stamp_word,
            wanted.last_pages,
            states.words,
            states.word_steps,
            state_table.numpy()[wanted.rows],
            wanted.headers,
            stale,
        )
        return ~stale

    def _sparse(
        self,
        row: PrefillRow,
        of_row: list[QueryTokens],
        plan: CpuPlan,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        state_cache: torch.Tensor | None,
        state_table: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """The tokens of a prefill row from `dense_end` on, page by page with the state below the page."""
        body, states, covered = None, None, None
        if self.residual is not None:
            assert state_cache is not None and state_table is not None
            body = self._read_bodies(state_cache, state_table, np.array([row.row]))  # [kv_heads, body rows, head_size]
            if row.start < self.params.page_size:  # nothing was folded: what the blocks hold is another's
                body.zero_()
            states = self._states(body)
        for tokens in of_row:
            bodies = self._no_bodies(tokens)
            if body is not None:
                assert states is not None
                num_pages = int(tokens.positions[0]) // self.params.page_size
                covered = self._advance(row, num_pages, covered, kv_cache, states)
                starts = np.zeros((len(tokens.rows), 1), np.int64)
                bodies = StateBodies(body.view(-1).numpy(), (body.stride(0), body.shape[1]), starts)
            self._attend(tokens, query, kv_cache, plan.block_table, bodies, output)

    def _flat_sinks(self) -> NDArray[np.float32]:
        """Sinks `[heads]` as `compiled.attend` takes them."""
        sinks = self._sinks_now()
        return self._no_sinks if sinks is None else sinks.contiguous().numpy()

    def _attend(
        self,
        tokens: QueryTokens,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        bodies: StateBodies,
        output: torch.Tensor,
    ) -> NDArray[np.int32]:
        """`compiled.attend` on tokens of the batch; returns the blocks read `[tokens, kv_heads]`."""
        q = query[tokens.where].float().contiguous()
        out = torch.empty_like(q)
        cache, layout = self._flatten(kv_cache), self.page_layout
        stored = cache.bytes if layout.fp8_statistics else cache.elements
        from_page, from_head, from_row = (step * layout.itemsize // layout.statistics_itemsize for step in cache.steps)
        area = layout.page_size * from_row, from_page, from_head, layout.statistics_stride
        from_page, from_head, from_row = (step * layout.itemsize for step in cache.steps)
        begin = layout.page_size * from_row + layout.sketch_begin if layout.has_sketch else 0
        sketch = begin, layout.sketch_scales, from_page, from_head
        num_read = np.empty((len(tokens.rows), self.num_kv_heads), np.int32)
        compiled.attend(
            q.numpy(),
            self.scale,
            cache.elements,
            cache.steps,
            stored,
            area,
            self._formats,
            cache.bytes,
            cache.bytes.view(np.int16),
            sketch,
            tokens.positions,
            tokens.rows,
            block_table.numpy(),
            self._sizes,
            self._rule,
            self._share_wanted,
            bodies.floats,
            bodies.steps,
            bodies.starts,
            float(self.params.residual_scale),
            self._flat_log_gain,
            self._flat_sinks(),
            out.numpy(),
            num_read,
        )
        output[tokens.where] = out.to(output.dtype)
        return num_read

    def _causal(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See `VectorisedAttention._causal`."""
        if not dense.is_available():
            return super()._causal(query, keys, values)
        return dense.causal_attention(query, keys, values, self.scale, self.params.page_size, self._sinks_now())


def dense_layer(params: SplaParameters, layer: Layer, limits: Limits) -> CpuAttention:
    """A layer that attends to everything, beside layers that compute `params`: a budget that holds everything."""
    pages = limits.max_model_len // params.page_size + 1
    params = replace(
        params,
        budget_blocks=max(params.budget_blocks, pages * params.blocks_per_page),
        residual="none",
        combine="shared_normalizer",
        top_p=None,
    )
    layer = replace(layer, gain=None, norm_weights=None, feature_weight=None)
    return CpuAttention(params, layer, limits.prefill_dense_below)
