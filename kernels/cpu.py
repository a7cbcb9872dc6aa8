"""SPLA over paged memory on a CPU: `TorchPagedSpla` with its two hot paths compiled.

Single query tokens, of decode rows and of the sparse part of prefill rows alike, go through `numba_decode`. Query
tokens of a prefill whose every block fits into the budget go through vLLM's own dense CPU kernel, so that a budget
which holds everything gives the very numbers of CPU_ATTN. Parameters that are not compiled (feature maps, selectors of
a user's own, double RMSNorm) stay with the tensor operations.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..algorithm import selectors
from ..algorithm.parameters import SplaParameters
from ..patches import llvmlite_wrapper
from . import cpu_dense, numba_decode
from .torch_paged import Plan, PrefillRow, TorchPagedSpla

llvmlite_wrapper.apply()  # numba, which was just imported, brings llvmlite

# The dtype under which the compiled code sees elements of a cache.
_AS_NUMPY = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}


@dataclass(frozen=True)
class QueryTokens:
    """Query tokens that are computed in one call."""

    where: slice | torch.Tensor  # in query and output
    positions: NDArray[np.int64]  # [tokens]
    rows: NDArray[np.int64]  # [tokens], rows of the batch
    sparse_rows: NDArray[np.int64]  # rows of the batch that need their state
    states: NDArray[np.int64]  # [tokens], places in `sparse_rows`, 0 where none is needed


def is_compiled(params: SplaParameters) -> bool:
    """Whether `numba_decode` computes `params`."""
    selector = selectors.get_selector(params.selector)
    return (
        params.selector in numba_decode.SELECTORS
        and type(selector).__module__ == selectors.__name__  # nobody registered another one under its name
        and params.residual in ("none", "regression")
        and params.combine == "shared_normalizer"
    )


class CpuPagedSpla(TorchPagedSpla):
    """As `TorchPagedSpla`, arguments included; compiles, or reads the compiled code from disk, when constructed."""

    def __init__(self, params: SplaParameters, **arguments: Any) -> None:
        super().__init__(params, **arguments)
        self._compiled = is_compiled(params)
        if not self._compiled:
            return
        self._rule = (
            numba_decode.SELECTORS.index(params.selector),
            params.budget_blocks,
            params.first_blocks,
            params.last_blocks,
        )
        self._sizes = params.page_size, params.selection_block, self.page_layout.statistics_width
        # All of the mass takes all of the budget, whatever the rounding.
        self._mass_wanted = np.inf if params.top_p is None or params.top_p >= 1 else params.top_p
        gain = torch.zeros(self.num_heads) if self._log_gain is None else self._log_gain
        self._flat_log_gain = gain.reshape(-1).numpy()
        self._no_state = np.empty((0, self.num_kv_heads, self.head_size + 2, self.head_size), np.float32)
        self._warm_up()

    def _warm_up(self) -> None:
        """Attend to one token: whatever has to be compiled is compiled now and not for the first request."""
        shape = (1, self.num_kv_heads, self.page_layout.rows, 2 * self.head_size)
        query = torch.zeros(1, self.num_heads, self.head_size)
        table = torch.zeros(1, 1, dtype=torch.int64)
        (tokens,) = self._plan_decodes([0], [0], [1], table)
        self._attend(tokens, query, torch.zeros(shape, dtype=self._cache_dtype), table, self._no_state, query)

    # Planning ---------------------------------------------------------------------------------------------------

    def _plan_decodes(
        self, batch_rows: list[int], starts: list[int], lens: list[int], table: torch.Tensor
    ) -> list[Any]:
        if not self._compiled:
            return super()._plan_decodes(batch_rows, starts, lens, table)
        if not batch_rows:
            return []
        first = [starts[row] for row in batch_rows]
        together = first == list(range(first[0], first[0] + len(first)))
        where = slice(first[0], first[0] + len(first)) if together else torch.tensor(first)
        rows = np.array(batch_rows)
        positions = np.array([lens[row] - 1 for row in batch_rows])
        sparse = positions // self.params.selection_block + 1 > self.params.budget_blocks
        return [QueryTokens(where, positions, rows, rows[sparse], np.where(sparse, np.cumsum(sparse) - 1, 0))]

    def _plan_tile(self, row: int, tokens: slice, start: int, stop: int, table: torch.Tensor) -> Any:
        if not self._compiled:
            return super()._plan_tile(row, tokens, start, stop, table)
        rows = np.full(stop - start, row)
        return QueryTokens(tokens, np.arange(start, stop), rows, rows[:1], np.zeros_like(rows))

    # Running ----------------------------------------------------------------------------------------------------

    def run(
        self,
        plan: Plan,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        state_cache: torch.Tensor | None,
        state_table: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """See `TorchPagedSpla.run`."""
        if not self._compiled:
            super().run(plan, query, kv_cache, state_cache, state_table, output)
            return
        if plan.states is not None:
            assert state_cache is not None and state_table is not None
            self._fold(plan, plan.states, kv_cache, state_cache, state_table)
        for tokens in plan.decode:
            state = self._no_state
            if self.residual is not None and tokens.sparse_rows.size:
                assert state_cache is not None and state_table is not None
                state = self._by_row(self._read_bodies(state_cache, state_table, tokens.sparse_rows))
            self.blocks_read = self._attend(tokens, query, kv_cache, plan.block_table, state, output)
        for row in plan.prefill:
            if row.dense_end > row.start:
                self._dense(row, query, kv_cache, output)
            if row.tiles:
                self._sparse(row, plan, query, kv_cache, state_cache, state_table, output)

    def _by_row(self, body: torch.Tensor) -> NDArray[np.float32]:
        """Bodies of states as `[rows, kv_heads, body rows, head_size]`."""
        return body.unflatten(0, (-1, self.num_kv_heads)).numpy()

    def _sparse(
        self,
        row: PrefillRow,
        plan: Plan,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        state_cache: torch.Tensor | None,
        state_table: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """The tokens of a prefill row from `dense_end` on, page by page with the state below the page."""
        state, states, covered = self._no_state, None, None
        if self.residual is not None:
            assert state_cache is not None and state_table is not None
            body = self._read_bodies(state_cache, state_table, row.tiles[0].sparse_rows)
            if row.start < self.params.page_size:  # nothing was folded: what the blocks hold is another's
                body.zero_()
            state, states = self._by_row(body), self._states(body)
        for tokens in row.tiles:
            if states is not None:
                num_pages = int(tokens.positions[0]) // self.params.page_size
                covered = self._advance(row, num_pages, covered, kv_cache, states)
            self._attend(tokens, query, kv_cache, plan.block_table, state, output)

    def _attend(
        self,
        tokens: QueryTokens,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        state: NDArray[np.float32],
        output: torch.Tensor,
    ) -> NDArray[np.int32]:
        """`numba_decode.attend` on tokens of the batch; returns the blocks read `[tokens, kv_heads]`."""
        q = query[tokens.where].float().contiguous()
        out = torch.empty_like(q)
        steps = kv_cache.stride()[:3]
        extent = sum((n - 1) * step for n, step in zip(kv_cache.shape, kv_cache.stride(), strict=True)) + 1
        flat = kv_cache.as_strided((extent,), (1,)).view(_AS_NUMPY[kv_cache.dtype])
        num_read = np.empty((len(tokens.positions), self.num_kv_heads), np.int32)
        numba_decode.attend(
            q.numpy(),
            self.scale,
            flat.numpy(),
            steps,
            tokens.positions,
            tokens.rows,
            block_table.numpy(),
            self._sizes,
            self._rule,
            self._mass_wanted,
            tokens.states,
            state,
            self.params.residual_scale,
            self._flat_log_gain,
            out.numpy(),
            num_read,
        )
        output[tokens.where] = out.to(output.dtype)
        return num_read

    def _causal(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See `TorchPagedSpla._causal`."""
        if not cpu_dense.is_available():
            return super()._causal(query, keys, values)
        return cpu_dense.causal_attention(query, keys, values, self.scale, self.params.page_size)
