"""SPLA attention of one layer inside vLLM."""

from dataclasses import replace
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType, max_decode_query_len

from .. import learned
from ..algorithm.parameters import SplaParameters
from ..kernels import dispatch
from ..kernels.interface import Layer, Limits, PagedAttention
from ..patches import draft_groups
from .checks import (
    check_hybrid_manager,
    parameters_file,
    refuse_arguments,
    refuse_sinks,
    refuse_spec,
    resolve_options,
)
from .logger import logger
from .memory import kept_pool, scratch_pool
from .metadata import SplaMetadata
from .state import RecurrentStateLayer, companion_name


class SplaImpl(AttentionImpl[SplaMetadata]):
    """Writes keys, values and page statistics; selects, attends and combines."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        refuse_arguments(
            alibi_slopes=alibi_slopes,
            logits_soft_cap=logits_soft_cap or None,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            sliding_window=sliding_window,
        )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.vllm_config = get_current_vllm_config()
        self.options = resolve_options(self.vllm_config)
        check_hybrid_manager(self.vllm_config, self.options)
        if sinks is not None:
            refuse_sinks(sinks.dtype, head_size, self.options)
        self.sinks = sinks  # a parameter of the model, whose values are not loaded yet
        self.index = -1  # until the layer's name is known
        self.op: PagedAttention | None = None  # until `bind`
        self.bound: tuple[int, torch.dtype] | None = None
        self.learned: learned.LayerParameters | None = None
        logger.info_once("SPLA options: %s", self.options)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Tell the layer's backend its options, read learned parameters, and claim what memory profiling must see: the
        kernels' scratch, and the companion layer that makes the engine allocate the recurrent state. Idempotent:
        weights may be loaded again, in place; the kernels stay as they are."""
        context = self.vllm_config.compilation_config.static_forward_context
        name, layer = next((n, item) for n, item in context.items() if getattr(item, "impl", None) is self)
        refuse_spec(layer, self.vllm_config)
        layer.attn_backend = layer.attn_backend.with_options(self.options)
        self.index = extract_layer_index(name)
        self.learned = self._read_learned()
        speculative = self.vllm_config.speculative_config
        if speculative is not None and speculative.uses_draft_model():
            draft_groups.apply()
        if self.options.residual != "none":
            context.setdefault(companion_name(name), RecurrentStateLayer(layer))
        if current_platform.is_cuda():
            _bind_all([item for item in context.values() if isinstance(getattr(item, "impl", None), SplaImpl)])

    @property
    def is_dense(self) -> bool:
        """Whether the layer attends to everything."""
        return self.index in self.options.dense_layers

    def _read_learned(self) -> learned.LayerParameters:
        """What the model's file of learned parameters holds for this rank's heads of the layer.

        Raises:
            ValueError: The file does not fit the model.
            RuntimeError: It holds other values than when the weights were first loaded: kernels and CUDA graphs have
                those.
        """
        path = parameters_file(self.vllm_config)
        model = self.vllm_config.model_config
        # Layers behind the model's own are those of a draft that is made with the model's configuration (EAGLE, MTP).
        found = learned.LayerParameters()
        if path is not None and not self.is_dense and self.index < model.hf_text_config.num_hidden_layers:
            rank, world_size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
            num_heads = self.num_heads * world_size
            num_kv_heads = model.get_total_num_kv_heads()
            whole = learned.read_layer(
                path, self.index, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=self.head_size
            )
            found = whole.heads(rank, world_size)
            logger.info_once("SPLA parameters: %s", path)
        if self.learned is not None and not self.learned.same(found):
            raise RuntimeError(
                f"SPLA's learned parameters of {model.model} are not those that the engine started with, which its "
                "kernels and CUDA graphs hold: start the engine again to use them, or set the option parameters_file "
                "to one path for all weights"
            )
        return found

    def _parameters(self, page_size: int) -> SplaParameters:
        """What this layer computes; layers may differ in `residual_scale`, which no plan of a step depends on, and in
        `budget_blocks`."""
        params = self.options.parameters(page_size, self.index)
        if self.learned is None or self.learned.residual_scale is None:
            return params
        return replace(params, residual_scale=float(self.learned.residual_scale))

    def bind(self, page_size: int, cache_dtype: torch.dtype, device: torch.device | str) -> PagedAttention:
        """Make the kernels; the metadata builder calls it again with the final page geometry, in memory that sleep mode
        keeps, too."""
        if self.op is not None and self.bound == (page_size, cache_dtype):
            return self.op
        self.bound = (page_size, cache_dtype)
        assert self.learned is not None, "weights are loaded before caches are made"
        options, device, scheduler = self.options, torch.device(device), self.vllm_config.scheduler_config
        max_model_len = self.vllm_config.model_config.max_model_len
        common = options.parameters(page_size)
        limits = Limits(
            max_num_rows=scheduler.max_num_seqs,
            max_query_len=max_decode_query_len(self.vllm_config),
            max_model_len=max_model_len,
            max_num_tokens=scheduler.max_num_batched_tokens,
            prefill_dense_below=dispatch.dense_below(device, options.prefill_dense_below, common, max_model_len),
            where_it_pays=options.prefill_dense_below is None,
            largest_budget=options.largest_budget(max_model_len) // common.selection_block,
        )
        if device.type == "cpu":
            logger.info_once("SPLA loads its CPU kernels; the first time they are compiled, for half a minute")
        layer = Layer(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            cache_dtype=cache_dtype,
            scale=self.scale,
            gain=self.learned.gain,
            norm_weights=self.learned.norm_weights,
            feature_weight=self.learned.feature_weight,
            sinks=self.sinks,
        )
        params = self._parameters(page_size)
        self.op = dispatch.make(
            device,
            params,
            layer,
            limits,
            executor=options.executor,
            dense=self.is_dense,
            scratch_pool=scratch_pool(),
        )
        if not self.is_dense:
            logger.info_once("SPLA prompt tokens below position %d attend densely", self.op.prefill_dense_below)
        if self.op.scratch_bytes:
            logger.info_once("SPLA scratch for all layers: %.1f MiB", self.op.scratch_bytes / 2**20)
        return self.op

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store this step's keys and values, and statistics of the pages they complete.

        Args:
            layer: The attention layer.
            key: `[num_tokens, num_kv_heads, head_size]`.
            value: `[num_tokens, num_kv_heads, head_size]`.
            kv_cache: `[num_pages, num_kv_heads, page_size + statistics_rows, 2 * head_size]`.
            slot_mapping: `[num_tokens]` int64, -1 for padding.
        """
        num_tokens, op = slot_mapping.shape[0], self.op
        assert op is not None, "kernels are made before caches are filled"
        op.update_cache(key[:num_tokens], value[:num_tokens], kv_cache, slot_mapping)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SplaMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one step.

        Args:
            layer: The attention layer.
            query: `[num_tokens, num_heads, head_size]`.
            key: `[num_tokens, num_kv_heads, head_size]`, already in the cache.
            value: `[num_tokens, num_kv_heads, head_size]`, already in the cache.
            kv_cache: `[num_pages, num_kv_heads, page_size + statistics_rows, 2 * head_size]`.
            attn_metadata: The step's metadata; None while the engine profiles its memory.
            output: `[num_tokens, num_heads, head_size]`, uninitialised.
            output_scale: Not supported.
            output_block_scale: Not supported.

        Returns:
            `output`.

        Raises:
            NotImplementedError: Fused output quantisation was asked for.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("SPLA does not support fused output quantisation")
        if attn_metadata is None:
            return output.zero_()
        op = self.op
        assert op is not None, "kernels are made before steps are planned"
        state_cache, state_table = self._state(layer)
        op.run(attn_metadata.plans[op.plan_key], query, kv_cache, state_cache, state_table, output)
        return output

    @staticmethod
    def _state(layer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The companion's cache `[num_pages, ...]` and block table `[num_reqs, >= K]`; None without a residual."""
        context = get_forward_context()
        name = companion_name(layer.layer_name)
        companion = context.no_compile_layers.get(name)
        if companion is None:
            return None, None
        metadata = context.attn_metadata
        if isinstance(metadata, list):  # speculative decoding: the first is the model's own
            metadata = metadata[0]
        return companion.kv_cache, metadata[name].block_table


def _bind_all(layers: list[Any]) -> None:
    """Make the kernels of all SPLA layers, once every one of them is ready: they share a pool."""
    unbound = [layer for layer in layers if layer.impl.op is None]
    if unbound and all(layer.impl.learned is not None for layer in layers):
        with kept_pool():
            for layer in unbound:
                page_size = layer.impl.vllm_config.cache_config.block_size
                layer.impl.bind(page_size, layer.kv_cache_torch_dtype, current_platform.device_type)
