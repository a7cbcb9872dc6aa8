"""What SPLA refuses, each with one sentence: what, why, what to do. Imports no kernels, but on a GPU to ask them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import learned
from ..algorithm.parameters import check_sinks
from ..options import RefusedError, SplaOptions, full_attention_layers
from .logger import logger
from .registration import BACKEND_NAME, BACKEND_PATH, backend_member
from .vllm_versions import check_vllm

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.selector import AttentionSelectorConfig

SUPPORTED_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 256)
SUPPORTED_KV_CACHE_DTYPES = ("auto", "float16", "bfloat16")
SUPPORTED_DTYPES = ("float16", "bfloat16", "float32")
PREFERRED_PAGE_SIZE = 64
OPTIONS_OF_ONE_MODEL = ("dense_layers", "layer_budgets", "parameters_file")


def is_chosen(vllm_config: "VllmConfig") -> bool:
    """Whether the user asked for SPLA, for the whole model, for some kind of layer or for a draft model."""
    speculative = vllm_config.speculative_config
    for_draft = speculative is not None and speculative.attention_backend is backend_member()
    return for_draft or is_chosen_for_model(vllm_config)


def is_chosen_for_model(vllm_config: "VllmConfig") -> bool:
    """Whether the user asked for SPLA for the model itself, or for some kind of its layers."""
    attention = vllm_config.attention_config
    return any(b is backend_member() for b in (attention.backend, *(attention.backend_per_kind or {}).values()))


def _option_sources(vllm_config: "VllmConfig") -> tuple[Any, Any]:
    """Options of the command line and of the model's config.json; a draft model has its own of the latter, and what the
    command line says of layers and learned parameters is not about its."""
    additional = vllm_config.additional_config
    command_line = additional.get("spla") if isinstance(additional, dict) else None
    if isinstance(command_line, dict) and getattr(vllm_config.model_config, "runner_type", None) == "draft":
        command_line = {key: value for key, value in command_line.items() if key not in OPTIONS_OF_ONE_MODEL}
    return command_line, getattr(_text_config(vllm_config), "spla_config", None)


def _text_config(vllm_config: "VllmConfig") -> Any:
    return getattr(vllm_config.model_config, "hf_text_config", None)


def parameters_file(vllm_config: "VllmConfig") -> Path | None:
    """The file of learned parameters of a configuration, None where there is none.

    Raises:
        ValueError: One is asked for that does not exist.
    """
    if vllm_config.model_config is None:
        return None
    return learned.find(vllm_config.model_config.model, *_option_sources(vllm_config))


def resolve_options(vllm_config: "VllmConfig") -> SplaOptions:
    """The options of a configuration.

    Raises:
        ValueError: As `SplaOptions.from_sources`.
    """
    path = parameters_file(vllm_config)
    of_file = None if path is None else learned.read_options(path)
    return SplaOptions.from_sources(*_option_sources(vllm_config), of_file)


def check_parameters(vllm_config: "VllmConfig", options: SplaOptions) -> None:
    """Raises:
    ValueError: Learned parameters that are not this model's.
    """
    from vllm.platforms import current_platform

    path = parameters_file(vllm_config)
    if path is None:
        return
    text, model = _text_config(vllm_config), vllm_config.model_config
    learned.check_place(path)
    found = learned.check(
        path,
        layers=full_attention_layers(text),
        num_heads=text.num_attention_heads,
        num_kv_heads=model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
        combine=options.combine,
        residual=options.residual,
        dense_layers=options.dense_layers,
    )
    if "feature_weight" in found and not current_platform.is_cpu():
        raise ValueError(
            f"{path} holds feature_weight, for which SPLA has no kernels on a GPU: use the CPU engine, or set "
            "parameters_file to 'none' to do without the file"
        )


def check_layers(vllm_config: "VllmConfig", options: SplaOptions) -> None:
    """Raises:
    ValueError: Options name layers that this model has not, or leave all that it has dense.
    """
    if (options.dense_layers or options.layer_budgets) and vllm_config.model_config is not None:
        options.check_layers(full_attention_layers(_text_config(vllm_config)))


def choose_page_size(vllm_config: "VllmConfig") -> None:
    """Pages of `PREFERRED_PAGE_SIZE` tokens unless the user said otherwise (`patches/platform.py` says why here)."""
    cache = vllm_config.cache_config
    if not cache.user_specified_block_size:
        cache.block_size = PREFERRED_PAGE_SIZE
        cache.user_specified_block_size = True


def refuse_config(vllm_config: "VllmConfig") -> None:
    """Check a whole configuration, before any engine process is started.

    Raises:
        RefusedError: Something is not supported; the log says so too.
    """
    try:
        check_config(vllm_config)
    except ValueError as error:
        logger.error("%s", error)
        raise RefusedError(str(error)) from None


def check_config(vllm_config: "VllmConfig") -> None:
    """Raises:
    ValueError: Something in a whole configuration is not supported.
    """
    import vllm

    check_vllm(vllm.__version__)
    options = resolve_options(vllm_config)
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    if model is not None and model.use_mla:
        raise ValueError(
            "SPLA does not support MLA models, whose cache holds latent vectors instead of keys: remove "
            "--attention-backend spla"
        )
    options.parameters(cache.block_size)
    if str(cache.cache_dtype) not in SUPPORTED_KV_CACHE_DTYPES:
        raise ValueError(
            f"SPLA does not support --kv-cache-dtype {cache.cache_dtype}, its page statistics are made from "
            f"unquantised keys: choose one of {', '.join(SUPPORTED_KV_CACHE_DTYPES)}"
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise ValueError(
            "SPLA does not support context parallelism, which shards the pages of a sequence over ranks: set "
            "--decode-context-parallel-size and --prefill-context-parallel-size to 1"
        )
    check_ranks(vllm_config)
    if cache.kv_offloading_size is not None:  # vLLM makes its connector only after this check
        raise ValueError(
            "SPLA does not support --kv-offloading-size, whose connector would have to carry page statistics: remove it"
        )
    if vllm_config.kv_transfer_config is not None:
        raise ValueError(
            f"SPLA does not support KV connectors yet ({vllm_config.kv_transfer_config.kv_connector}), which would "
            "have to carry page statistics: remove --kv-transfer-config"
        )
    check_hybrid_manager(vllm_config, options)
    check_drafts(vllm_config)
    check_layers(vllm_config, options)
    check_parameters(vllm_config, options)
    check_kernels(vllm_config, options)


def check_ranks(vllm_config: "VllmConfig") -> None:
    """Raises:
    ValueError: Ranks that share a kv head, each of which would select pages by its own query heads alone.
    """
    model, ranks = vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size
    if model is not None and ranks > model.get_total_num_kv_heads():
        num_kv_heads = model.get_total_num_kv_heads()
        raise ValueError(
            f"SPLA selects pages by all query heads of a kv head together, and --tensor-parallel-size {ranks} puts "
            f"those of each of the model's {num_kv_heads} kv heads on several ranks, which would select for themselves "
            f"and answer otherwise than fewer ranks: set it to at most {num_kv_heads}"
        )


def check_drafts(vllm_config: "VllmConfig") -> None:
    """Raises:
    ValueError: Speculative decoding with layers of the draft that SPLA cannot serve.
    """
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    if speculative.attention_backend is backend_member() and not vllm_config.use_v2_model_runner:
        raise ValueError(
            "SPLA does not compute draft models in vLLM's V1 model runner, which gives a draft one cache group and so "
            "no blocks for a recurrent state: remove attention_backend from --speculative-config"
        )
    if speculative.use_gemma4_mtp():
        raise ValueError(
            "SPLA does not support Gemma 4's MTP drafts, whose layers read the cache of the model's: remove "
            "--speculative-config or --attention-backend spla"
        )


def check_kernels(vllm_config: "VllmConfig", options: SplaOptions) -> None:
    """Raises:
    ValueError: The kernels of this device do not compute these options.
    """
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
    from vllm.v1.attention.backend import max_decode_query_len

    from ..kernels import dispatch

    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    if current_platform.is_cpu():
        dispatch.check_cpu(options.executor)
        return
    if not current_platform.is_cuda():
        raise ValueError(
            f"SPLA has kernels for NVIDIA GPUs and for CPUs, none that were tried on {current_platform.device_name}: "
            "remove --attention-backend spla"
        )
    if model is None:
        return
    capability = current_platform.get_device_capability()
    dispatch.check_cuda(
        options.parameters(cache.block_size),
        num_heads=model.get_num_attention_heads(parallel),
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=model.get_head_size(),
        cache_dtype=kv_cache_dtype_str_to_dtype(cache.cache_dtype, model),
        max_query_len=max_decode_query_len(vllm_config),
        max_model_len=model.max_model_len,
        executor=options.executor,
        capability=None if capability is None else (capability.major, capability.minor),
    )


def check_hybrid_manager(vllm_config: "VllmConfig", options: SplaOptions) -> None:
    """Raises:
    ValueError: The residual needs state blocks, which only the hybrid KV cache manager hands out.
    """
    if options.residual != "none" and vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ValueError(
            "SPLA keeps its recurrent state in blocks of their own group, which needs the hybrid KV cache manager: "
            "remove --disable-hybrid-kv-cache-manager or set the SPLA option residual to 'none'"
        )


def warn_if_unused(vllm_config: "VllmConfig") -> None:
    """Say so where a model was loaded and all of its layers went to other backends."""
    sentence = describe_unused(vllm_config)
    if sentence is not None:
        logger.warning_once("%s", sentence)


def describe_unused(vllm_config: "VllmConfig") -> str | None:
    """That SPLA computes no layer of a model whose layers were made, and who does; None where it computes some."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    backends = {layer.get_attn_backend().get_name() for layer in layers.values()}
    if BACKEND_NAME in backends or vllm_config.model_config is None:
        return None
    others = ", ".join(sorted(backends)) or "no attention backend"
    return (
        f"SPLA computes no layer of {vllm_config.model_config.model}: it has no decoder layer of full attention, and "
        f"{others} computes those that it has (windows, encoders and the like). Remove --attention-backend spla"
    )


