"""What is not supported is refused at start-up, in one sentence that says what, why and what to do."""

import importlib.util

import pytest

from spla_backend.options import RefusedError

from .conftest import LLAMA, save_random_model

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("options", "engine_args", "message"),
    [
        ({"budgets": 512}, {}, r"unknown SPLA option 'budgets' \(did you mean 'budget'\?\): valid options are budget"),
        ({"selector": "best"}, {}, r"unknown SPLA selector 'best': choose one of cumulant2, km2-rem, mean"),
        ({"statistics_dtype": "int8"}, {}, "unknown SPLA statistics_dtype 'int8': choose one of auto, fp8"),
        ({"budget": 0}, {}, "SPLA option budget must be an integer of at least 1, not 0"),
        ({"budget": "2k"}, {}, "SPLA option budget must be an integer of at least 1, not '2k'"),
        ({"budget": 64}, {}, "a SPLA budget of 64 tokens is less than the blocks .*always selected.* at least 96"),
        ({"top_p": 1.5}, {}, "SPLA option top_p must be a number above 0 and at most 1, not 1.5"),
        ({"selection_block_size": 48}, {}, "selection blocks of 48 tokens do not divide pages of 32"),
        ({"selector": "quest"}, {}, "set residual to 'none' or choose another selector"),
        ({"combine": "double_rmsnorm"}, {}, "set residual to 'linear'"),
        ({"dense_layers": 0}, {}, r"dense_layers must be a list of layer indices like \[0, 1\], not 0"),
        ({"layer_budgets": [512]}, {}, r'must map layer indices to tokens like {"0": 512}, not \[512\]'),
        ({"layer_budgets": {"a": 512}}, {}, "must name layers by index .*, not 'a'"),
        ({"layer_budgets": {"1": 512, 1: 256}}, {}, "SPLA option layer_budgets names layer 1 twice"),
        ({"layer_budgets": {"1": "2k"}}, {}, r"must give layers integers of at least 1, not '2k' \(layer 1\)"),
        ({"layer_budgets": {"1": 64}}, {}, r"budget of 64 tokens \(layer 1\) is less than .*must be at least 96"),
        ({"layer_budgets": {"3": 512}}, {}, "layer_budgets names layer 3, which is no layer of full attention"),
        ({"layer_budgets": {"1": 512}, "dense_layers": [1]}, {}, "both name layer 1: take it out of one of them"),
        ({"dense_layers": [3]}, {}, "names layer 3, which is no layer of full attention in this model: choose"),
        ({"dense_layers": [0, 1, 2]}, {}, "dense_layers names all layers: remove --attention-backend spla"),
        ({"fine_block_size": 24, "budget": 128}, {}, "fine_block_size must divide the selection blocks of 32 tokens"),
        ({"executor": "cutlass"}, {}, "unknown SPLA executor 'cutlass': choose one of spla, flashinfer"),
        ({"executor": "flashinfer"}, {}, "SPLA option executor 'flashinfer' needs a CUDA GPU: leave it at 'spla'"),
        ({}, {"block_size": 8}, "SPLA needs pages of a multiple of 16 tokens, not 8: set --block-size 64"),
        ({}, {"kv_cache_dtype": "fp8"}, "SPLA does not support --kv-cache-dtype fp8, .*choose one of auto, float16"),
        ({}, {"disable_hybrid_kv_cache_manager": True}, "remove --disable-hybrid-kv-cache-manager or set"),
        (
            {},
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            r"SPLA does not support KV connectors yet \(ExampleConnector\).*remove --kv-transfer-config",
        ),
        ({}, {"tensor_parallel_size": 4}, "each of the model's 2 kv heads on several ranks, .*: set it to at most 2"),
        ({}, {"kv_offloading_size": 1.0}, "SPLA does not support --kv-offloading-size, .*: remove it"),
        (
            {},
            {"speculative_config": {"method": "draft_model", "model": "TARGET", "num_speculative_tokens": 3,
                                    "attention_backend": "spla"}},
            "SPLA does not compute draft models in vLLM's V1 model runner, .*: remove attention_backend",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_configuration(tiny_llama, start, options, engine_args, message, spla_log):
    """The sentence is the whole error and a line of the log."""
    engine_args = {key: _with_model(value, tiny_llama) for key, value in engine_args.items()}
    with pytest.raises(RefusedError, match=message) as refused, start(tiny_llama, options=options, **engine_args):
        pass
    assert "\n" not in str(refused.value)
    assert str(refused.value) in spla_log


def _with_model(value, model):
    """An engine argument, the model's folder in the place of TARGET."""
    if not isinstance(value, dict):
        return value
    return {key: model if item == "TARGET" else item for key, item in value.items()}


@pytest.mark.parametrize(("block_size", "expected"), [(None, 64), (32, 32)])
def test_page_size(tiny_llama, block_size, expected):
    """Pages are of 64 tokens where nobody asks for others; vLLM alone would take what suits all backends of a model."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(str(tiny_llama), attention_backend="spla", block_size=block_size).create_engine_config()
    assert config.cache_config.block_size == expected


def test_residual_none_needs_no_hybrid_manager(tiny_llama, start):
    with start(tiny_llama, options={"residual": "none"}, disable_hybrid_kv_cache_manager=True) as engine:
        assert len(engine.answer([[5, 6, 7]])[0].tokens) == 20


def test_head_size(tmp_path, start, spla_log):
    """What a layer is refused for is a line of the log, too: from an engine process that is all that one sees."""
    model = save_random_model(tmp_path / "odd", {**LLAMA, "head_dim": 72, "num_attention_heads": 4})
    message = r"^SPLA does not support head size 72 \(supported: 32, 64.*\): remove --attention-backend spla$"
    with pytest.raises(ValueError, match=message) as refused, start(model):
        pass
    assert str(refused.value) in spla_log


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "torch.float64", r"dtype float64 \(supported: float16, bfloat16, float32\)"),
        ("kv_cache_dtype", "fp8", r"kv-cache dtype fp8 \(supported: auto, float16, bfloat16\)"),
        ("head_size", 72, "head size 72"),
        ("use_mla", True, "MLA layers"),
        ("use_sparse", True, "layers with sparse attention of their own"),
        ("use_non_causal", True, "attention that is not causal"),
    ],
)
def test_layer(field, value, message):
    """Layers of a model that has others beside: each is looked at."""
    from types import SimpleNamespace as Namespace

    from spla_backend.engine.checks import refuse_layer

    flags = ("use_mla", "use_sparse", "use_mm_prefix", "use_non_causal", "use_rswa")
    flags = dict.fromkeys((*flags, "use_per_head_quant_scales", "use_adaptive_verification"), False)
    layer = {"dtype": "torch.bfloat16", "kv_cache_dtype": "auto", "head_size": 64, **flags}
    refuse_layer(Namespace(**layer))
    with pytest.raises(ValueError, match=f"SPLA does not support {message}.*: remove --attention-backend spla"):
        refuse_layer(Namespace(**{**layer, field: value}))


@pytest.mark.parametrize(
    ("version", "dtype", "message"),
    [
        (2, "torch.bfloat16", "need FlashAttention 3 or 4, which vLLM has not for this GPU or this head size"),
        (3, "torch.float16", "sinks in float16 on a GPU, where FlashAttention takes them in bfloat16: set --dtype"),
    ],
)
def test_sinks_on_a_gpu(monkeypatch, version, dtype, message):
    from types import SimpleNamespace as Namespace

    from vllm.v1.attention.backends import fa_utils

    from spla_backend.engine.checks import refuse_sinks
    from spla_backend.options import SplaOptions

    refuse_sinks(dtype, 64, SplaOptions())
    monkeypatch.setattr("vllm.platforms.current_platform", Namespace(is_cuda=lambda: True))
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda head_size, has_sinks: version)
    with pytest.raises(ValueError, match=message):
        refuse_sinks(dtype, 64, SplaOptions())
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda head_size, has_sinks: 3)
    refuse_sinks("torch.bfloat16", 64, SplaOptions())


@pytest.mark.parametrize(
    ("name", "capability", "message"),
    [
        (
            "rocm",
            (9, 4),
            "SPLA has kernels for NVIDIA GPUs and for CPUs, none that were tried on rocm: remove --attention",
        ),
        ("cuda", (7, 5), r"SPLA has no kernels for a GPU of compute capability 7\.5, which .*: use a GPU of 8\.0"),
    ],
)
def test_devices(tiny_llama, monkeypatch, name, capability, message):
    """Before any process is started on them."""
    from types import SimpleNamespace as Namespace

    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms.interface import DeviceCapability

    from spla_backend.engine.checks import check_kernels, resolve_options

    config = EngineArgs(str(tiny_llama), attention_backend="spla").create_engine_config()
    check_kernels(config, resolve_options(config))
    platform = Namespace(
        device_name=name,
        is_cpu=lambda: False,
        is_cuda=lambda: name == "cuda",
        get_device_capability=lambda: DeviceCapability(*capability),
    )
    monkeypatch.setattr("vllm.platforms.current_platform", platform)
    with pytest.raises(ValueError, match=message):
        check_kernels(config, resolve_options(config))


def test_untested_vllm(tiny_llama, start, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.47.1")
    message = (
        "SPLA was not tested with vLLM 0.47.1, .*: install vLLM 0.32.x or 0.33.x, or a newer vllm-spla, or set "
        "VLLM_SPLA_ALLOW_UNTESTED_VLLM=1 to try it"
    )
    with pytest.raises(RefusedError, match=message), start(tiny_llama):
        pass


def test_untested_vllm_is_tried(tiny_llama, start, monkeypatch, spla_log):
    """With the variable, a version whose interfaces are all there starts and answers, and one is warned."""
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.47.2")
    monkeypatch.setenv("VLLM_SPLA_ALLOW_UNTESTED_VLLM", "1")
    with start(tiny_llama) as engine:
        assert len(engine.answer([[5, 6, 7]])[0].tokens) == 20
    assert any("SPLA was not tested with vLLM 0.47.2. All interfaces that it uses are there" in x for x in spla_log)


def test_untested_vllm_that_lacks_interfaces(tiny_llama, start, monkeypatch):
    import vllm
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.core.block_pool import BlockPool

    monkeypatch.setattr(vllm, "__version__", "0.47.3")
    monkeypatch.setenv("VLLM_SPLA_ALLOW_UNTESTED_VLLM", "1")
    monkeypatch.delattr(AttentionBackend, "customize_spec")
    monkeypatch.setattr(BlockPool, "get_new_blocks", lambda self, how_many: [])
    message = (
        r"SPLA uses vLLM's AttentionBackend.customize_spec, BlockPool.get_new_blocks\(num_blocks\), which vLLM 0.47.3 "
        "does not have: install vLLM 0.32.x or 0.33.x$"
    )
    with pytest.raises(RefusedError, match=message), start(tiny_llama):
        pass


def test_untested_vllm_without_spla(tiny_llama, start, monkeypatch):
    """An installed plugin must not break those who do not use it."""
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.47.1")
    with start(tiny_llama, backend=None) as engine:
        assert len(engine.answer([[5, 6, 7]])[0].tokens) == 20


def test_context_parallelism():
    from types import SimpleNamespace as Namespace

    import vllm

    from spla_backend.engine.checks import check_config

    assert vllm.__version__
    config = Namespace(
        model_config=Namespace(model="no-such-folder", use_mla=False, hf_text_config=None),
        cache_config=Namespace(block_size=64, cache_dtype="auto", kv_offloading_size=None),
        parallel_config=Namespace(decode_context_parallel_size=2, prefill_context_parallel_size=1),
        additional_config={},
    )
    with pytest.raises(ValueError, match=r"does not support context parallelism.*decode-context-parallel-size"):
        check_config(config)


def test_mla():
    from types import SimpleNamespace as Namespace

    from spla_backend.engine.checks import check_config

    config = Namespace(
        model_config=Namespace(model="no-such-folder", use_mla=True, hf_text_config=None),
        cache_config=Namespace(block_size=64, cache_dtype="auto", kv_offloading_size=None),
        parallel_config=Namespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        additional_config={},
    )
    with pytest.raises(ValueError, match="SPLA does not support MLA models"):
        check_config(config)


def test_what_cuda_kernels_lack(monkeypatch):
    """A user of a GPU is told at start-up, not when weights are loaded."""
    from types import SimpleNamespace as Namespace

    import torch
    from vllm.platforms import current_platform

    from spla_backend.engine.checks import check_config

    config = Namespace(
        model_config=Namespace(
            model="no-such-folder",
            use_mla=False,
            hf_text_config=Namespace(num_hidden_layers=2),
            dtype=torch.bfloat16,
            get_num_attention_heads=lambda parallel: 32,
            get_num_kv_heads=lambda parallel: 8,
            get_head_size=lambda: 128,
            get_total_num_kv_heads=lambda: 8,
            max_model_len=8192,
        ),
        cache_config=Namespace(block_size=64, cache_dtype="auto", kv_offloading_size=None),
        parallel_config=Namespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, tensor_parallel_size=8
        ),
        scheduler_config=Namespace(disable_hybrid_kv_cache_manager=False),
        kv_transfer_config=None,
        speculative_config=None,
        additional_config={"spla": {"residual": "linear", "feature_map": "elu1"}},
    )
    check_config(config)  # the CPU engine computes them
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    with pytest.raises(ValueError, match=r"SPLA on a GPU does not compute these options: feature_map 'elu1' has no"):
        check_config(config)
    config.additional_config = {"spla": {"fine_block_size": 8}}
    with pytest.raises(ValueError, match=r"SPLA on a GPU .*: fine_block_size 8 has no kernel, choose one of 16, 32"):
        check_config(config)
    config.additional_config = {"spla": {"fine_block_size": 16, "prefill_dense_below": 4096}}
    check_config(config)
    config.additional_config = {"spla": {"layer_budgets": {"0": 1024}}}
    check_config(config)
    config.additional_config = {"spla": {"residual": "linear"}}
    check_config(config)
    config.model_config.get_head_size = lambda: 256
    with pytest.raises(ValueError, match=r"residual 'linear' has no prefill on a GPU for heads of 256"):
        check_config(config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config.additional_config = {"spla": {"executor": "flashinfer"}}
    with pytest.raises(ValueError, match=r"SPLA on a GPU .*: executor 'flashinfer' needs the package flashinfer-pyt"):
        check_config(config)


def test_model_config_options(tmp_path, start):
    """`spla_config` in config.json counts, and the command line goes before it."""
    model = save_random_model(tmp_path / "configured", {**LLAMA, "spla_config": {"budget": 320, "selector": "mean"}})
    with start(model, options={"budget": 256}) as engine:
        layer = engine.runner.compilation_config.static_forward_context["model.layers.0.self_attn.attn"]
        assert (layer.impl.options.budget, layer.impl.options.selector) == (256, "mean")
        assert engine.answer([[5, 6, 7]])[0].tokens


def test_bad_request_loses_nothing(tiny_llama, start):
    """A request that is refused leaves the others alone."""
    from vllm.exceptions import VLLMValidationError

    with start(tiny_llama) as engine:
        expected = engine.answer([[5, 6, 7]])[0].tokens
        with pytest.raises(VLLMValidationError, match=r"maximum context length|max_model_len|longer than"):
            engine.answer([[5] * 5000])
        assert engine.answer([[5, 6, 7]])[0].tokens == expected


def test_feature_weights_on_a_gpu(tmp_path, monkeypatch):
    from types import SimpleNamespace as Namespace

    import torch
    from vllm.platforms import current_platform

    from spla_backend import learned
    from spla_backend.engine.checks import check_parameters
    from spla_backend.options import SplaOptions

    weights = learned.LayerParameters(feature_weight=torch.eye(8).repeat(2, 1, 1))
    learned.write(tmp_path / learned.FILE_NAME, {0: weights}, {})
    model = Namespace(
        model=str(tmp_path),
        hf_text_config=Namespace(num_hidden_layers=1, num_attention_heads=4),
        get_total_num_kv_heads=lambda: 2,
        get_head_size=lambda: 8,
    )
    config = Namespace(model_config=model, additional_config={"spla": {}})
    check_parameters(config, SplaOptions(residual="linear"))
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    with pytest.raises(ValueError, match="holds feature_weight, for which SPLA has no kernels on a GPU: use the CPU"):
        check_parameters(config, SplaOptions(residual="linear"))
