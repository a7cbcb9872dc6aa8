"""What SPLA uses of vLLM's internals, and whether this vLLM has it. Imports vLLM only where it looks.

An interface is written `module:Name.member(parameter, parameter)`: a class, function or field by its path, and the
parameters that SPLA passes or expects. It is found where the module can be imported, the path leads somewhere, and
the function takes the parameters. What it does nobody can see from outside: that is what tests are for.

The lists are held to the source by `tests/engine/test_interfaces.py`. Those of a patch stand in its file.
"""

import importlib
import inspect
import re
from collections.abc import Sequence
from typing import Any

# What runs in every process that has the plugin, for users of other backends too.
PLUGIN = (
    "vllm.config:VllmConfig.attention_config",
    "vllm.config:VllmConfig.speculative_config",
    "vllm.config:AttentionConfig.backend",
    "vllm.config:AttentionConfig.backend_per_kind",
    "vllm.config:SpeculativeConfig.attention_backend",
    "vllm.envs:environment_variables",
    "vllm.logger:init_logger",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.register(name, value)",
)

CONFIGURATION = (
    "vllm.config:VllmConfig.additional_config",
    "vllm.config:VllmConfig.cache_config",
    "vllm.config:VllmConfig.compilation_config",
    "vllm.config:VllmConfig.kv_transfer_config",
    "vllm.config:VllmConfig.model_config",
    "vllm.config:VllmConfig.parallel_config",
    "vllm.config:VllmConfig.scheduler_config",
    "vllm.config:VllmConfig.use_v2_model_runner",
    "vllm.config:CacheConfig.block_size",
    "vllm.config:CacheConfig.cache_dtype",
    "vllm.config:CacheConfig.kv_offloading_size",
    "vllm.config:CacheConfig.user_specified_block_size",
    "vllm.config:CompilationConfig.static_forward_context",
    "vllm.config:KVTransferConfig.kv_connector",
    "vllm.config:ModelConfig.get_head_size()",
    "vllm.config:ModelConfig.get_num_attention_heads(parallel_config)",
    "vllm.config:ModelConfig.get_num_kv_heads(parallel_config)",
    "vllm.config:ModelConfig.get_total_num_kv_heads()",
    "vllm.config:ModelConfig.hf_text_config",
    "vllm.config:ModelConfig.max_model_len",
    "vllm.config:ModelConfig.model",
    "vllm.config:ModelConfig.use_mla",
    "vllm.config:ParallelConfig.decode_context_parallel_size",
    "vllm.config:ParallelConfig.prefill_context_parallel_size",
    "vllm.config:ParallelConfig.tensor_parallel_size",
    "vllm.config:SchedulerConfig.disable_hybrid_kv_cache_manager",
    "vllm.config:SchedulerConfig.max_num_batched_tokens",
    "vllm.config:SchedulerConfig.max_num_seqs",
    "vllm.config:SpeculativeConfig.use_gemma4_mtp()",
    "vllm.config:SpeculativeConfig.uses_draft_model()",
    "vllm.config:get_current_vllm_config()",
    "vllm.config:get_layers_from_vllm_config(vllm_config, layer_type, layer_names)",
    "vllm.forward_context:get_forward_context()",
    "vllm.utils.torch_utils:kv_cache_dtype_str_to_dtype(kv_cache_dtype, model_config)",
)

