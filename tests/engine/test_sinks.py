"""gpt-oss: learned attention sinks, in layers with windows, which the platform's backend computes, and in layers of
full attention, which are SPLA's; heads of 64 in groups of 8."""

import pytest

from .conftest import PAGE, assert_same, random_prompt, save_random_model, start_engine

pytestmark = pytest.mark.engine

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "attention_bias": True,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "tie_word_embeddings": False,
    "dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROMPTS = [random_prompt(n, seed=n) for n in (5, 130, 600)]
SPARSE = {"budget": 6 * PAGE}


def save_gpt_oss(folder, seed: int = 0, std: float = 0.05, **config) -> str:
    """A random gpt-oss whose sinks take from next to nothing to most of a head's attention."""
    model = save_random_model(folder, {**GPT_OSS, **config}, std)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in weights.items():
        if name.endswith(".sinks"):
            tensor.copy_(3 + 3 * torch.randn(tensor.shape, generator=generator))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_gpt_oss(tmp_path_factory.mktemp("models") / "gpt-oss")


@pytest.fixture(scope="module")
def dense(model):
    with start_engine(model, backend=None) as engine:
        return engine.answer(PROMPTS)


@pytest.fixture(scope="module")
def sparse(model):
    with start_engine(model, options=SPARSE) as engine:
        return engine.answer(PROMPTS)


def largest_difference(a, b) -> float:
    return max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fine_block_size": 16, "statistics_dtype": "fp8"},
        {"selector": "quest", "residual": "none", "top_p": 0.9},
    ],
    ids=["compiled", "two-levels", "quest-top-p"],
)
def test_whole_budget_is_dense(model, dense, options):
    with start_engine(model, options={"budget": 1024, **options}) as engine:
        layers = engine.runner.compilation_config.static_forward_context
        backends = [layer.get_attn_backend().get_name() for layer in layers.values() if hasattr(layer, "impl")]
        assert sorted(backends) == ["CPU_ATTN"] * 2 + ["SPLA"] * 2
        assert_same(engine.answer(PROMPTS), dense)


def test_dense_layers(model, dense):
    with start_engine(model, options={**SPARSE, "dense_layers": [1]}) as engine:
        assert engine.answer(PROMPTS[2:])[0].logprobs != dense[2].logprobs
    with start_engine(model, options={"budget": 1024, "dense_layers": [3], "layer_budgets": {"1": 1024}}) as engine:
        assert_same(engine.answer(PROMPTS), dense)


def test_chunks_and_cached_prefixes(model, dense, sparse):
    assert largest_difference(sparse[2], dense[2]) > 1e-3
    arguments = {"max_num_batched_tokens": 100, "enable_prefix_caching": True}
    with start_engine(model, options=SPARSE, **arguments) as engine:
        for _ in range(2):
            assert_same(engine.answer(PROMPTS), sparse)


def test_operations_in_place_of_the_compiled_loop(model, sparse, monkeypatch):
    from spla_backend.kernels.cpu import attention

    monkeypatch.setattr(attention, "is_compiled", lambda params: False)
    with start_engine(model, options=SPARSE) as engine:
        assert_same(engine.answer(PROMPTS), sparse)


def test_sinks_that_are_set_again(model, sparse, tmp_path):
    """In place: what kernels hold is the model's own parameter. `reload_weights` of vLLM 0.32 leaves gpt-oss' as
    they are, with any backend."""
    other = save_gpt_oss(tmp_path / "other", seed=1)
    with start_engine(other, options=SPARSE) as engine:
        expected = engine.answer(PROMPTS)
    assert min(largest_difference(a, b) for a, b in zip(expected, sparse, strict=True)) > 1e-3
    with start_engine(model, options=SPARSE) as engine:
        assert_same(engine.answer(PROMPTS), sparse, tolerance=1e-6)
        found = load_file(f"{other}/model.safetensors")
        for name, parameter in engine.runner.model.named_parameters():
            if name.endswith(".sinks"):
                parameter.data.copy_(found[name.replace(".attn.", ".self_attn.")])
        assert_same(engine.answer(PROMPTS), expected, tolerance=1e-5)


def test_double_rmsnorm_is_refused(model, spla_log):
    options = {"combine": "double_rmsnorm", "residual": "linear"}
    with (
        pytest.raises(ValueError, match="would undo learned attention sinks") as refused,
        start_engine(model, options=options),
    ):
        pass
    assert str(refused.value) in spla_log
