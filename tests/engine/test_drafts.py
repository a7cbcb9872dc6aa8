"""Speculative decoding with a draft model: it has blocks of its own, beside those of the target and of its state."""

import pytest

from .conftest import random_prompt

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