BACKEND = (
    "vllm.distributed:get_tensor_model_parallel_rank()",
    "vllm.distributed:get_tensor_model_parallel_world_size()",
    "vllm.model_executor.layers.attention:Attention",
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase.get_attn_backend()",
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase.get_kv_cache_spec(vllm_config)",
    "vllm.model_executor.models.utils:extract_layer_index(layer_name)",
    "vllm.v1.attention.backend:AttentionBackend.customize_spec(spec)",
    "vllm.v1.attention.backend:AttentionBackend.forward_includes_kv_cache_update",
    "vllm.v1.attention.backend:AttentionBackend.full_cls_name()",
    "vllm.v1.attention.backend:AttentionBackend.get_builder_cls()",
    "vllm.v1.attention.backend:AttentionBackend.get_impl_cls()",
    "vllm.v1.attention.backend:AttentionBackend.get_name()",
    "vllm.v1.attention.backend:AttentionBackend.get_preferred_block_size(default_block_size)",
    "vllm.v1.attention.backend:AttentionBackend.get_supported_head_sizes()",
    "vllm.v1.attention.backend:AttentionBackend.get_supported_kernel_block_sizes(kv_cache_spec)",
    "vllm.v1.attention.backend:AttentionBackend.supported_dtypes",
    "vllm.v1.attention.backend:AttentionBackend.supported_kv_cache_dtypes",
    "vllm.v1.attention.backend:AttentionBackend.supported_kv_cache_layouts()",
    "vllm.v1.attention.backend:AttentionBackend.supports_kv_connector()",
    "vllm.v1.attention.backend:AttentionBackend.supports_sink()",
    "vllm.v1.attention.backend:AttentionCGSupport.ALWAYS",
    "vllm.v1.attention.backend:AttentionCGSupport.UNIFORM_BATCH",
    "vllm.v1.attention.backend:AttentionImpl.__init__(num_heads, head_size, scale, num_kv_heads, alibi_slopes, "
    "sliding_window, kv_cache_dtype, logits_soft_cap, attn_type, kv_sharing_target_layer_name)",
    "vllm.v1.attention.backend:AttentionImpl.forward(layer, query, key, value, kv_cache, attn_metadata, output, "
    "output_scale, output_block_scale)",
    "vllm.v1.attention.backend:AttentionImpl.process_weights_after_loading(act_dtype)",
    "vllm.v1.attention.backend:AttentionLayer",
    "vllm.v1.attention.backend:AttentionMetadata",
    "vllm.v1.attention.backend:AttentionMetadataBuilder.__init__(kv_cache_spec, layer_names, vllm_config, device)",
    "vllm.v1.attention.backend:AttentionMetadataBuilder._cudagraph_support",
    "vllm.v1.attention.backend:AttentionMetadataBuilder._init_reorder_batch_threshold(supports_spec_as_decode)",
    "vllm.v1.attention.backend:AttentionMetadataBuilder.build(common_prefix_len, common_attn_metadata, fast_build)",
    "vllm.v1.attention.backend:AttentionType.DECODER",
    "vllm.v1.attention.backend:CommonAttentionMetadata.block_table_tensor",
    "vllm.v1.attention.backend:CommonAttentionMetadata.is_prefilling",
    "vllm.v1.attention.backend:CommonAttentionMetadata.max_query_len",
    "vllm.v1.attention.backend:CommonAttentionMetadata.num_reqs",
    "vllm.v1.attention.backend:CommonAttentionMetadata.query_start_loc",
    "vllm.v1.attention.backend:CommonAttentionMetadata.query_start_loc_cpu",
    "vllm.v1.attention.backend:CommonAttentionMetadata.seq_lens",
    "vllm.v1.attention.backend:CommonAttentionMetadata.seq_lens_cpu_upper_bound",
    "vllm.v1.attention.backend:MultipleOf",
    "vllm.v1.attention.backend:max_decode_query_len(vllm_config)",
    "vllm.v1.attention.backends.utils:split_decodes_and_prefills(common_attn_metadata, decode_threshold)",
    *(
        f"vllm.v1.attention.selector:AttentionSelectorConfig.{field}"
        for field in (
            "attn_type",
            "dtype",
            "has_sliding_window",
            "head_size",
            "kv_cache_dtype",
            "use_adaptive_verification",
            "use_mla",
            "use_mm_prefix",
            "use_non_causal",
            "use_per_head_quant_scales",
            "use_rswa",
            "use_sparse",
        )
    ),
)

CACHE = (
    "vllm.utils.math_utils:cdiv(a, b)",
    "vllm.v1.core.block_pool:BlockPool.get_new_blocks(num_blocks)",
    "vllm.v1.core.kv_cache_utils:KVCacheBlock",
    "vllm.v1.core.single_type_kv_cache_manager:CircularBufferManager._claim_ring_block(request_id)",
    "vllm.v1.core.single_type_kv_cache_manager:CircularBufferManager.get_num_blocks_to_allocate(request_id)",
    "vllm.v1.kv_cache_interface:AttentionSpec.block_size",
    "vllm.v1.kv_cache_interface:AttentionSpec.dtype",
    "vllm.v1.kv_cache_interface:AttentionSpec.head_size",
    "vllm.v1.kv_cache_interface:AttentionSpec.page_size_bytes",
    "vllm.v1.kv_cache_interface:AttentionSpec.tokens_per_state",
    "vllm.v1.kv_cache_interface:CircularBufferSpec.dcp_sharded",
    "vllm.v1.kv_cache_interface:CircularBufferSpec.max_memory_usage_bytes(vllm_config)",
    "vllm.v1.kv_cache_interface:CircularBufferSpec.max_num_blocks_per_req(vllm_config, max_len)",
    "vllm.v1.kv_cache_interface:FullAttentionSpec.attention_chunk_size",
    "vllm.v1.kv_cache_interface:FullAttentionSpec.head_size_v",
    "vllm.v1.kv_cache_interface:FullAttentionSpec.non_causal",
    "vllm.v1.kv_cache_interface:FullAttentionSpec.sliding_window",
    "vllm.v1.kv_cache_interface:KVCacheLayout.LBHNC",
    "vllm.v1.kv_cache_interface:KVCacheSpec",
    "vllm.v1.kv_cache_spec_registry:register_kv_cache_spec(manager_class, uniform_type_base_spec)",
)

