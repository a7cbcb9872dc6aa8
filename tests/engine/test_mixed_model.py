"""A model that mixes sliding windows with full attention (Gemma 3): SPLA takes the full-attention layers, the
platform's own backend the others."""

import pytest

from .conftest import PAGE, assert_same, random_prompt, save_random_model

pytestmark = pytest.mark.engine

# Heads as those of Gemma-3-270M.
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_gemma3(tmp_path, start):
    model = save_random_model(tmp_path / "tiny-gemma3", GEMMA3, std=0.05)
    prompts = [random_prompt(n, seed=n) for n in (5, 130, 600)]
    with start(model, backend=None) as engine:
        dense = engine.answer(prompts)
    with start(model, options={"budget": 1024}) as engine:
        backends = {
            name: layer.get_attn_backend().get_name()
            for name, layer in engine.runner.compilation_config.static_forward_context.items()
        }
        assert sorted(backends.values()) == ["CPU_ATTN"] * 3 + ["SPLA"] * 3 + ["SPLA_STATE"] * 3
        assert_same(engine.answer(prompts), dense)
    with start(model, options={"budget": 6 * PAGE}) as engine:
        whole = engine.answer(prompts)
    assert whole[2].logprobs != dense[2].logprobs
    with start(model, options={"budget": 6 * PAGE}, max_num_batched_tokens=100, enable_prefix_caching=True) as engine:
        assert_same(engine.answer(prompts), whole)


LLAMA4 = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "hidden_size": 256,
    "intermediate_size": 512,
    "intermediate_size_mlp": 512,
    "num_hidden_layers": 4,
    "no_rope_layers": [1, 1, 0, 0],  # 0: full attention
    "attention_chunk_size": 128,
    "interleave_moe_layer_step": 100,  # none
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_llama4(tmp_path, start):
    """Chunked local attention, for which vLLM asks as for full attention, goes to the platform's backend too."""
    model = save_random_model(tmp_path / "tiny-llama4", LLAMA4, std=0.05)
    prompts = [random_prompt(n, seed=n) for n in (5, 130, 600)]
    with start(model, backend=None) as engine:
        dense = engine.answer(prompts)
    with start(model, options={"budget": 1024}) as engine:
        layers = engine.runner.compilation_config.static_forward_context
        backends = [layer.get_attn_backend().get_name() for layer in layers.values()]
        assert sorted(backends) == ["CPU_ATTN"] * 2 + ["SPLA"] * 2 + ["SPLA_STATE"] * 2
        assert_same(engine.answer(prompts), dense)
    with start(model, options={"budget": 6 * PAGE}) as engine:
        assert engine.answer(prompts)[2].logprobs != dense[2].logprobs


def test_no_layer_of_full_attention(tmp_path, start, spla_log):
    """Nothing is refused, but one is told that SPLA does nothing."""
    model = save_random_model(tmp_path / "windows", {**GEMMA3, "layer_types": ["sliding_attention"] * 6}, std=0.05)
    with start(model) as engine:
        assert engine.answer([[5, 6, 7]])[0].tokens
    assert any("SPLA computes no layer of" in line and "CPU_ATTN computes" in line for line in spla_log)
