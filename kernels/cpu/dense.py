"""Dense attention of a prompt through the kernel of vLLM's CPU_ATTN, so that both give the same numbers."""

import functools

import torch


@functools.cache
def is_available() -> bool:
    """Whether this is vLLM's CPU engine, with its kernels."""
    try:
        from vllm.platforms import current_platform
    except ImportError:
        return False
    if not current_platform.is_cpu():
        return False
    current_platform.import_kernels()
    return hasattr(torch.ops._C, "cpu_attention_with_kv_cache")


def causal_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    page_size: int,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dense causal attention of the last tokens of one sequence.

    Keys and values are copied into the order that the kernel reads first: one pass over them, beside one over their
    pairs with the queries.

    Args:
        query: `[queries, heads, head_size]`, unscaled.
        keys: `[tokens, kv_heads, head_size]`.
        values: `[tokens, kv_heads, head_size]`.
        scale: Softmax scale.
        page_size: Tokens a page of the copy; 32 where that is no multiple of 32.
        sinks: Logits without a value `[heads]` float32; None for none.

    Returns:
        `[queries, heads, head_size]` in the dtype of the keys.
    """
    from vllm import _custom_ops as ops
    from vllm import envs
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    tokens, kv_heads, d = keys.shape
    page_size = page_size if page_size % 32 == 0 else 32
    isa = _get_attn_isa(keys.dtype, page_size, d)
    num_pages = -(-tokens // page_size)
    cache = torch.empty(num_pages, kv_heads, 2 * page_size, d, dtype=keys.dtype)
    cache[-1].zero_()  # what stands behind the last token is read, and weighted with zero
    key_cache, value_cache = cache.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, torch.arange(tokens), isa)
    query = query.to(keys.dtype)
    query_start_loc = torch.tensor([0, len(query)], dtype=torch.int32)
    seq_lens = torch.tensor([tokens], dtype=torch.int32)
    out = torch.empty_like(query)
    ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        output=out,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        scale=scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=torch.arange(num_pages, dtype=torch.int32)[None],
        softcap=0,
        scheduler_metadata=ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1,
            num_heads=query.shape[1],
            num_kv_heads=kv_heads,
            head_dim=d,
            seq_lens=seq_lens,
            dtype=keys.dtype,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        ),
        s_aux=sinks,
    )
    return out
