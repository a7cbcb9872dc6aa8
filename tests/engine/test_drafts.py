"""Speculative decoding: draft models, which have blocks of their own beside those of the target and of its state, and
drafts that are cut off at the model's length."""

import pytest

from .conftest import LLAMA, random_prompt, save_random_model

pytestmark = pytest.mark.engine

PROMPTS = [random_prompt(n, seed=n) for n in (5, 150, 700)]
NUM_DRAFTS, NUM_TOKENS = 3, 40


def accepted(engine) -> tuple[int, int]:
    """How many tokens were drafted, and how many of them accepted."""
    counts = {metric.name: metric.value for metric in engine.llm.get_metrics() if hasattr(metric, "value")}
    return (
        counts["vllm:spec_decode_num_draft_tokens"],
        counts["vllm:spec_decode_num_accepted_tokens"],
    )


@pytest.mark.parametrize("options", [{"budget": 1024}, {"budget": 192}])
def test_draft_model(tiny_llama, start, options):
    """A draft that is the target itself is always right where a budget holds everything, and never changes a token."""
    with start(tiny_llama, options=options) as engine:
        expected = engine.answer(PROMPTS, max_tokens=NUM_TOKENS, logprobs=False)
    drafts = {"method": "draft_model", "model": tiny_llama, "num_speculative_tokens": NUM_DRAFTS}
    with start(tiny_llama, options=options, speculative_config=drafts, disable_log_stats=False) as engine:
        answers = engine.answer(PROMPTS, max_tokens=NUM_TOKENS, logprobs=False)
        drafted, right = accepted(engine)
    assert [a.tokens for a in answers] == [a.tokens for a in expected]
    assert drafted >= len(PROMPTS) * (NUM_TOKENS - 1) // (NUM_DRAFTS + 1) * NUM_DRAFTS
    assert right == drafted if options["budget"] == 1024 else right > drafted // 4


def test_smaller_draft(tmp_path, start):
    """One layer beside three makes groups of one layer. The other two of the target add nothing: drafts are right."""
    from safetensors.torch import load_file, save_file

    target = save_random_model(tmp_path / "target", LLAMA)
    draft = save_random_model(tmp_path / "draft", {**LLAMA, "num_hidden_layers": 1})
    weights = load_file(f"{target}/model.safetensors")
    for name in weights:
        if ("layers.1" in name or "layers.2" in name) and ("o_proj" in name or "down_proj" in name):
            weights[name].zero_()
    save_file(weights, f"{target}/model.safetensors", {"format": "pt"})
    of_draft = {name: w for name, w in weights.items() if "layers.1" not in name and "layers.2" not in name}
    save_file(of_draft, f"{draft}/model.safetensors", {"format": "pt"})
    drafts = {"method": "draft_model", "model": draft, "num_speculative_tokens": NUM_DRAFTS}
    options = {"budget": 1024}
    with start(target, options=options) as engine:
        expected = engine.answer(PROMPTS, max_tokens=NUM_TOKENS, logprobs=False)
    with start(target, options=options, speculative_config=drafts, disable_log_stats=False) as engine:
        assert len(engine.runner.kv_cache_config.kv_cache_groups) == 7
        answers = engine.answer(PROMPTS, max_tokens=NUM_TOKENS, logprobs=False)
        drafted, right = accepted(engine)
    assert [a.tokens for a in answers] == [a.tokens for a in expected]
    assert right == drafted > 0


@pytest.mark.parametrize(
    ("method", "options"),
    [("draft_model", {}), ("ngram", {"prefill_dense_below": 1024})],
    ids=["draft-model-select", "ngram-dense-prompts"],
)
def test_drafts_cut_off(tiny_llama, start, monkeypatch, method, options):
    """Up to the last token of `max_model_len`, where rows of one step have unequal numbers of drafts: all of them are
    decode rows, and the tokens are those without drafts."""
    from spla_backend.engine.builder import SplaMetadataBuilder

    limit, steps, original = 300, [], SplaMetadataBuilder._step

    def step(self, common):
        result = original(self, common)
        steps.append((common.query_start_loc_cpu.diff().tolist(), result.num_decodes))
        return result

    phrase = random_prompt(11, seed=0)
    prompts = [(phrase * 30)[:n] for n in (6, 150, 195, 230, 258, 291, 296, 299)]
    drafts = {"method": method, "num_speculative_tokens": 4}
    drafts |= {"model": tiny_llama} if method == "draft_model" else {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    with start(tiny_llama, options=options, max_model_len=limit) as engine:
        expected = engine.answer(prompts, max_tokens=limit, logprobs=False)
    monkeypatch.setattr(SplaMetadataBuilder, "_step", step)
    arguments = {"speculative_config": drafts, "disable_log_stats": False}
    with start(tiny_llama, options=options, max_model_len=limit, **arguments) as engine:
        answers = engine.answer(prompts, max_tokens=limit, logprobs=False)
        drafted, right = accepted(engine)
    assert [len(p) + len(a.tokens) for p, a in zip(prompts, answers, strict=True)] == [limit] * len(prompts)
    assert [a.tokens for a in answers] == [a.tokens for a in expected]
    assert drafted > right > 0
    unequal = [(lens, n) for lens, n in steps if max(lens) <= 5 and len(set(lens)) > 1]
    assert len(unequal) > 5 and all(n == len(lens) for lens, n in unequal)
