"""SmolLM2-135M-Instruct on real text: a budget that holds everything gives the dense answer."""

import pytest

from .conftest import Answer, start_engine

pytestmark = pytest.mark.engine

TOKENS = {"float32": 500, "bfloat16": 150}  # which processors without instructions for bfloat16 compute slowly


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, str], Answer]:
    """By backend and dtype."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    from spla_backend.models import gguf

    model = str(gguf.packaged("smollm2"))
    ids = AutoTokenizer.from_pretrained(model)("\n\n".join(topics.values()))["input_ids"]
    return {
        (backend or "dense", dtype): ask(model, backend, dtype, ids[:tokens])
        for dtype, tokens in TOKENS.items()
        for backend in (None, "spla")
    }


def ask(model: str, backend: str | None, dtype: str, ids: list[int]) -> Answer:
    with start_engine(model, backend, {"budget": 2048}, dtype=dtype, block_size=64) as engine:
        return engine.answer([ids], max_tokens=16)[0]


def distance(a: Answer, b: Answer) -> tuple[float, float]:
    """Mean and largest absolute difference of the prompt's logprobs."""
    differences = [abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)]
    return sum(differences) / len(differences), max(differences)


def test_float32(answers):
    mean, largest = distance(answers["dense", "float32"], answers["spla", "float32"])
    assert largest < 2e-2, (mean, largest)
    assert answers["dense", "float32"].tokens == answers["spla", "float32"].tokens


def test_bfloat16(answers):
    """In the dtype of the model, too; greedy tokens equal up to a near-tie, which changes the text from there on."""
    dense, spla = answers["dense", "bfloat16"], answers["spla", "bfloat16"]
    mean, largest = distance(dense, spla)
    assert largest < 2e-2, (mean, largest)
    first = next((i for i, (a, b) in enumerate(zip(dense.tokens, spla.tokens, strict=True)) if a != b), None)
    # Logits of about 16 are 0.06 to 0.125 apart in bfloat16.
    assert first is None or dense.margins[first] <= 0.125, (first, dense.margins)
