"""A real engine gives the log-probabilities and completions that transformers does with the same attention."""

import weakref
from functools import partial

import pytest

from ..engine.conftest import start_engine  # noqa: F401 - sets the environment before vLLM is imported

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from spla_backend.evaluate import engines  # noqa: E402
from spla_backend.evaluate.capture import CapturingModel  # noqa: E402
from spla_backend.evaluate.fidelity import attention  # noqa: E402
from spla_backend.evaluate.variants import Variant, parameters_of  # noqa: E402

from .test_reports import model  # noqa: E402, F401 - a fixture

pytestmark = pytest.mark.engine

PAGE = 32
MAX_TOKENS = (4, 7, 2, 1)


@torch.inference_mode()
def test_against_transformers(model):  # noqa: F811
    long = torch.randint(1, 200, (250,), generator=torch.Generator().manual_seed(0)).tolist()
    documents = [[*range(10, 90)], [*range(30, 150)], [*range(5, 25)], long]
    variant = Variant("spla", {"budget": 128, "selection_block_size": 16, "selector": "km2-rem", "fine_block_size": 0})
    engine_args = {"dtype": "float32", "max_num_batched_tokens": 256}
    with engines.start(model, variant, PAGE, 256, engine_args) as llm:
        assert llm.llm_engine.vllm_config.additional_config == {"spla": variant.options}
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        runner = weakref.ref(worker.model_runner)
        del worker
        found = engines.prompt_logprobs(llm, documents, "losses")
        texts = engines.complete(llm, documents, MAX_TOKENS, "answers")

    assert runner() is None, "the engine's memory is not free"

    dense = CapturingModel(model, head=True)
    visit = partial(attention, params=parameters_of(variant, PAGE, None))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    for tokens, logprobs, text, count in zip(documents, found, texts, MAX_TOKENS, strict=True):
        expected = torch.tensor(dense.logprobs(tokens, visit))
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-3, rtol=1e-3)
        ids = list(tokens)
        for _ in range(count):
            ids.append(int(dense.run(ids, visit).logits[0, -1].argmax()))
        assert text.split() == tokenizer.decode(ids[len(tokens) :]).split()
    # The long document is beyond the budget: dense attention would have been seen.
    assert (torch.tensor(found[-1]) - torch.tensor(dense.logprobs(long, None))).abs().max() > 1e-2
