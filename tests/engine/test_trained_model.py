"""A trained folder served by the engine gives the log-probabilities that transformers gives while training."""

import pytest
import torch

from .conftest import LLAMA, PAGE, random_prompt, save_random_model, start_engine

pytestmark = pytest.mark.engine

VARIANTS = {
    "regression": {},
    # By keys: where a key differs in its last bit, its sketch may, and then a selection.
    "layers": {
        "dense_layers": [0],
        "layer_budgets": {2: 448},
        "selection_block_size": 16,
        "fine_source": "keys",
    },
    "linear": {"residual": "linear"},
    "double_rmsnorm": {"residual": "linear", "combine": "double_rmsnorm", "selector": "taylor2"},
}
PROMPTS = [random_prompt(length, seed=length) for length in (150, 333, 700)]


@pytest.mark.parametrize("name", VARIANTS)
def test_served_as_trained(tmp_path, name):
    from transformers import AutoModelForCausalLM

    from spla_backend.training import attach, save

    model = AutoModelForCausalLM.from_pretrained(save_random_model(tmp_path / "start", LLAMA)).eval()
    attach(model, {"budget": 192, **VARIANTS[name]}, PAGE, learn_features=name == "linear")
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        if ".spla." in parameter_name:  # gains and norm weights that differ by head
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    save(model, tmp_path / "trained")
    with start_engine(str(tmp_path / "trained"), additional_config={}) as engine:  # options are the folder's
        answers = engine.answer(PROMPTS, max_tokens=8)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        # What was generated, too: decode.
        ids = torch.tensor([prompt + answer.tokens])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        expected = logprobs[:-1].gather(-1, ids[0, 1:, None])[:, 0]
        ours = torch.tensor(answer.logprobs)
        torch.testing.assert_close(ours, expected[: len(prompt) - 1], rtol=0, atol=2e-4)
        assert logprobs[len(prompt) - 1 : -1].argmax(-1).tolist() == answer.tokens
