"""Captured queries, keys and values are what the model's attention sees."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from spla_backend.algorithm import reference  # noqa: E402
from spla_backend.algorithm.parameters import SplaParameters  # noqa: E402
from spla_backend.evaluate import capture  # noqa: E402
from spla_backend.evaluate.capture import AttentionInputs, CapturingModel  # noqa: E402
from spla_backend.evaluate.fidelity import attention  # noqa: E402

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 200,
    "max_position_embeddings": 512,
}
# Heads, their size and norms as in Gemma-3-270M, another scale than theirs.
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 16,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 64,
    "final_logit_softcapping": 20.0,
}
TOKENS = list(range(3, 103))


def save(folder, std=0.2, **changes) -> str:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0.0, std)
    model.save_pretrained(folder)
    return str(folder)


def test_attention_from_the_captured_tensors(tmp_path):
    model = CapturingModel(save(tmp_path))
    seen: list[AttentionInputs] = []
    outputs = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0][0]))
    model.run(TOKENS, seen.append)
    assert [inputs.layer for inputs in seen] == [0, 1]
    for inputs, expected in zip(seen, outputs, strict=True):
        assert inputs.q.shape == (4, 100, 32) and inputs.k.shape == inputs.v.shape == (2, 100, 32)
        k, v = (x.repeat_interleave(2, 0) for x in (inputs.k, inputs.v))
        logits = (inputs.q @ k.mT).masked_fill(torch.ones(100, 100).triu(1).bool(), -torch.inf)
        output = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)  # [tokens, heads * head_size]
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    # Keys after RoPE depend on the position, whatever the token.
    repeated: list[AttentionInputs] = []
    model.run([7] * 50, repeated.append)
    assert not torch.allclose(repeated[0].k[:, 3], repeated[0].k[:, 30], atol=1e-2)
    torch.testing.assert_close(repeated[0].v[:, 3], repeated[0].v[:, 30])


def test_two_models_do_not_mix(tmp_path):
    first, second = (CapturingModel(save(tmp_path)) for _ in range(2))
    seen: list[AttentionInputs] = []
    first.run(TOKENS, seen.append)
    second.run(TOKENS, lambda inputs: None)
    assert len(seen) == 2


def test_windowed_layers_are_left_out(tmp_path):
    window = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16}
    seen: list[AttentionInputs] = []
    CapturingModel(save(tmp_path, **window)).run(TOKENS, seen.append)
    assert seen == []


def test_logprobs(tmp_path):
    path = save(tmp_path)
    expected = transformers.AutoModelForCausalLM.from_pretrained(path)(torch.tensor([TOKENS])).logits[0].log_softmax(-1)
    found = CapturingModel(path, head=True).logprobs(TOKENS, None)
    torch.testing.assert_close(torch.tensor(found), expected[:-1].gather(-1, torch.tensor(TOKENS[1:])[:, None])[:, 0])


def test_gemma3_in_pieces(tmp_path, monkeypatch):
    """Layers with windows a few queries at a time, logits a few rows at a time, the head's own softcap among them; a
    budget that holds everything is dense attention."""
    monkeypatch.setattr(capture, "_QUERIES", 24)
    monkeypatch.setattr(capture, "_LOGITS", 7 * CONFIG["vocab_size"])
    path = save(tmp_path, **GEMMA3)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = (
        model(torch.tensor([TOKENS])).logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(TOKENS[1:])[:, None])
    )
    capturing, layers = CapturingModel(path, head=True), []
    torch.testing.assert_close(torch.tensor(capturing.logprobs(TOKENS, None)), expected[:, 0], atol=1e-4, rtol=1e-4)

    def visit(inputs: AttentionInputs) -> torch.Tensor:
        layers.append(inputs.layer)
        return attention(inputs, SplaParameters(page_size=16, selection_block=16, budget_blocks=7))

    found = torch.tensor(capturing.logprobs(TOKENS, visit))
    assert layers == [1]
    torch.testing.assert_close(found, expected[:, 0], atol=1e-4, rtol=1e-4)


def test_attention_in_place_of_the_models(tmp_path):
    """With everything in the budget nothing changes; with less it is the reference's output that goes on."""
    model = CapturingModel(save(tmp_path), head=True)

    def logprobs(budget_blocks: int) -> torch.Tensor:
        params = SplaParameters(page_size=16, selection_block=16, budget_blocks=budget_blocks)
        return torch.tensor(model.logprobs(TOKENS, lambda inputs: attention(inputs, params)))

    dense = torch.tensor(model.logprobs(TOKENS, None))
    torch.testing.assert_close(logprobs(7), dense, atol=1e-4, rtol=1e-4)
    sparse = logprobs(4)
    torch.testing.assert_close(sparse[:63], dense[:63], atol=1e-4, rtol=1e-4)  # within the budget
    assert (sparse[64:] - dense[64:]).abs().max() > 1e-2


@torch.inference_mode()
def test_attention_is_the_references(tmp_path):
    params = SplaParameters(page_size=16, selection_block=16, budget_blocks=4)
    seen: list[AttentionInputs] = []
    CapturingModel(save(tmp_path)).run(TOKENS, seen.append)
    q, k, v = (x.transpose(0, 1).double() for x in (seen[0].q, seen[0].k, seen[0].v))
    expected = reference.spla_sequence(q, k, v, params).transpose(0, 1).float()
    torch.testing.assert_close(attention(seen[0], params), expected, atol=1e-4, rtol=1e-3)


def test_no_model(tmp_path):
    with pytest.raises(ValueError, match="cannot load"):
        CapturingModel(str(tmp_path))


def test_sinks_are_refused(tmp_path):
    """They would be left out without a word."""
    changes = {"num_local_experts": 2, "num_experts_per_tok": 1, "architectures": ["GptOssForCausalLM"]}
    model = CapturingModel(save(tmp_path, model_type="gpt_oss", **changes))
    with pytest.raises(ValueError, match="GptOssAttention has learned attention sinks, which transformers' SDPA"):
        model.run(TOKENS, None)
