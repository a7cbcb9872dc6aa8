"""What the command line takes and refuses: variants, documents, buckets, plots."""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spla_backend.evaluate import cli, report
from spla_backend.evaluate.documents import cut_documents
from spla_backend.evaluate.perplexity import SEGMENT, buckets_of, compare, looks_dense
from spla_backend.evaluate.variants import (
    ModelShape,
    Variant,
    bytes_read,
    layers_of,
    mean_bytes_read,
    parameters_of,
    parse_variants,
)
from spla_backend.kernels.layout import PageLayout, layouts


class Words:
    """A tokenizer that knows words by their numbers, and begins every text with 1."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [int(word) for word in text.split()]}


def write(folder: Path, name: str, words: int) -> str:
    path = folder / name
    path.write_text(" ".join(str(i) for i in range(100, 100 + words)))
    return str(path)


def test_documents(tmp_path):
    long, short = write(tmp_path, "long", 50), write(tmp_path, "short", 9)
    documents = cut_documents([long, short], Words(), 10, None)
    assert [d.file for d in documents] == [long] * 5 + [short]
    assert all(len(d.tokens) == 10 and d.tokens[0] == 1 for d in documents)
    assert documents[5].tokens == (1, *range(100, 109))
    starts = [d.tokens[1] for d in documents[:5]]
    assert starts[0] == 100 and starts[-1] + 9 == 150  # spread to the very end
    assert all(b - a >= 9 for a, b in itertools.pairwise(starts))
    assert len(cut_documents([long], Words(), 10, 2)) == 2


def test_documents_refused(tmp_path):
    with pytest.raises(ValueError, match="has 5 tokens, less than one document of 10"):
        cut_documents([write(tmp_path, "short", 5)], Words(), 10, None)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("binary", "none"):
        with pytest.raises(ValueError, match=f"cannot read .*{name} as text"):
            cut_documents([str(tmp_path / name)], Words(), 10, None)


def test_variants(tmp_path):
    shape = ModelShape("no/model", (0,), 4, 2, 64, 8192, {"residual": "none"})
    path = tmp_path / "sets.json"
    path.write_text(json.dumps({"fine": {"selection_block_size": 16}, "paper": {"selector": "taylor2"}}))
    variants = parse_variants(['{"budget": 1024, "selector": "mean"}', str(path)], 64, shape)
    assert [v.name for v in variants] == ["budget=1024 selector=mean", "fine", "paper"]
    fine = parameters_of(variants[1], 64, shape)
    assert (fine.selection_block, fine.residual) == (16, "none")
    assert parse_variants([], 64, None) == [Variant("spla", {})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"budgets": 1}', "did you mean 'budget'"),
        ('{"budget": 64}', "must be at least"),
        ("{budget}", "is not JSON"),
        ("nowhere.json", "neither a JSON object nor a file"),
        ('{"selection_block_size": 48}', "do not divide pages of 64"),
    ],
)
def test_variants_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_variants([text], 64, None)


def test_two_variants_of_one_name():
    with pytest.raises(ValueError, match="two variants are called 'budget=512'"):
        parse_variants(['{"budget": 512}'] * 2, 64, None)


def test_bytes_read():
    """Against the layout of a page: 127 complete pages of statistics, 16 pages of tokens, the state."""
    size, length = 64, 8192
    one_level = {"budget": 1024, "fine_block_size": 0, "statistics_dtype": "auto"}
    params = parameters_of(Variant("x", one_level), 64, None)
    page = PageLayout(64, size, 2, 64, 2 * size)
    tokens, state = 1024 * 2 * size * 2, 4 * (65 * 64 + 64)
    assert bytes_read(params, length, size) == 127 * page.statistics_bytes + tokens + state
    assert bytes_read(None, length, size) == length * 2 * size * 2
    assert bytes_read(params, 1024, size) == bytes_read(None, 1024, size)
    without = parameters_of(Variant("x", {**one_level, "residual": "none"}), 64, None)
    assert bytes_read(params, length, size) - bytes_read(without, length, size) == state
    in_fp8 = parameters_of(Variant("x", {**one_level, "statistics_dtype": "fp8"}), 64, None)
    page = layouts(in_fp8, size, torch.bfloat16)[0]
    assert bytes_read(in_fp8, length, size) == 127 * page.statistics_bytes + tokens + state
    assert page.statistics_bytes == 2 * size
    # One token in the current page instead of 64.
    assert bytes_read(params, length - 63, size) == bytes_read(params, length, size) - 63 * 2 * size * 2


def test_bytes_of_two_levels():
    """Keys of the candidates, values of the selected; statistics where they choose or weigh something."""
    options = {"budget": 1024, "candidates": 4096, "fine_source": "keys", "statistics_dtype": "auto"}
    params = parameters_of(Variant("x", options), 64, None)
    vector, statistics, state = 2 * 64, 127 * PageLayout(64, 64, 2, 64, 128).statistics_bytes, 4 * (65 * 64 + 64)
    assert bytes_read(params, 8192, 64) == statistics + (4096 + 1024) * vector + state
    assert bytes_read(params, 8192 - 15, 64) == bytes_read(params, 8192, 64) - 2 * 15 * vector
    assert bytes_read(params, 8192 - 63, 64) == bytes_read(params, 8192, 64) - (63 + 15) * vector
    assert bytes_read(params, 1024, 64) == bytes_read(None, 1024, 64)
    assert bytes_read(params, 4096, 64) == 63 * 256 + (4096 + 1024) * vector + state
    without = parameters_of(Variant("x", {**options, "residual": "none"}), 64, None)
    assert bytes_read(without, 8192, 64) == statistics + (4096 + 1024) * vector
    assert bytes_read(without, 4096, 64) == (4096 + 1024) * vector


def test_bytes_of_a_sketch():
    """Keys of the selected; sketches and means of the candidates that lie in complete pages."""
    options = {"budget": 1024, "candidates": 4096, "statistics_dtype": "auto"}
    params = parameters_of(Variant("x", options), 64, None)
    vector, statistics, state = 2 * 64, 127 * PageLayout(64, 64, 2, 64, 128).statistics_bytes, 4 * (65 * 64 + 64)
    sketches = 63 * (64 * 2 * 18 + vector)  # two chunks of 16 bytes of codes and a scale
    assert bytes_read(params, 8192, 64) == statistics + sketches + 2 * 1024 * vector + state
    assert bytes_read(params, 8192 - 63, 64) == bytes_read(params, 8192, 64) - 2 * 15 * vector
    assert bytes_read(params, 4096, 64) == 63 * 256 + sketches + 2 * 1024 * vector + state
    assert bytes_read(params, 1024, 64) == bytes_read(None, 1024, 64)
    in_fp8 = {**options, "selector": "mean", "statistics_dtype": "fp8", "residual": "none"}
    params = parameters_of(Variant("x", in_fp8), 64, None)
    assert bytes_read(params, 8192, 64) == 127 * 64 + 63 * (64 * 2 * 18 + 64) + 2 * 1024 * vector
    assert bytes_read(params, 4096, 64) == 63 * (64 * 2 * 18 + 64) + 2 * 1024 * vector


def test_bytes_of_dense_layers():
    shape = ModelShape("no/model", (0, 1, 2, 3), 4, 2, 64, 8192, {"dense_layers": [0]})
    layers = layers_of(Variant("x", {"layer_budgets": {"1": 1024}}), 64, shape)
    assert list(layers) == [1, 2, 3] and layers[2] == layers[3] == parameters_of(Variant("x", {}), 64, shape)
    of_layers = [bytes_read(params, 8000, 64) for params in (None, *layers.values())]
    assert of_layers[2] - of_layers[1] == 1024 * 2 * 64 * 2
    assert mean_bytes_read(layers, 8000, shape) == sum(of_layers) / 4
    assert layers_of(Variant("dense"), 64, shape) == {}


def test_buckets():
    assert buckets_of(None, 8192) == [(1, 1024), (1024, 2048), (2048, 4096), (4096, 8192)]
    assert buckets_of([10, 20], 100) == [(10, 20), (20, 100)]
    assert buckets_of([10, 100], 100) == [(10, 100)]
    for edges in ([0, 10], [20, 10], [10, 200], [10, 10]):
        with pytest.raises(ValueError, match="--buckets must ascend"):
            buckets_of(edges, 100)


def test_compare():
    dense = [[float(i) for i in range(1, 4 * SEGMENT)] for _ in range(2)]
    losses = [[x + 0.5 for x in document] for document in dense]
    row = compare(losses, dense, 1, 11)
    assert (row["tokens"], row["loss"], row["difference"], row["difference_se"]) == (20, 6.0, 0.5, 0)
    # One of two documents is worse by 1: two observations, 0 and 1.
    row = compare([dense[0], [x + 1 for x in dense[1]]], dense, SEGMENT, 2 * SEGMENT)
    assert row["difference"] == 0.5 and row["difference_se"] == 0.5
    # Neighbours that move together are one observation, not many.
    moved = [x + (i < SEGMENT) for i, x in enumerate(dense[0])]
    row = compare([moved], [dense[0]], 1, 2 * SEGMENT + 1)
    assert row["difference"] == 0.5 and row["difference_se"] == 0.5


def test_looks_dense():
    dense = [[2.0] * 999] * 2
    noise = [2 + 0.01 * (-1) ** i for i in range(999)]
    sparse = noise[:255] + [x + 0.1 * (-1) ** i for i, x in enumerate(noise[255:])]
    assert looks_dense([noise] * 2, dense, 256) and looks_dense(dense, dense, 256)
    assert not looks_dense([sparse] * 2, dense, 256)
    assert not looks_dense([noise] * 2, dense, 600)  # nothing to see: no prompt goes far beyond the budget


def test_report_is_json(tmp_path):
    made = {**report.header("tasks", {"model": "x"}), "rows": [{"a": 1}, {"a": [2, None]}], "empty": []}
    report.write(made, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == made
    assert made["versions"]["python"] and made["hardware"] and made["command"].startswith("spla-eval ")


def refused(capsys, *arguments: str) -> str:
    assert cli.main([*arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_one_sentence(capsys, tmp_path):
    pytest.importorskip("transformers")
    text = write(tmp_path, "text", 9)
    assert "no model" in refused(capsys, "perplexity", "--model", str(tmp_path / "m"), "--text", text)
    assert "there is no folder" in refused(
        capsys, "fidelity", "--model", "x", "--text", text, "--output", str(tmp_path / "no/x.json")
    )
    path = tmp_path / "other.json"
    path.write_text("{}")
    assert "no report of spla-eval" in refused(capsys, "plot", str(path), str(tmp_path / "x.png"))
    assert not (tmp_path / "x.png").exists()


def row(variant: str, size: int, **values: object) -> dict[str, object]:
    return {"variant": variant, "bytes": size, **values}


def fidelity_row(selector: str, budget: int, **values: object) -> dict[str, object]:
    maps = {"mass_by_layer_and_head": [[0.5, 0.6]]}
    return row(
        "x", budget * 100, selector=selector, block=64, budget=budget, residual="none", mass=0.5, **maps, **values
    )


REPORTS = {
    "perplexity": [
        row(v, 1000 + i, file="all", start=s, end=s + 10, difference=0.1 * i, difference_se=None)
        for i, v in enumerate(["dense", "spla"])
        for s in (1, 11)
    ],
    "tasks": [
        row(v, 1000, task="qa", length=n, score=0.5, score_se=0.1, difference=0, difference_se=0)
        for v in ("dense", "spla")
        for n in (10, 20)
    ],
    "fidelity": [
        fidelity_row(selector, budget, **({} if selector == "oracle" else {"error": 0.1}))
        for selector in ("mean", "rem", "oracle")
        for budget in (512, 1024)
    ],
    "training": [
        {
            "trained": t,
            "attention": a,
            "budget": b,
            "text": "prose",
            "end": 20,
            "difference": 0.1,
            "difference_se": None,
        }
        | ({"sparse_difference": 0.01, "sparse_difference_se": 0.001} if a == "trained" else {})
        for t, a in (("start", "dense"), ("dense", "sparse"), ("regression", "trained"))
        for b in (512, 1024)
    ],
}


@pytest.mark.parametrize("kind", REPORTS)
def test_plot(kind, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.json"
    path.write_text(
        json.dumps({"kind": kind, "settings": {"tasks": ["qa"], "lengths": [10, 20]}, "rows": REPORTS[kind]})
    )
    assert cli.main(["plot", str(path), str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_trained_models_tasks_alone(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"kind": "training", "rows": [{"trained": "sparse", "budget": 512, "kind": "task"}]}))
    assert "nothing to draw" in refused(capsys, "plot", str(path), str(tmp_path / "x.png"))


def test_plot_needs_matplotlib_before_the_work(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(cli, "_module", lambda command: SimpleNamespace(run=pytest.fail))
    line = refused(capsys, "tasks", "--model", "x", "--plot", str(tmp_path / "x.png"))
    assert "matplotlib" in line and "extras eval" in line
