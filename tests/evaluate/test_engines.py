"""A real engine: prompt log-probabilities and completions are those of transformers."""

import pytest

from ..engine.conftest import start_engine  # noqa: F401 - sets the environment before vLLM is imported

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from spla_backend.evaluate import engines  # noqa: E402
from spla_backend.evaluate.variants import Variant  # noqa: E402

from .test_reports import model  # noqa: E402, F401 - a fixture

pytestmark = pytest.mark.engine


@torch.inference_mode()
def test_against_transformers(model):  # noqa: F811
    documents = [[*range(10, 90)], [*range(30, 150)], [*range(5, 25)]]
    variant = Variant("spla", {"budget": 256, "selection_block_size": 32})
    engine_args = {"dtype": "float32", "max_num_batched_tokens": 256}
    with engines.start(model, variant, 32, 256, engine_args) as llm:
        assert llm.llm_engine.vllm_config.additional_config == {"spla": variant.options}
        found = engines.prompt_logprobs(llm, documents, "losses")
        texts = engines.complete(llm, documents, [4, 7, 2], "answers")

    expected = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    for tokens, logprobs, text, count in zip(documents, found, texts, (4, 7, 2), strict=True):
        ids = torch.tensor([tokens])
        reference = expected(ids).logits[0].log_softmax(-1)
        wanted = reference[:-1].gather(-1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), wanted, atol=1e-3, rtol=1e-3)
        for _ in range(count):
            ids = torch.cat([ids, expected(ids).logits[:, -1:].argmax(-1)], 1)
        assert text.split() == tokenizer.decode(ids[0, len(tokens) :]).split()
