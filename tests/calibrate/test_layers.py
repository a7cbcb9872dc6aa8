"""Layers left dense and budgets of the others: the choice, and `spla-calibrate --dense-layers` and `--budgets`."""

import json
import shutil

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from spla_backend import learned  # noqa: E402
from spla_backend.algorithm.parameters import SplaParameters  # noqa: E402
from spla_backend.calibrate import cli  # noqa: E402
from spla_backend.calibrate.costs import Continued  # noqa: E402
from spla_backend.calibrate.layers import FittedLayers, fit_layers  # noqa: E402
from spla_backend.calibrate.run import chosen_options  # noqa: E402
from spla_backend.evaluate.variants import ModelShape  # noqa: E402
from spla_backend.options import SplaOptions  # noqa: E402

from ..evaluate.test_capture import save  # noqa: E402
from ..evaluate.test_reports import model, text  # noqa: E402, F401 - fixtures
from .test_calibrate import calibrated, random_tokens  # noqa: E402

PARAMS = SplaParameters(page_size=16, selection_block=16, budget_blocks=5)


@pytest.fixture
def planted(tmp_path) -> Continued:
    """A model whose layer 2 looks things up, layer 1 does nothing, and layer 0 a little."""
    model = Continued(save(tmp_path, num_hidden_layers=3), head=True)  # noqa: F811
    with torch.no_grad():
        for layer, weight in zip(model.model.model.layers, (0.01, 0.0, 1.0), strict=True):
            layer.self_attn.o_proj.weight.mul_(weight)
    return model


def fit(model, **changes):  # noqa: F811
    documents = [random_tokens(300, seed) for seed in range(2)]
    arguments = {"num_dense": 0, "budgets": False, "tail": 64, "queries": 24, "report": lambda: None}
    return fit_layers(model, documents, dict.fromkeys(range(3), PARAMS), **arguments | changes)


def test_costliest_layers_are_left_dense(planted):
    found = fit(planted, num_dense=1)
    assert (found.dense, list(found.costs), found.budgets) == ((2,), [2, 0, 1], {})
    assert found.costs[2] > 3 * found.costs[0] > 0 and found.costs[1] == 0
    assert fit(planted, num_dense=2).dense == (0, 2)


def test_layer_that_does_not_matter_gets_least(planted):
    found = fit(planted, budgets=True)
    assert found.dense == () and found.budgets[1] == 3 and sum(found.budgets.values()) == 15
    assert found.budgets[2] > found.budgets[0]


def test_dense_layers_leave_the_others_their_budgets(planted):
    found = fit(planted, num_dense=1, budgets=True)
    assert found.dense == (2,) and found.budgets == {0: 7, 1: 3}


ARGUMENTS = ["--length", "192", "--page-size", "16"]
OPTIONS = '{"budget": 96, "selection_block_size": 16, "fine_block_size": 0, "residual_scale": 0.25}'


def test_budgets(model, text, tmp_path, capsys):  # noqa: F811
    output, result = calibrated(model, text, tmp_path, capsys, *ARGUMENTS, "--options", OPTIONS, "--budgets", "1")
    shape = ModelShape.of(model)
    options = shape.options({"parameters_file": str(output)})
    assert (options.budget, options.residual_scale) == (96, 0.25) and sorted(options.layer_budgets) == [0, 1]
    assert sum(options.layer_budgets.values()) == 2 * 96 and min(options.layer_budgets.values()) >= 48
    assert shape.options({"parameters_file": str(output), "budget": 128}).layer_budgets == {}
    assert not result["parameters"]  # no steps: gains stay, and the file holds none
    assert shape.learned({"parameters_file": str(output)}) == dict.fromkeys((0, 1), learned.LayerParameters())
    assert result["layer_budgets"] == {str(i): n for i, n in options.layer_budgets.items()}
    rows = {(row["variant"], row["end"]): row for row in result["rows"] if row["file"] == "all"}
    assert rows["after", 200]["bytes"] == rows["before", 200]["bytes"]


def test_dense_layers(model, text, tmp_path, capsys):  # noqa: F811
    arguments = [*ARGUMENTS, "--options", OPTIONS, "--dense-layers", "1"]
    output, result = calibrated(model, text, tmp_path, capsys, *arguments)
    (dense,) = result["dense_layers"]
    ranking = {row["layer"]: row["nats"] for row in result["layer_costs"]}
    assert list(ranking) == [dense, 1 - dense] and ranking[dense] > ranking[1 - dense] > 0
    shape, named = ModelShape.of(model), {"parameters_file": str(output)}
    assert shape.options(named).dense_layers == (dense,)
    assert shape.options({**named, "dense_layers": []}).dense_layers == ()
    rows = {row["variant"]: row for row in result["rows"] if row["file"] == "all"}
    assert rows["before"]["bytes"] < rows["after"]["bytes"] < rows["dense"]["bytes"]
    assert 0 < rows["after"]["difference"] != rows["before"]["difference"]


