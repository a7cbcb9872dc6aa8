"""SPLA over paged memory on a CUDA GPU: Triton kernels for decode rows and for the tokens of a prefill, FlashAttention
for the prefill tokens that attend to everything."""

from dataclasses import dataclass
from typing import Any

import torch

from ...algorithm.combine import rms_norm
from ...algorithm.parameters import SplaParameters
from .decode.steps import TritonPagedSpla
from .prefill.passes import DenseRows, PrefillPlan, TritonPrefill

DENSE_BELOW = {(64, False): 16384, (64, True): 24576, (32, False): 32768, (16, False): 98304}
"""Position from which a sparse prompt token costs less than a dense one at a budget of 2048 tokens, by tokens of a
selection block (or more) and by whether the selector is `km2-rem`: measured on an H200 (`benchmarks/NOTES.md`)."""


def default_dense_below(params: SplaParameters, max_model_len: int) -> int:
    """Where prompt tokens begin to select unless the user says: what a sparse token costs grows with the budget.

    Blocks of less than 16, and `km2-rem` in blocks of less than 64, cost more than dense attention at every length.
    """
    clusters = params.selector == "km2-rem"
    block = max(
        (size for size, of_clusters in DENSE_BELOW if of_clusters == clusters and size <= params.selection_block),
        default=0,
    )
    if block == 0:
        return max_model_len
    return DENSE_BELOW[block, clusters] * max(params.budget_blocks * params.selection_block, 2048) // 2048


@dataclass(frozen=True)
class Plan:
    """One step's geometry: decode rows stand before prefill rows."""

    num_decodes: int
    num_decode_tokens: int
    decode_query_len: int
    query_start_loc: torch.Tensor  # [rows + 1] int32
    seq_lens: torch.Tensor  # [rows] int32
    block_table: torch.Tensor  # [rows, max_pages] int32
    prefill: PrefillPlan | None


class CudaPagedSpla:
    """The interface of `TorchPagedSpla` on a GPU.

    Args:
        params: What to compute.
        max_num_tokens: The most tokens of a step.
        prefill_dense_below: Prefill tokens at positions below it attend to everything, as those below the budget do.
        arguments: See `TritonPagedSpla`.
    """

    def __init__(
        self, params: SplaParameters, *, max_num_tokens: int, prefill_dense_below: int, **arguments: Any
    ) -> None:
        self._decode = TritonPagedSpla(params, **arguments)
        self._prefill = TritonPrefill(
            self._decode,
            dense_below=prefill_dense_below,
            max_num_tokens=max_num_tokens,
            max_num_rows=arguments["max_num_rows"],
            max_model_len=arguments["max_model_len"],
            device=torch.device(arguments["device"]),
        )
        self.page_layout, self.state_layout = self._decode.page_layout, self._decode.state_layout
        self.update_cache = self._decode.update_cache
        self._decode.warm_up()
        self._prefill.warm_up()

    @property
    def prefill_dense_below(self) -> int:
        """Position below which prompt tokens attend to everything."""
        return self._prefill.dense_below

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch, shared by all layers of one geometry."""
        return self._decode.scratch_bytes + self._prefill.scratch_bytes

    @property
    def plan_key(self) -> Any:
        """See `TorchPagedSpla.plan_key`. Passes are as large as the scratch, which all layers share, allows."""
        return self._prefill.dense_below

    def plan(
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
    ) -> Plan:
        """What a step needs whatever the layer; lengths on the device are read by no one here.

        Args:
            query_start_loc: `[rows + 1]` int32.
            seq_lens: `[rows]` int32.
            block_table: `[rows, max_pages]` int32.
            num_decodes: Leading rows of at most `decode_query_len` query tokens, padding included.
            num_decode_tokens: Their tokens, padding included.
            decode_query_len: Query tokens of a decode row.
            prefill_starts: Offsets of the other rows' query tokens in the batch, and the end of the last.
            prefill_lens: Tokens of the other rows' sequences, this step's included.
        """
        prefill = self._prefill.plan(num_decodes, prefill_starts, prefill_lens) if prefill_lens else None
        return Plan(
            num_decodes, num_decode_tokens, decode_query_len, query_start_loc, seq_lens, block_table, prefill
        )  # fmt: skip

    def run(
        self,
        plan: Plan,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        state_cache: torch.Tensor | None,
        state_table: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """Attention of one layer; see `TorchPagedSpla.run`."""
        n, tokens = plan.num_decodes, plan.num_decode_tokens
        if n:
            self._decode.decode(
                query[:tokens],
                kv_cache,
                state_cache,
                plan.query_start_loc[: n + 1],
                plan.seq_lens[:n],
                plan.block_table[:n],
                None if state_table is None else state_table[:n],
                output[:tokens],
                plan.decode_query_len,
                steady=plan.prefill is None,
            )
        if plan.prefill is not None:
            # At once: the tokens that were just stored are still in the second-level cache.
            if plan.prefill.folds is not None and state_cache is not None and state_table is not None:
                self._prefill.fold(plan.prefill.folds, kv_cache, state_cache, plan.block_table, state_table)
            for rows in plan.prefill.dense:
                self._attend_densely(rows, query, kv_cache, plan.block_table, output)
                if self._decode.params.combine == "double_rmsnorm":
                    exact = output[rows.first_token : rows.first_token + rows.num_tokens]
                    # There is no tail where nothing is left out.
                    weight, eps = self._decode.norm_weights[0], self._decode.params.rms_norm_eps
                    exact.copy_(rms_norm(exact.float(), weight, eps))
            for step in plan.prefill.passes:
                self._prefill.run(step, query, kv_cache, state_cache, plan.block_table, state_table, output)

    def _attend_densely(
        self,
        rows: DenseRows,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

        d, page_size = self._decode.head_size, self._decode.params.page_size
        pages = kv_cache[:, :, :page_size].transpose(1, 2)  # [num_pages, page_size, kv_heads, 2 d]
        tokens = slice(rows.first_token, rows.first_token + rows.num_tokens)
        flash_attn_varlen_func(
            q=query[tokens],
            k=pages[..., :d],
            v=pages[..., d:],
            out=output[tokens],
            cu_seqlens_q=rows.start_loc,
            max_seqlen_q=rows.max_query_len,
            seqused_k=rows.seq_lens,
            max_seqlen_k=rows.max_seq_len,
            softmax_scale=self._decode.scale,
            causal=True,
            block_table=block_table[rows.first_row : rows.first_row + rows.seq_lens.shape[0]],
            fa_version=get_flash_attn_version(head_size=d),
        )
