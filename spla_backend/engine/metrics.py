"""Counters of vLLM's `/metrics` that begin with `vllm:spla_`, and a line of the log beside vLLM's own.

The entry point of `vllm.stat_logger_plugins`: vLLM makes the logger in the process of its API server, and tells it of
every request that finished. Whatever else is in that process is untouched; the device and the engine are not asked.
"""

from typing import Any

import torch
from prometheus_client import Counter
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from ..kernels import dispatch
from ..options import full_attention_layers
from .checks import is_chosen_for_model, resolve_options
from .counts import Counts, RequestCounter
from .interfaces import METRICS, find_missing
from .logger import logger

_HELP = {
    "decode_tokens": "Tokens generated in steps of their own.",
    "dense_prompt_tokens": "Computed prompt tokens that attended to everything.",
    "sparse_prompt_tokens": "Computed prompt tokens that selected blocks.",
    "pages_held": "Pages of the contexts of generated tokens, once a token.",
    "pages_read": "Pages' worth of keys and values that generated tokens attended to exactly, mean over SPLA's layers.",
}


class SplaStatLogger(AggregateStatLoggerBase):
    """Counts of requests that finished, by engine. Does nothing where SPLA was not chosen."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self.counter = make_counter(vllm_config)
        self.model_name = vllm_config.model_config.served_model_name
        self.engine_indexes = engine_indexes
        self.metrics: dict[str, Counter] = {}
        self.since_log = Counts()

    def log_engine_initialized(self) -> None:
        """Make the metrics: vLLM's own logger, which is made after this one, removes all that begin with `vllm:`."""
        if self.counter is None or self.metrics:
            return
        self.metrics = {
            name: Counter(f"vllm:spla_{name}", f"{text} Of finished requests.", ["model_name", "engine"])
            for name, text in _HELP.items()
        }
        for metric in self.metrics.values():
            for index in self.engine_indexes:
                metric.labels(self.model_name, str(index))  # 0 until the first request has finished

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """See `StatLoggerBase.record`."""
        if self.counter is None or iteration_stats is None or not iteration_stats.finished_requests:
            return
        counts = sum(
            (
                self.counter.count(request.num_prompt_tokens, request.num_cached_tokens, request.num_generation_tokens)
                for request in iteration_stats.finished_requests
            ),
            Counts(),
        )
        for name, metric in self.metrics.items():
            metric.labels(self.model_name, str(engine_idx)).inc(getattr(counts, name))
        self.since_log += counts

    def log(self) -> None:
        """One line, as often as vLLM has one, if a request has finished since the last."""
        counts, self.since_log = self.since_log, Counts()
        if counts == Counts():
            return
        share = f" ({counts.pages_read / counts.pages_held:.1%})" if counts.pages_held else ""
        logger.info(
            "SPLA: finished requests generated %d tokens that read %.0f of %.0f pages%s; prompt tokens: %d dense, %d "
            "sparse",
            counts.decode_tokens,
            counts.pages_read,
            counts.pages_held,
            share,
            counts.dense_prompt_tokens,
            counts.sparse_prompt_tokens,
        )


def make_counter(vllm_config: VllmConfig) -> RequestCounter | None:
    """What counts the requests of a configuration; None where SPLA computes nothing, or this vLLM does not say."""
    model = vllm_config.model_config
    if model is None or not is_chosen_for_model(vllm_config):
        return None
    missing = find_missing(METRICS)
    if missing:
        logger.warning("SPLA's metrics are off: they use vLLM's %s, which this vLLM does not have", ", ".join(missing))
        return None
    indices = full_attention_layers(model.hf_text_config)
    if not indices:
        return None
    options, page_size = resolve_options(vllm_config), vllm_config.cache_config.block_size
    params, of_layers = options.parameters(page_size), options.layers(page_size, indices)
    device = torch.device(current_platform.device_type)
    below = dispatch.dense_below(device, options.prefill_dense_below, params, model.max_model_len)
    return RequestCounter(params, [of_layers.get(index) for index in indices], below)
