"""Let layers of chunked local attention (Llama 4) keep the platform's own backend.

Upstream cause, vLLM 0.32 and 0.33: `ChunkedLocalAttention` asks for a backend as a layer of full attention does, so
that a platform cannot tell the two apart, and wraps the backend's metadata in virtual batches. SPLA would keep a state
of, and select among, pages that such a layer must not see.

Remove when `ChunkedLocalAttention` says so in the `AttentionSelectorConfig` that it asks with.
"""

import functools
from typing import Any

WHERE = "models with chunked local attention (Llama 4)"
INTERFACES = (
    "vllm.config:get_current_vllm_config()",
    "vllm.model_executor.layers.attention.chunked_local_attention:create_chunked_local_attention_backend("
    "underlying_attn_backend, attention_chunk_size)",
    "vllm.v1.attention.selector:get_attn_backend(head_size, dtype, kv_cache_dtype, has_sliding_window)",
)


def apply() -> None:
    """Wrap the function that makes the backend of such a layer; a second call does nothing."""
    from vllm.model_executor.layers.attention import chunked_local_attention

    original = chunked_local_attention.create_chunked_local_attention_backend
    if getattr(original, "_spla", False):
        return

    @functools.wraps(original)
    def create(underlying: Any, attention_chunk_size: int) -> Any:
        from ..engine.registration import BACKEND_NAME

        if underlying.get_name() == BACKEND_NAME:
            underlying = _platforms_backend()
        return original(underlying, attention_chunk_size)

    create._spla = True  # type: ignore[attr-defined]
    chunked_local_attention.create_chunked_local_attention_backend = create


def _platforms_backend() -> Any:
    """What a layer with a window is given, asked with the arguments of `ChunkedLocalAttention`."""
    import torch
    from vllm.config import get_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    config = get_current_vllm_config()
    return get_attn_backend(
        config.model_config.get_head_size(),
        torch.get_default_dtype(),
        config.cache_config.cache_dtype,
        has_sliding_window=True,
    )
