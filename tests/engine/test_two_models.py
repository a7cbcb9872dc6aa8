"""Two models in one process, such as a draft beside its target: layers have their own options, pages and states."""

import pytest

from .conftest import LLAMA, PAGE, save_random_model

pytestmark = pytest.mark.engine

PREFIXES = ("model.layers.0.self_attn.attn", "draft_model.model.layers.0.self_attn.attn")


def configurations(tmp_path, options):
    from vllm.engine.arg_utils import EngineArgs

    for name, of_model in options.items():
        model = save_random_model(tmp_path / name, {**LLAMA, "spla_config": of_model})
        arguments = EngineArgs(model, attention_backend="spla", block_size=PAGE, skip_tokenizer_init=True)
        yield arguments.create_engine_config()


def test_layers_keep_their_options(tmp_path):
    """Both are constructed before weights of either are loaded, as nothing says that they are not."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.worker.utils import customize_attention_spec

    from spla_backend.kernels.layout import layouts
    from spla_backend.options import SplaOptions

    options = {
        "target": {"selector": "mean", "residual": "regression", "budget": 320, "dense_layers": [1]},
        "draft": {"selector": "km2-rem", "residual": "none", "budget": 192},
    }
    configs = list(configurations(tmp_path, options))
    layers = []
    for config, prefix in zip(configs, PREFIXES, strict=True):
        with set_current_vllm_config(config):
            layers.append(Attention(4, 64, 0.125, num_kv_heads=2, cache_config=config.cache_config, prefix=prefix))
    for layer in layers * 2:  # weights may be loaded again
        layer.process_weights_after_loading(torch.float32)
    rows = []
    for config, layer, of_model in zip(configs, layers, options.values(), strict=True):
        expected = SplaOptions.from_sources(of_model)
        assert layer.impl.options == layer.get_attn_backend().options == expected
        spec = customize_attention_spec(layer.get_attn_backend(), layer.get_kv_cache_spec(config))
        page, state = layouts(expected.parameters(PAGE), 64, spec.dtype)
        rows.append(page.rows)
        assert PAGE / spec.tokens_per_state == page.rows
        companion = config.compilation_config.static_forward_context.get(layer.layer_name + ".spla_state")
        assert (companion is None) == (expected.residual == "none")
        if companion is not None:
            spec = companion.get_kv_cache_spec(config)
            assert (PAGE / spec.tokens_per_state, spec.blocks_per_request) == (page.rows, state.num_blocks)
    assert rows[0] != rows[1]


def test_options_of_a_draft(tmp_path):
    """A draft takes the command line's options but those that name layers or a file of the target."""
    from types import SimpleNamespace as Namespace

    from spla_backend.engine.checks import resolve_options

    command_line = {"budget": 512, "dense_layers": [20], "layer_budgets": {"9": 256}, "parameters_file": "no-such-file"}
    model = Namespace(model=str(tmp_path), runner_type="draft", hf_text_config=Namespace(spla_config={"top_p": 0.9}))
    options = resolve_options(Namespace(model_config=model, additional_config={"spla": command_line}))
    assert (options.budget, options.top_p) == (512, 0.9)
    assert (options.dense_layers, options.layer_budgets, options.parameters_file) == ((), {}, None)


def test_state_takes_the_caches_geometry(tmp_path):
    """Whatever a layer's cache spec says of its pages, the state's blocks are such pages."""
    from dataclasses import fields, replace

    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.kv_cache_interface import AttentionSpec, KVQuantMode

    (config,) = configurations(tmp_path, {"model": {}})
    with set_current_vllm_config(config):
        layer = Attention(4, 64, 0.125, num_kv_heads=2, cache_config=config.cache_config, prefix=PREFIXES[0])
    layer.process_weights_after_loading(torch.float32)
    plain = layer.get_kv_cache_spec(config)
    special = replace(plain, kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD, max_tp_shards=2, page_size_padded=10**6)
    layer.get_kv_cache_spec = lambda config: special
    page = layer.get_attn_backend().customize_spec(special)
    state = config.compilation_config.static_forward_context[PREFIXES[0] + ".spla_state"].get_kv_cache_spec(config)
    for field in fields(AttentionSpec):
        if field.name != "dcp_sharded":
            assert getattr(state, field.name) == getattr(page, field.name), field.name


@pytest.mark.parametrize("change", [{"head_size_v": 32}, {"sliding_window": 128}, {"non_causal": True}])
def test_layers_of_another_kind(tmp_path, change):
    """Layers that ask for a backend as full attention does and are none: refused by name."""
    from dataclasses import replace

    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    class OtherAttention(Attention):
        def get_kv_cache_spec(self, vllm_config):
            return replace(super().get_kv_cache_spec(vllm_config), **change)

    (config,) = configurations(tmp_path, {"model": {}})
    with set_current_vllm_config(config):
        layer = OtherAttention(4, 64, 0.125, num_kv_heads=2, cache_config=config.cache_config, prefix=PREFIXES[0])
    with pytest.raises(ValueError, match=r"layers like model\.layers\.0\.self_attn\.attn, a OtherAttention with"):
        layer.process_weights_after_loading(torch.float32)
