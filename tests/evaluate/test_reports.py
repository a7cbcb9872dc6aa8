"""Whole reports: fidelity on a small model, perplexity and tasks with an engine's answers made up."""

import contextlib
import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from spla_backend.evaluate import cli, engines  # noqa: E402

from .test_capture import CONFIG, save  # noqa: E402

TEXT_TOKENS = 600


def save_with_tokenizer(folder, **changes) -> str:
    """A small model whose tokens are the words `w1`, `w2` and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    save(folder, **changes)
    vocabulary = {"<unk>": 0} | {f"w{i}": i for i in range(1, changes.get("vocab_size", CONFIG["vocab_size"]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # Splits at punctuation too, as what counts tokens for the tasks.
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_with_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, CONFIG["vocab_size"], (TEXT_TOKENS,), generator=generator)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in words.tolist()))
    return str(path)


def report_of(tmp_path, *arguments: str) -> dict:
    assert cli.main([*arguments, "--output", str(tmp_path / "report.json")]) == 0
    return json.loads((tmp_path / "report.json").read_text())


def test_fidelity(model, text, tmp_path, capsys):
    arguments = ["--model", model, "--text", text, "--length", "256", "--page-size", "32", "--queries", "16"]
    grid = ["--selectors", "mean", "rem", "quest", "--block-sizes", "16", "32", "--budgets", "128"]
    report = report_of(tmp_path, "fidelity", *arguments, *grid)
    rows = {(r["selector"], r["block"], r["residual"]): r for r in report["rows"]}
    # quest has no mass for a residual, the oracle needs none.
    assert len(report["rows"]) == len(rows) == 2 * (2 * 2 + 1 + 1)
    assert report["settings"]["documents"] == {text: 2}
    for (selector, block, residual), row in rows.items():
        assert 0 < row["mass"] < 1 and 0 < row["error"] < 1.5 and row["budget"] == 128
        assert (len(row["mass_by_layer_and_head"]), len(row["mass_by_layer_and_head"][0])) == (2, 4)
        assert row["mass"] <= rows["oracle", block, "none"]["mass"] + 1e-5
        assert row["mass_worst_decile"] <= row["mass"] and row["by_file"][text]["mass"] == row["mass"]
        if residual == "regression":
            without = rows[selector, block, "none"]
            assert row["mass"] == without["mass"] and row["bytes"] > without["bytes"]
            assert row["error_against_none"] == pytest.approx(row["error"] - without["error"], abs=2e-5)
    assert "mean b=16 budget=128 regression" in capsys.readouterr().out


def test_fidelity_of_option_sets(model, text, tmp_path):
    arguments = ["--model", model, "--text", text, "--length", "256", "--page-size", "32", "--queries", "8"]
    sets = ['{"budget": 128, "residual_scale": 0.25}', '{"budget": 256, "residual": "none"}']
    report = report_of(tmp_path, "fidelity", *arguments, "--layers", "1", "--documents", "1", "--options", *sets)
    first, everything, *oracles = report["rows"]
    assert first["variant"] == "budget=128 residual_scale=0.25" and len(oracles) == 2
    assert everything["mass"] == pytest.approx(1) and everything["error"] < 1e-5
    assert report["settings"]["layers"] == [1] and len(first["mass_by_layer_and_head"]) == 1


seen_options: list[dict] = []


@pytest.fixture
def answers(monkeypatch):
    """Engines that only say which variant they run, and what was asked of them."""
    started: list[tuple[str, int]] = []
    seen_options.clear()

    @contextlib.contextmanager
    def start(model, variant, page_size, max_model_len, engine_args):
        started.append((variant.name, max_model_len))
        if variant.options is not None:
            seen_options.append(dict(variant.options))
        yield variant.name

    monkeypatch.setattr(engines, "start", start)
    return started


def test_perplexity(model, text, tmp_path, answers, monkeypatch):
    def logprobs(llm, documents, description):
        loss = {"dense": 2.0, "spla": 2.25, "residual=none": 2.5}[llm]
        return [[-loss] * (len(tokens) - 1) for tokens in documents]

    monkeypatch.setattr(engines, "prompt_logprobs", logprobs)
    report = report_of(
        tmp_path, "perplexity", "--model", model, "--text", text, "--length", "256",
        "--options", "{}", '{"residual": "none"}',
    )  # fmt: skip
    assert answers == [("dense", 257), ("spla", 257), ("residual=none", 257)]
    # Prompts are measured, so that they must be sparse.
    assert seen_options == [{"prefill_dense_below": 0}, {"prefill_dense_below": 0, "residual": "none"}]
    assert len(report["rows"]) == 3 * 2 * 4  # variants, all and the one file, buckets
    for row in report["rows"]:
        assert row["difference"] == {"dense": 0, "spla": 0.25, "residual=none": 0.5}[row["variant"]]
        assert row.get("against_none") == {"spla": -0.25}.get(row["variant"])
        assert row["tokens"] == 2 * (row["end"] - row["start"])
    assert [(s["variant"], s["losses"]) for s in report["segments"][2:4]] == [("spla", [2.25, 2.25])] * 2


def test_perplexity_leaves_room_for_a_token(model, text, tmp_path, answers, monkeypatch):
    monkeypatch.setattr(
        engines, "prompt_logprobs", lambda llm, documents, _: [[-1.0] * (len(d) - 1) for d in documents]
    )
    report = report_of(tmp_path, "perplexity", "--model", model, "--text", text)
    assert report["settings"]["length"] == CONFIG["max_position_embeddings"] - 1
    assert answers[0] == ("dense", CONFIG["max_position_embeddings"])


def test_perplexity_through_transformers(model, text, tmp_path):
    report = report_of(
        tmp_path, "perplexity", "--model", model, "--text", text, "--length", "512", "--through", "transformers",
        "--options", '{"budget": 192}', '{"budget": 512, "selector": "km2-rem", "selection_block_size": 16}',
    )  # fmt: skip
    last = {row["variant"]: row for row in report["rows"] if row["end"] == 511 and row["file"] == "all"}
    sparse, everything = list(last)[1:]
    assert abs(last[sparse]["difference"]) > 1e-4
    assert abs(last[everything]["difference"]) < 1e-5
    assert report["settings"]["engine_args"] == {"dtype": "float32"}


def test_report_so_far(model, text, tmp_path, answers, monkeypatch):
    def logprobs(llm, documents, description):
        if llm != "dense":
            raise ValueError("no memory")
        return [[-1.0] * (len(tokens) - 1) for tokens in documents]

    monkeypatch.setattr(engines, "prompt_logprobs", logprobs)
    path = tmp_path / "report.json"
    arguments = ["--model", model, "--text", text, "--length", "256", "--output", str(path)]
    assert cli.main(["perplexity", *arguments]) == 1
    assert {row["variant"] for row in json.loads(path.read_text())["rows"]} == {"dense"}


def test_tasks(model, tmp_path, answers, monkeypatch):
    def complete(llm, prompts, max_tokens, description):
        assert all(len(p) + n <= 400 for p, n in zip(prompts, max_tokens, strict=True))
        return ["no number" if llm == "dense" else "1234567"] * len(prompts)

    monkeypatch.setattr(engines, "complete", complete)
    report = report_of(
        tmp_path, "tasks", "--model", model, "--tasks", "single", "qa", "--lengths", "300", "400", "--samples", "3"
    )
    assert answers == [("dense", 400), ("spla", 400)]
    assert len(report["rows"]) == 2 * 2 * 2
    assert len(report["samples"]) == 2 * 2 * 3 == len(report["completions"][0]["texts"])
    assert {row["score"] for row in report["rows"]} == {0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fidelity", "--layers", "7"], "--layers must be among 0, 1"),
        (["fidelity", "--start", "256"], "--start 256 is outside documents of 256 tokens"),
        (["fidelity", "--selectors", "best"], "unknown selector 'best'"),
        (["fidelity", "--options", '{"budget": 32}'], "must be at least"),
        (["perplexity", "--buckets", "20", "10"], "--buckets must ascend"),
        (["perplexity", "--through", "transformers", "--engine-args", '{"seed": 1}'], "means nothing to"),
        (["perplexity", "--through", "transformers", "--engine-args", '{"dtype": "best"}'], "unknown dtype 'best'"),
    ],
)
def test_refused(model, text, capsys, arguments, message):
    command, *rest = arguments
    assert cli.main([command, "--model", model, "--text", text, "--length", "256", *rest]) == 1
    assert message in capsys.readouterr().err


def test_tasks_longer_than_the_model(model, capsys):
    assert cli.main(["tasks", "--model", model, "--lengths", "1024"]) == 1
    assert "takes at most 512 tokens" in capsys.readouterr().err
