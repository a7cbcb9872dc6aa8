"""Rows that attend to everything: FlashAttention over the engine's pages, statistics left aside."""

from dataclasses import dataclass

import torch

from .layer import GpuLayer


@dataclass(frozen=True)
class DenseRows:
    """Neighbouring rows, or the beginning of a row, that attend to everything."""

    first_token: int
    num_tokens: int
    first_row: int
    start_loc: torch.Tensor  # [rows + 1] int32
    seq_lens: torch.Tensor  # [rows] int32, up to the last token that attends densely
    max_query_len: int
    max_seq_len: int


def attend_densely(
    layer: GpuLayer,
    rows: DenseRows,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Causal attention of `rows`.

    Args:
        layer: Whose pages.
        rows: Of the batch.
        query: `[tokens, H, d]` of the whole batch.
        kv_cache: `[num_pages, G, page_size + statistics_rows, 2 d]`.
        block_table: `[rows, pages]` int32 of the whole batch.
        output: `[tokens, H, d]` of the whole batch, written for the rows' tokens.
    """
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    d = layer.head_size
    pages = kv_cache[:, :, : layer.params.page_size].transpose(1, 2)  # [num_pages, page_size, kv_heads, 2 d]
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
        softmax_scale=layer.scale,
        causal=True,
        block_table=block_table[rows.first_row : rows.first_row + rows.seq_lens.shape[0]],
        fa_version=get_flash_attn_version(head_size=d, has_sinks=layer.sinks is not None),
        s_aux=layer.sinks,
    )
