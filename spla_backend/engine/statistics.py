"""What a running engine can say about its reads, for examples and for curious users."""

from typing import Any


class ReadStatistics:
    """Extension of vLLM's workers, in whatever process they are.

    Start with `LLM(..., worker_extension_cls="spla_backend.engine.statistics.ReadStatistics")`, then
    ask `llm.collective_rpc("spla_pages_read")`, which returns a number for every worker.
    """

    model_runner: Any  # the worker's

    def spla_pages_read(self) -> float | None:
        """Pages' worth of keys and values that the exact part of the last decode step read: counted by the kernels,
        mean over its rows, kv heads and SPLA layers. None where the kernels do not count (on a GPU)."""
        layers = self.model_runner.vllm_config.compilation_config.static_forward_context.values()
        pages = []
        for layer in layers:
            op = getattr(getattr(layer, "impl", None), "op", None)
            blocks_read = getattr(op, "blocks_read", None)
            if op is not None and blocks_read is not None:
                pages.append(float(blocks_read.mean()) * op.params.attended_block / op.params.page_size)
        return sum(pages) / len(pages) if pages else None