def covers_layer(config: "AttentionSelectorConfig") -> bool:
    """Whether a layer is SPLA's business; sliding windows, encoders and cross attention of mixed models are not."""
    return not config.has_sliding_window and config.attn_type == "decoder"


def _refusal(sentence: str) -> ValueError:
    """What refuses a layer. Layers are made in engine processes, whose errors end as tracebacks in the log and as
    "Engine core initialization failed" for the caller: the sentence gets a line of its own before them."""
    logger.error("%s", sentence)
    return ValueError(sentence)


def refuse_layer(config: "AttentionSelectorConfig") -> None:
    """Raises:
    ValueError: A full-attention decoder layer that SPLA cannot compute.
    """
    reasons = []
    if config.use_mla:
        reasons.append("MLA layers (their cache holds latent vectors instead of keys)")
    if config.use_sparse:
        reasons.append("layers with sparse attention of their own")
    if config.use_mm_prefix or config.use_non_causal:
        reasons.append("attention that is not causal")
    if config.use_rswa:
        reasons.append("reference sliding windows")
    if config.use_per_head_quant_scales:
        reasons.append("quantised caches with scales per head")
    if config.use_adaptive_verification:
        reasons.append("adaptive verification")
    if config.head_size not in SUPPORTED_HEAD_SIZES:
        reasons.append(f"head size {config.head_size} (supported: {', '.join(map(str, SUPPORTED_HEAD_SIZES))})")
    if config.kv_cache_dtype not in (None, *SUPPORTED_KV_CACHE_DTYPES):
        reasons.append(f"kv-cache dtype {config.kv_cache_dtype} (supported: {', '.join(SUPPORTED_KV_CACHE_DTYPES)})")
    dtype = str(config.dtype).removeprefix("torch.")
    if dtype not in SUPPORTED_DTYPES:
        reasons.append(f"dtype {dtype} (supported: {', '.join(SUPPORTED_DTYPES)})")
    if reasons:
        raise _refusal(f"SPLA does not support {'; nor '.join(reasons)}: remove --attention-backend spla")