def test_all_at_once(model, text, tmp_path, capsys):  # noqa: F811
    """Dense first, then budgets of the others, then gains: the file holds them for whatever is left dense later."""
    arguments = [*ARGUMENTS, "--options", OPTIONS, "--dense-layers", "1", "--budgets", "1", "--steps", "1"]
    output, result = calibrated(model, text, tmp_path, capsys, *arguments)
    (dense,) = result["dense_layers"]
    assert result["layer_budgets"] == {str(1 - dense): 96} and [p["layer"] for p in result["parameters"]] == [1 - dense]
    shape = ModelShape.of(model)
    fitted = shape.learned({"parameters_file": str(output), "dense_layers": []})
    assert bool((fitted[dense].gain == 1).all()) and not bool((fitted[1 - dense].gain == 1).any())
    # A dense layer of the user's needs no budget of the file's.
    options = shape.options({"parameters_file": str(output), "dense_layers": [1 - dense]})
    assert options.dense_layers == (1 - dense,) and options.layer_budgets == {}


def test_learned_parameters_are_not_lost(model, text, tmp_path, capsys):  # noqa: F811
    """Options alone take no place of a file with gains."""
    arguments = [*ARGUMENTS, "--options", OPTIONS, "--dense-layers", "1"]
    output, result = calibrated(model, text, tmp_path, capsys, *arguments, "--steps", "1")
    before = output.read_bytes()
    command = ["--model", model, "--text", text, "--output", str(output), "--test-length", "200", *arguments]
    assert cli.main(command) == 1
    assert "holds learned parameters, and without --steps" in capsys.readouterr().err and output.read_bytes() == before
    assert result["settings"]["cost_windows"] == min(6, result["settings"]["windows"]) > 0


def test_layers_with_windows_are_not_splas(model, text, tmp_path, capsys):  # noqa: F811
    """Gemma 3: only layers of full attention are ranked, fitted and written."""
    folder = shutil.copytree(model, tmp_path / "mixed")
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    save(
        folder,
        architectures=["Gemma3ForCausalLM"],
        model_type="gemma3_text",
        num_hidden_layers=4,
        layer_types=kinds,
        sliding_window=48,
        query_pre_attn_scalar=32,
    )
    arguments = [*ARGUMENTS, "--options", OPTIONS, "--dense-layers", "1", "--steps", "1"]
    output, result = calibrated(str(folder), text, tmp_path, capsys, *arguments)
    assert {row["layer"] for row in result["layer_costs"]} == {1, 3} and set(result["dense_layers"]) < {1, 3}
    assert all(row["nats"] > 0 for row in result["layer_costs"])
    kept = learned.check(
        output,
        layers=[1, 3],
        num_heads=4,
        num_kv_heads=2,
        head_size=32,
        combine="shared_normalizer",
        residual="regression",
    )
    assert kept
    shape = ModelShape.of(str(folder))
    assert shape.attention_layers == (1, 3) and sorted(shape.learned({"parameters_file": str(output)})) == [
        i for i in (1, 3) if i not in result["dense_layers"]
    ]
    with pytest.raises(ValueError, match="layer"):
        shape.options({"dense_layers": [0]}).check_layers(shape.attention_layers)


def test_layers_that_are_named_stay_dense():
    options = SplaOptions.from_sources({"budget": 96, "dense_layers": [3], "layer_budgets": {"0": 192, "1": 64}})
    chosen = chosen_options(options, FittedLayers({}, (1,), {}), 16)
    assert chosen.dense_layers == (1, 3) and chosen.layer_budgets == {0: 192}


@pytest.mark.parametrize(
    ("config", "flag"),
    [({"dense_layers": []}, "--dense-layers"), ({"layer_budgets": {}}, "--budgets"), ({"budget": 96}, "--budgets")],
)
def test_config_that_goes_before_what_is_written(model, text, tmp_path, capsys, config, flag):  # noqa: F811
    folder = shutil.copytree(model, tmp_path / "model")
    of_model = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(of_model | {"spla_config": config}))
    arguments = ["--model", str(folder), "--text", text, *ARGUMENTS, "--options", OPTIONS, "--test-length", "200"]
    assert cli.main([*arguments, flag, "1"]) == 1
    message = f"{next(iter(config))} of spla_config in the model's config.json goes before what {flag} writes"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--dense-layers", "2"], "--dense-layers 2 leaves SPLA none of the 2 layers that it computes: give at most 1"),
        (
            ["--dense-layers", "1", "--options", '{"budget": 96, "dense_layers": [0]}'],
            "--dense-layers 1 leaves SPLA none of the 1 layers",
        ),
        (
            ["--dense-layers", "1", "--features", "--options", '{"budget": 96, "residual": "linear"}'],
            "--features is fitted in steps, and there are none",
        ),
    ],
)
def test_refused(model, text, capsys, changes, message):  # noqa: F811
    arguments = ["--model", model, "--text", text, "--length", "192", "--test-length", "200", "--page-size", "16"]
    assert cli.main([*arguments, "--options", OPTIONS, *changes]) == 1
    assert message in capsys.readouterr().err
