"""Learned parameters beside a model's weights change the engine's answer as they change the algorithm's."""

import shutil
from functools import partial
from pathlib import Path

import pytest

from .conftest import BUDGET, LLAMA, ONE_LEVEL, PAGE, assert_same, random_prompt

pytestmark = pytest.mark.engine

torch = pytest.importorskip("torch")

from spla_backend import learned  # noqa: E402
from spla_backend.evaluate.capture import CapturingModel  # noqa: E402
from spla_backend.evaluate.fidelity import attention  # noqa: E402
from spla_backend.evaluate.variants import Variant, parameters_of  # noqa: E402
from spla_backend.options import RefusedError, SplaOptions  # noqa: E402

LAYERS, HEADS, SIZE = LLAMA["num_hidden_layers"], LLAMA["num_attention_heads"], LLAMA["head_dim"]
PROMPTS = [random_prompt(n, seed=n) for n in (BUDGET + 1, 500)]


@pytest.fixture
def model(tiny_llama, tmp_path) -> Path:
    """A copy of the model, to put a file beside its weights."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def gains(value) -> dict[int, learned.LayerParameters]:
    return {i: learned.LayerParameters(gain=value(i)) for i in range(LAYERS)}


def expected(model: Path, prompt: list[int], options, parameters) -> list[float]:
    params = parameters_of(Variant("spla", {**ONE_LEVEL, **options}), PAGE, None)
    return CapturingModel(str(model), head=True).logprobs(prompt, partial(attention, params=params, learned=parameters))


def difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def test_gains(model, start):
    """As the algorithm says; the file's options count, the command line's (the budget) go before them."""
    generator = torch.Generator().manual_seed(0)
    parameters = {
        i: learned.LayerParameters(
            gain=torch.rand(HEADS, generator=generator) * 3, residual_scale=torch.rand(1, generator=generator)
        )
        for i in range(LAYERS)
    }
    options = {"selector": "km2-rem", "selection_block_size": 16, "budget": BUDGET}
    learned.write(model / learned.FILE_NAME, parameters, options | {"budget": 640})
    with start(str(model)) as engine:
        answers = engine.answer(PROMPTS)
        for layer in engine.runner.model.model.layers:  # as when weights are loaded again
            layer.self_attn.attn.process_weights_after_loading(torch.float32)
        assert_same(engine.answer(PROMPTS), answers, tolerance=1e-6)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert difference(answer.logprobs, expected(model, prompt, options, parameters)) < 1e-3
    assert difference(answers[1].logprobs, expected(model, PROMPTS[1], options, None)) > 5e-3


def test_a_file_of_options_alone(model, start):
    """Layers as `spla-calibrate` chooses them. Dense layers of the command line go before the file's, and before its
    budgets."""
    of_file = {"budget": BUDGET, "dense_layers": [1], "layer_budgets": {"0": 2 * BUDGET}}
    learned.write(model / learned.FILE_NAME, {}, of_file)
    for options, layers in (({}, of_file), ({"dense_layers": [0]}, {"budget": BUDGET, "dense_layers": [0]})):
        with start(str(model), additional_config={"spla": options}) as engine:
            (answer,) = engine.answer(PROMPTS[1:])
        params = SplaOptions.from_sources(layers, ONE_LEVEL).layers(PAGE, range(LAYERS))
        wanted = CapturingModel(str(model), head=True).logprobs(PROMPTS[1], partial(attention, params=params))
        assert difference(answer.logprobs, wanted) < 1e-3
        assert difference(answer.logprobs, expected(model, PROMPTS[1], {"budget": BUDGET}, None)) > 5e-3


def test_no_gain_is_no_residual(model, start):
    learned.write(model / learned.FILE_NAME, gains(lambda i: torch.zeros(HEADS)), {})
    with start(str(model)) as engine:
        answers = engine.answer(PROMPTS)
    with start(str(model), options={"residual": "none"}) as engine:
        assert_same(answers, engine.answer(PROMPTS), tolerance=1e-6)


def test_norms(model, start):
    generator = torch.Generator().manual_seed(0)
    parameters = {
        i: learned.LayerParameters(
            exact_norm=torch.rand(HEADS, SIZE, generator=generator) + 0.5,
            tail_norm=torch.randn(HEADS, SIZE, generator=generator) * 0.3,
        )
        for i in range(LAYERS)
    }
    options = {"residual": "linear", "combine": "double_rmsnorm", "selector": "taylor2"}
    learned.write(model / "trained.safetensors", parameters, options)
    with start(str(model), options={"parameters_file": "trained.safetensors"}) as engine:
        answers = engine.answer(PROMPTS)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        wanted = expected(model, prompt, options | {"budget": BUDGET}, parameters)
        assert difference(answer.logprobs, wanted) < 1e-3


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        (gains(lambda i: torch.ones(HEADS + 1)), {}, r"layers.0.gain is F32 \[5\] and should be F32 \[4\]"),
        ({0: learned.LayerParameters(gain=torch.ones(HEADS))}, {}, "lacks layers.1.gain, .*SPLA computes 0-2"),
        (gains(lambda i: torch.ones(HEADS)), {"parameters_file": "gone"}, "finds no file .* at gone"),
        (gains(lambda i: torch.ones(HEADS)), {"parameters_file": 3}, "must be the path of a file or 'none', not 3"),
    ],
    ids=["shape", "missing", "gone", "type"],
)  # fmt: skip
def test_refused(model, start, layers, options, message):
    learned.write(model / learned.FILE_NAME, layers, {})
    with pytest.raises(RefusedError, match=message), start(str(model), options=options):
        pass