def refuse_arguments(**arguments: Any) -> None:
    """Arguments of a layer that SPLA does not implement, by name; a value of None means absent.

    Raises:
        ValueError: One is present.
    """
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise _refusal(
            f"SPLA does not support layers with {', '.join(given)}: remove --attention-backend spla for this model"
        )


def refuse_sinks(dtype: Any, head_size: int, options: SplaOptions) -> None:
    """Learned attention sinks of a layer, where something does not compute them.

    Args:
        dtype: Of the sinks.
        head_size: `d`.
        options: SPLA's.

    Raises:
        ValueError: The combination makes nothing of them, or FlashAttention, which computes dense prompts on a GPU,
            takes none such.
    """
    from vllm.platforms import current_platform

    try:
        check_sinks(options.combine)
    except ValueError as error:
        raise _refusal(f"SPLA does not compute these options for this model: {error}") from None
    if not current_platform.is_cuda():
        return
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    dtype = str(dtype).removeprefix("torch.")
    if get_flash_attn_version(head_size=head_size, has_sinks=True) not in (3, 4):
        raise _refusal(
            "SPLA's dense prompts with learned attention sinks need FlashAttention 3 or 4, which vLLM has not for this "
            "GPU or this head size: use a Hopper GPU, or remove --attention-backend spla"
        )
    if dtype != "bfloat16":
        raise _refusal(
            f"SPLA does not support learned attention sinks in {dtype} on a GPU, where FlashAttention takes them in "
            "bfloat16: set --dtype bfloat16, or remove --attention-backend spla"
        )


def refuse_spec(layer: Any, vllm_config: "VllmConfig") -> None:
    """A layer whose keys and values are kept or read otherwise than plain full attention does, which only the layer
    knows: vLLM asks for a backend with the same arguments for all.

    Raises:
        ValueError: It is such a layer.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = layer.get_kv_cache_spec(vllm_config)
    plain = (
        type(spec) is FullAttentionSpec
        and spec.head_size_v == spec.head_size
        and spec.sliding_window is None
        and spec.attention_chunk_size is None
        and not spec.non_causal
    )
    derived = ".".join(layer.get_attn_backend().full_cls_name()) != BACKEND_PATH
    if derived or not plain:
        raise _refusal(
            f"SPLA does not support layers like {layer.layer_name}, a {type(layer).__name__} with a cache of a kind of "
            f"its own ({spec}): remove --attention-backend spla for this model"
        )
