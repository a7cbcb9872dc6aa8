"""A layer that attends to everything beside layers of SPLA on a CUDA GPU: FlashAttention over the same pages."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from ...algorithm.parameters import SplaParameters
from .attention import CudaPagedSpla
from .prefill.passes import DenseRows


@dataclass(frozen=True)
class DensePlan:
    """One step's geometry."""

    rows: list[DenseRows]  # decode rows, then prefill rows, where there are any
    block_table: torch.Tensor  # [rows, max_pages] int32


class CudaDense(CudaPagedSpla):
    """The interface of `CudaPagedSpla`, whose pages it fills alike, statistics included; selects nothing and has no
    state. It records no lengths of the host but the most tokens of a row, so that CUDA graphs replay it."""

    def __init__(self, params: SplaParameters, **arguments: Any) -> None:
        super().__init__(params, **arguments)
        self._max_model_len = arguments["max_model_len"]

    @property
    def plan_key(self) -> Any:
        """See `TorchPagedSpla.plan_key`."""
        return "dense"

    def plan(  # type: ignore[override]
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        *,
        num_decodes: int,
        num_decode_tokens: int,
        decode_query_len: int,
        prefill_starts: list[int],
        prefill_lens: list[int],
    ) -> DensePlan:
        """See `CudaPagedSpla.plan`."""
        n, rows = num_decodes, []
        if n:
            rows.append(
                DenseRows(
                    first_token=0,
                    num_tokens=num_decode_tokens,
                    first_row=0,
                    start_loc=query_start_loc[: n + 1],
                    seq_lens=seq_lens[:n],
                    max_query_len=decode_query_len,
                    max_seq_len=self._max_model_len,
                )
            )
        if prefill_lens:
            end = n + len(prefill_lens)
            rows.append(
                DenseRows(
                    first_token=prefill_starts[0],
                    num_tokens=prefill_starts[-1] - prefill_starts[0],
                    first_row=n,
                    start_loc=query_start_loc[n : end + 1] - prefill_starts[0],
                    seq_lens=seq_lens[n:end],
                    max_query_len=max(b - a for a, b in itertools.pairwise(prefill_starts)),
                    max_seq_len=max(prefill_lens),
                )
            )
        return DensePlan(rows, block_table)

    def run(  # type: ignore[override]
        self,
        plan: DensePlan,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        state_cache: torch.Tensor | None,
        state_table: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """Attention of one layer; see `TorchPagedSpla.run`. The states are not looked at."""
        for rows in plan.rows:
            self._attend_densely(rows, query, kv_cache, plan.block_table, output)
