"""Layers with budgets of their own, in one level and in two: the algorithm's answer, whatever the engine does."""

from functools import partial

import pytest
import torch

from spla_backend.options import SplaOptions

from .conftest import BUDGET, ONE_LEVEL, PAGE, assert_same, random_prompt, start_engine

pytestmark = pytest.mark.engine

OPTIONS = {"layer_budgets": {"0": 3 * PAGE, "2": 320}}  # layer 1 has BUDGET, between them
LENGTHS = (3 * PAGE + 1, BUDGET + 40, 450, 900)
PROMPTS = [random_prompt(n, seed=n) for n in LENGTHS]


TWO_LEVELS = {"fine_block_size": 16, "candidates": 1}


@pytest.fixture(
    scope="module",
    params=[
        ONE_LEVEL,
        {**TWO_LEVELS, "fine_source": "keys", "statistics_dtype": "auto"},
        {**TWO_LEVELS, "fine_source": "int4", "statistics_dtype": "fp8"},
    ],
    ids=["one-level", "two-levels", "two-levels-int4"],
)
def options(request):
    return OPTIONS | request.param


@pytest.fixture(scope="module")
def answers(tiny_llama, options):
    with start_engine(tiny_llama, options=options) as engine:
        return engine.answer(PROMPTS, max_tokens=2 * PAGE)


def differences(model, answers, visit):
    """From the log-probabilities of the prompts, and of the answers as parts of them, that `visit` leads to; of each
    token, ascending."""
    found = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = torch.tensor(model.logprobs(prompt + answer.tokens, visit))
        found.append((torch.tensor(answer.logprobs) - expected[: len(prompt) - 1]).abs())
        logits = model.run(prompt + answer.tokens[:-1], visit).logits[0, len(prompt) - 1 :]
        # Of a token of decode that the reference would not have chosen.
        found.append(logits.amax(-1) - logits.gather(-1, torch.tensor(answer.tokens)[:, None])[:, 0])
    return torch.cat(found).sort().values


def test_answers_are_the_references(tiny_llama, options, answers):
    from spla_backend.evaluate.capture import CapturingModel
    from spla_backend.evaluate.fidelity import attention

    model = CapturingModel(tiny_llama, head=True)
    layers = SplaOptions.from_sources({"budget": BUDGET, **options}).layers(PAGE, range(3))
    assert [params.budget_blocks for params in layers.values()] == [3, 6, 10]
    of_engine = differences(model, answers, partial(attention, params=layers))
    # Keys that differ in their last bit may have another code in a sketch, and then a token another selection.
    exact = of_engine[: int(0.95 * len(of_engine))] if options.get("fine_source") == "int4" else of_engine
    assert exact[-1] < 1e-4 and of_engine[-1] < 0.05
    # A budget in another layer's place would be seen.
    for i, j in ((0, 1), (1, 2)):
        swapped = layers | {i: layers[j], j: layers[i]}
        of_other = differences(model, answers, partial(attention, params=swapped))
        assert of_other[int(0.75 * len(of_other))] > 0.01 and of_other[-1] > 0.1


def test_chunks_and_cached_prefixes(tiny_llama, options, answers):
    with start_engine(tiny_llama, options=options, enable_prefix_caching=True, max_num_batched_tokens=100) as engine:
        for _ in range(2):
            again = engine.answer(PROMPTS, max_tokens=2 * PAGE, logprobs=False)
            assert [a.tokens for a in again] == [a.tokens for a in answers]
        assert all(a.cached_tokens > 0 for a in again)


def test_whole_budgets_are_dense(tiny_llama):
    with start_engine(tiny_llama, backend=None) as engine:
        dense = engine.answer(PROMPTS)
    with start_engine(tiny_llama, options={"layer_budgets": {"0": 1024, "1": 1056, "2": 2048}}) as engine:
        assert_same(engine.answer(PROMPTS), dense)
