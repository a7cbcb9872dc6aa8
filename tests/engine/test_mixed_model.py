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
