"""`spla-calibrate` on a small random model: gradients are right, the loss falls, the file fits the model."""

import json
from dataclasses import replace
from functools import partial

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from spla_backend import learned  # noqa: E402
from spla_backend.algorithm.parameters import SplaParameters  # noqa: E402
from spla_backend.calibrate import cli  # noqa: E402
from spla_backend.calibrate.fit import HeadParameters, divergence, fit  # noqa: E402
from spla_backend.evaluate.capture import CapturingModel  # noqa: E402
from spla_backend.evaluate.fidelity import attention  # noqa: E402
from spla_backend.evaluate.variants import ModelShape  # noqa: E402

from ..evaluate.test_capture import save  # noqa: E402
from ..evaluate.test_reports import model, text  # noqa: E402, F401 - fixtures

LAYERS, HEADS = 2, 4
PARAMS = SplaParameters(page_size=16, selection_block=16, budget_blocks=4, selector="km2-rem")


def random_parameters(params=PARAMS) -> HeadParameters:
    fitted = HeadParameters(range(LAYERS), HEADS, params, "cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        fitted.log_gain.copy_(torch.randn(LAYERS, HEADS, generator=generator))
        if fitted.scale is not None:
            fitted.scale.copy_(torch.rand(LAYERS, 1, generator=generator))
    return fitted


def random_tokens(length: int, seed: int) -> list[int]:
    return torch.randint(3, 200, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_gradients(tmp_path):
    """Of the last layer's parameters, which change no selection, against differences of the loss."""
    model, tokens = CapturingModel(save(tmp_path), head=True), random_tokens(150, 1)  # noqa: F811
    fitted = random_parameters()
    teacher = model.run(tokens, None).logits[0, 64:].clone()

    def loss() -> torch.Tensor:
        return divergence(
            teacher, model.forward(tokens, partial(attention, params=PARAMS, learned=fitted.layers())).logits[0, 64:]
        )

    loss().backward()
    for parameter in fitted.groups(1.0)[0]["params"]:
        assert parameter.grad[0].abs().min() > 0  # and they reach the first layer through the second
        for head in range(parameter.shape[1]):
            ends = []
            for step in (0.02, -0.04):
                with torch.no_grad():
                    parameter[-1, head] += step
                    ends.append(loss().item())
            with torch.no_grad():
                parameter[-1, head] += 0.02
            slope = (ends[0] - ends[1]) / 0.04
            assert slope == pytest.approx(parameter.grad[-1, head].item(), rel=0.05, abs=1e-4)


def test_fit_lowers_the_divergence(tmp_path):
    model = CapturingModel(save(tmp_path), head=True)  # noqa: F811
    documents = [random_tokens(150, seed) for seed in range(2)]
    fitted, seen = HeadParameters(range(LAYERS), HEADS, PARAMS, "cpu"), []
    fit(model, documents, dict.fromkeys(range(LAYERS), PARAMS), fitted, steps=16, learning_rate=0.1, report=seen.append)
    assert sum(seen[-4:]) < 0.97 * sum(seen[:4])
    assert all(torch.isfinite(t).all() for t in fitted.groups(1.0)[0]["params"])


def test_fitted_features_lower_it_further(tmp_path):
    model = CapturingModel(save(tmp_path), head=True)  # noqa: F811
    params, ends = replace(PARAMS, residual="linear"), {}
    for features in (None, (2, 32)):
        fitted, seen = HeadParameters(range(LAYERS), HEADS, params, "cpu", features), []
        layers = dict.fromkeys(range(LAYERS), params)
        fit(model, [random_tokens(150, 0)], layers, fitted, steps=12, learning_rate=0.4, report=seen.append)
        ends[features] = seen[-1]
    assert ends[2, 32] < 0.97 * ends[None]
    assert (fitted.feature_weight - torch.eye(32)).abs().amax((1, 2, 3)).min() > 1e-3


def calibrated(model, text, folder, capsys, *arguments):  # noqa: F811
    """The file and the report that the command writes."""
    output, report = folder / "fitted.safetensors", folder / "report.json"
    files = ["--model", model, "--text", text, "--output", str(output), "--report", str(report)]
    assert cli.main([*files, "--test-length", "200", *arguments]) == 0
    assert "after - before: " in capsys.readouterr().out
    return output, json.loads(report.read_text())


def test_command(model, text, tmp_path, capsys):  # noqa: F811
    arguments = ["--length", "160", "--steps", "3", "--page-size", "32"]
    two_levels = {"fine_block_size": 16, "candidates": 128, "fine_source": "int4"}  # dense up to 128 tokens
    arguments += ["--options", json.dumps({"budget": 64, "selector": "mean", "last_blocks": 1, **two_levels})]
    output, result = calibrated(model, text, tmp_path, capsys, *arguments)
    shape = ModelShape.of(model)
    learned.check(
        output,
        layers=range(2),
        num_heads=4,
        num_kv_heads=2,
        head_size=32,
        combine="shared_normalizer",
        residual="regression",
    )
    options = shape.options({"parameters_file": str(output)})
    assert (options.budget, options.selector, options.selection_block_size) == (64, "mean", 32)
    assert {name: getattr(options, name) for name in two_levels} == two_levels
    assert shape.options({"parameters_file": str(output), "budget": 64 + 32}).budget == 96

    assert result["kind"] == "calibration" and len(result["divergence_of_steps"]) == 3
    rows = {row["variant"]: row for row in result["rows"] if row["file"] == "all"}
    assert set(rows) == {"dense", "no residual", "before", "after"} and rows["dense"]["difference"] == 0
    assert rows["after"]["loss"] != rows["before"]["loss"] and "against_none" in rows["after"]
    # Held-out text begins the file: (600 - 200) // 160 windows are left.
    assert result["settings"]["windows"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--options", '{"budget": 96, "residual": "none"}'], "fits the residual under a shared normaliser"),
        (["--length", "96"], "hardly go beyond the 96 up to which"),
        (["--length", "500"], "tokens behind the first 200, less than one document of 500"),
        (["--output", "/nowhere/file"], "cannot write /nowhere/file: there is no folder"),
    ],
)
def test_refused(model, text, capsys, changes, message):  # noqa: F811
    arguments = ["--model", model, "--text", text, "--length", "128", "--test-length", "200", "--steps", "1"]
    options = '{"budget": 96, "fine_block_size": 0}'
    assert cli.main([*arguments, "--page-size", "32", "--options", options, *changes]) == 1
    assert message in capsys.readouterr().err
