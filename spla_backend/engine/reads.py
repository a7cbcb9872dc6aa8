"""How much of the cache a running engine reads, for examples and for curious users."""

from typing import Any

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

from .impl import SplaImpl


class ReadCounts:
    """Extension of vLLM's workers, in whatever process they are.

    Start with `LLM(..., worker_extension_cls="spla_backend.engine.reads.ReadCounts")`, then
    ask `llm.collective_rpc("spla_pages_read")`, which returns a number for every worker.
    """

    model_runner: Any  # the worker's

    def spla_pages_read(self) -> float | None:
        """Pages' worth of keys and values that the exact part of the last decode step read: counted by the kernels,
        mean over its rows, kv heads and SPLA layers. None where the kernels do not count (on a GPU)."""
        layers = get_layers_from_vllm_config(self.model_runner.vllm_config, Attention).values()
        pages = []
        for op in (layer.impl.op for layer in layers if isinstance(layer.impl, SplaImpl)):
            if op is not None and op.tokens_read is not None:
                pages.append(float(op.tokens_read.mean()) / op.page_layout.page_size)
        return sum(pages) / len(pages) if pages else None
