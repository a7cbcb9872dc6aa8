"""SPLA over paged memory on a CUDA GPU: Triton kernels for decode rows, FlashAttention for prefill rows.

Prefill rows attend densely for now: the answer of dense attention, at its speed. Decode rows are sparse.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..algorithm.parameters import SplaParameters
from .triton_decode import TritonPagedSpla


@dataclass(frozen=True)
class Plan:
    """One step's geometry: decode rows stand before prefill rows."""

    num_decodes: int
    num_decode_tokens: int
    decode_query_len: int
    query_start_loc: torch.Tensor  # [rows + 1] int32
    prefill_start_loc: torch.Tensor | None  # [prefill rows + 1] int32, offsets within the prefill tokens
    seq_lens: torch.Tensor  # [rows] int32
    block_table: torch.Tensor  # [rows, max_pages] int32
    num_tokens: int
    max_query_len: int
    max_seq_len: int


class CudaPagedSpla:
    """The interface of `TorchPagedSpla` on a GPU; arguments as `TritonPagedSpla`."""

    def __init__(self, params: SplaParameters, **arguments: Any) -> None:
        self._decode = TritonPagedSpla(params, **arguments)
        self.page_layout, self.state_layout = self._decode.page_layout, self._decode.state_layout
        self.update_cache = self._decode.update_cache

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch, shared by all layers of one geometry."""
        return self._decode.scratch_bytes

    def plan(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        *,
        num_decodes: int,
        num_decode_tokens: int,
        decode_query_len: int,
        num_tokens: int,
        max_query_len: int,
        max_seq_len: int,
    ) -> Plan:
        """What a step needs whatever the layer; lengths on the device are read by no one here.

        Args:
            query_start_loc: `[rows + 1]` int32.
            seq_lens: `[rows]` int32.
            block_table: `[rows, max_pages]` int32.
            num_decodes: Leading rows of at most `decode_query_len` query tokens, padding included.
            num_decode_tokens: Their tokens, padding included.
            decode_query_len: Query tokens of a decode row.
            num_tokens: Tokens of the batch.
            max_query_len: The most query tokens of a row.
            max_seq_len: The most tokens of a sequence.
        """
        prefill_start_loc = None
        if num_decodes < seq_lens.shape[0]:
            prefill_start_loc = query_start_loc[num_decodes:] - query_start_loc[num_decodes]
        return Plan(
            num_decodes, num_decode_tokens, decode_query_len, query_start_loc, prefill_start_loc, seq_lens, block_table,
            num_tokens, max_query_len, max_seq_len,
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
            )
        if plan.prefill_start_loc is not None:
            self._prefill(plan, query[tokens : plan.num_tokens], kv_cache, output[tokens : plan.num_tokens])

    def _prefill(self, plan: Plan, query: torch.Tensor, kv_cache: torch.Tensor, output: torch.Tensor) -> None:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

        d, page_size = self._decode.head_size, self._decode.params.page_size
        pages = kv_cache[:, :, :page_size].transpose(1, 2)  # [num_pages, page_size, kv_heads, 2 d]
        flash_attn_varlen_func(
            q=query,
            k=pages[..., :d],
            v=pages[..., d:],
            out=output,
            cu_seqlens_q=plan.prefill_start_loc,
            max_seqlen_q=plan.max_query_len,
            seqused_k=plan.seq_lens[plan.num_decodes :],
            max_seqlen_k=plan.max_seq_len,
            softmax_scale=self._decode.scale,
            causal=True,
            block_table=plan.block_table[plan.num_decodes :],
            fa_version=get_flash_attn_version(head_size=d),
        )