MEMORY = (
    "vllm.device_allocator.cumem:CuMemAllocator.default_tag",
    "vllm.device_allocator.cumem:CuMemAllocator.get_instance()",
    "vllm.device_allocator.cumem:CuMemAllocator.instance",
    "vllm.device_allocator.cumem:CuMemAllocator.use_memory_pool(tag)",
)

# What metrics need; without it they are off, and nothing else is.
METRICS = (
    "vllm.v1.metrics.loggers:AggregateStatLoggerBase.__init__(vllm_config, engine_indexes)",
    "vllm.v1.metrics.loggers:AggregateStatLoggerBase.log()",
    "vllm.v1.metrics.loggers:AggregateStatLoggerBase.log_engine_initialized()",
    "vllm.v1.metrics.loggers:AggregateStatLoggerBase.record(scheduler_stats, iteration_stats, mm_cache_stats, "
    "engine_idx)",
    "vllm.v1.metrics.stats:FinishedRequestStats.num_cached_tokens",
    "vllm.v1.metrics.stats:FinishedRequestStats.num_generation_tokens",
    "vllm.v1.metrics.stats:FinishedRequestStats.num_prompt_tokens",
)

CPU_KERNELS = (
    "vllm._custom_ops:cpu_attn_get_scheduler_metadata",
    "vllm._custom_ops:cpu_attn_reshape_and_cache",
    "vllm._custom_ops:cpu_attention_with_kv_cache",
    "vllm.envs:VLLM_CPU_ATTN_SPLIT_KV",
    "vllm.v1.attention.backends.cpu_attn:_get_attn_isa(dtype, block_size, head_size)",
)

GPU_KERNELS = (
    "vllm.v1.attention.backends.fa_utils:flash_attn_varlen_func(q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, "
    "max_seqlen_k, softmax_scale, causal, block_table, fa_version, s_aux)",
    "vllm.v1.attention.backends.fa_utils:get_flash_attn_version(head_size, has_sinks)",
)


def of_this_device() -> tuple[str, ...]:
    """What a process that chose SPLA uses on vLLM's current platform; patches aside."""
    from vllm.platforms import current_platform

    kernels = GPU_KERNELS if current_platform.is_cuda() else CPU_KERNELS
    return PLUGIN + CONFIGURATION + BACKEND + CACHE + MEMORY + kernels


def find_missing(interfaces: Sequence[str]) -> list[str]:
    """The paths of interfaces that this vLLM does not have, without their modules; of modules those that cannot be
    imported. A parameter that is missing stands in brackets behind its function."""
    missing: dict[str, None] = {}
    for interface in interfaces:
        what = _missing(interface)
        if what is not None:
            missing[what] = None
    return list(missing)


def _missing(interface: str) -> str | None:
    match = re.fullmatch(r"([\w.]+):([\w.]+)(?:\(([\w, ]*)\))?", interface)
    if match is None:
        raise ValueError(f"{interface!r} is not written as module:Name.member(parameter, parameter)")
    module, path, parameters = match.groups()
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return module
    for name in path.split("."):
        if _is_field(found, name):
            return None
        try:
            found = getattr(found, name)
        except AttributeError:
            return path
    wanted = [name for name in (parameters or "").split(", ") if name]
    if wanted:
        taken = inspect.signature(found).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
            return None
        absent = [name for name in wanted if name not in taken]
        if absent:
            return f"{path}({', '.join(absent)})"
    return None


def _is_field(owner: Any, name: str) -> bool:
    """Whether instances of a dataclass or an annotated class have it, though the class itself may not."""
    classes = owner.__mro__ if isinstance(owner, type) else ()
    return any(name in vars(c).get("__annotations__", {}) for c in classes)
