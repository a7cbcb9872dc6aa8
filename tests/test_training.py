"""SPLA in a transformers model: what it computes, what it refuses, what a saved folder holds."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from spla_backend import learned
from spla_backend.training import attach, fit_norms, save, set_budget

OPTIONS = {"budget": 64, "selection_block_size": 16, "fine_block_size": 0}
TWO_LEVELS = {"budget": 48, "selection_block_size": 16, "fine_block_size": 8, "candidates": 1}
PAPER = {**OPTIONS, "residual": "linear", "combine": "double_rmsnorm", "selector": "taylor2"}
PAGE = 16


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=100,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def tokens(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(1))


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def randomise(model) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".spla." in name:
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)


def test_whole_budget_is_dense(model):
    ids = tokens(150)
    dense = logits(model, ids)
    attach(model, {"budget": 256}, PAGE)
    torch.testing.assert_close(logits(model, ids), dense, rtol=1e-4, atol=1e-4)
    attach(model, OPTIONS, PAGE)
    differs = (logits(model, ids) - dense).abs().amax((0, 2)) > 1e-3
    assert not differs[:64].any() and differs[100:].float().mean() > 0.9


def test_set_budget(model):
    """Attention is that of a model attached with this budget, learned parameters and the configuration stay."""
    ids = tokens(150)
    with pytest.raises(ValueError, match="attach first"):
        set_budget(model, 112)
    attach(model, {**OPTIONS, "layer_budgets": {1: 96}}, PAGE)
    randomise(model)
    before, config = logits(model, ids), dict(model.config.spla_config)
    parameters = dict(model.named_parameters())
    set_budget(model, 112)
    changed = logits(model, ids)
    assert model.config.spla_config == config
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    with pytest.raises(ValueError, match="budget"):
        set_budget(model, 7)
    attach(model, {**OPTIONS, "budget": 112}, PAGE)  # keeps what is learned
    torch.testing.assert_close(changed, logits(model, ids))
    assert (changed - before).abs().max() > 1e-3


@pytest.mark.parametrize("options", [OPTIONS, PAPER, TWO_LEVELS])
def test_cache_and_padding(model, options):
    """One token after the other gives what the whole sequence gives; padding on the right changes nothing before it."""
    ids = tokens(100)
    attach(model, options, PAGE)
    randomise(model)
    whole = logits(model, ids)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :90], use_cache=True).past_key_values
        steps = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits[:, 0] for i in range(90, 100)]
    torch.testing.assert_close(torch.stack(steps, 1), whole[:, 90:], rtol=1e-4, atol=1e-4)
    mask = torch.ones_like(ids)
    mask[1, 80:] = 0
    torch.testing.assert_close(logits(model, ids, attention_mask=mask)[1, :80], whole[1, :80])
    with pytest.raises(ValueError, match="without padding on the left"):
        logits(model, ids, attention_mask=mask.flip(1))


def test_packed_sequences_are_refused(model):
    attach(model, OPTIONS, PAGE)
    positions = torch.arange(50).repeat(2)[None]
    with pytest.raises(ValueError, match="one a row"):
        logits(model, tokens(100, 1), position_ids=positions, use_cache=False)


def test_unattached_model_is_refused(model):
    model.set_attn_implementation("spla")
    with pytest.raises(ValueError, match="attach"):
        logits(model, tokens(20))


@pytest.mark.parametrize("options", [OPTIONS, PAPER, {**OPTIONS, "residual": "none"}, TWO_LEVELS])
def test_saved_folder(model, tmp_path, options):
    ids = tokens(120)
    attach(model, options, PAGE)
    randomise(model)
    expected = logits(model, ids)
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["spla_config"]
    assert config["budget"] == options["budget"] and config["prefill_dense_below"] == 0
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "spla" in name]  # noqa: SIM118
    side_file = tmp_path / "spla.safetensors"
    assert side_file.exists() == (options.get("residual") != "none")
    if side_file.exists():
        with safe_open(side_file, "pt") as file:
            metadata, names = file.metadata(), set(file.keys())
        assert metadata["format"] == "spla" and json.loads(metadata["spla_config"]) == config
        parts = {"exact_norm", "tail_norm"} if options is PAPER else {"gain", "residual_scale"}
        assert names == {f"layers.{i}.{part}" for i in range(2) for part in parts}
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    attach(again, page_size=PAGE)
    torch.testing.assert_close(logits(again, ids), expected, rtol=1e-5, atol=1e-5)


def test_side_file_of_other_options(model, tmp_path):
    attach(model, PAPER, PAGE)
    save(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="options that the model was trained with"):
        attach(again, {"combine": "shared_normalizer"}, PAGE)


def test_side_file_of_options_alone(model, tmp_path):
    """As `spla-calibrate --dense-layers` writes it."""
    model.save_pretrained(tmp_path)
    learned.write(tmp_path / learned.FILE_NAME, {}, {"dense_layers": [1]})
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    attach(again, OPTIONS, PAGE)
    attach(model, {**OPTIONS, "dense_layers": [1]}, PAGE)
    torch.testing.assert_close(logits(again, tokens(80)), logits(model, tokens(80)))
    assert again.config.spla_config["dense_layers"] == (1,)


def test_attached_again_with_other_parameters(model):
    """What is attached has none of the parameters that are asked for."""
    attach(model, {**OPTIONS, "residual": "none"}, PAGE)
    with pytest.raises(ValueError, match="options that the model was trained with"):
        attach(model, {**OPTIONS, "residual": "regression"}, PAGE)


@pytest.mark.parametrize("options", [OPTIONS, PAPER])
def test_learned_parameters_train(model, options):
    attach(model, options, PAGE)
    model.train()
    ids = tokens(120)
    model(input_ids=ids, labels=ids).loss.backward()
    learned = {name: p for name, p in model.named_parameters() if ".spla." in name}
    assert len(learned) == 4
    assert all(bool((p.grad != 0).any() and p.grad.isfinite().all()) for p in learned.values())


def test_fitted_norms_begin_near_the_model(model):
    ids = tokens(120)
    dense = logits(model, ids)
    attach(model, PAPER, PAGE)
    before = (logits(model, ids) - dense).norm()
    fit_norms(model, [ids])
    assert (logits(model, ids) - dense).norm() < before
    assert all(not layer.self_attn.spla.tail_norm.any() for layer in model.model.layers)


def script(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(__file__).parents[1] / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_example_of_continued_training(model, tmp_path, monkeypatch, capsys):
    """The script trains, evaluates and, called again, goes on with what there is."""
    example = script("examples/continue_training.py")
    monkeypatch.setattr(example, "load_tokenizer", lambda folder: SimpleNamespace(save_pretrained=lambda folder: None))
    monkeypatch.setattr(example, "BUCKETS", (32, 64, 128))
    model.save_pretrained(tmp_path / "start")
    kinds = {"code": (600,), "prose": (600,), "held_out_code": (2, 128), "held_out_prose": (2, 128)}
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "text.npz", **{kind: generator.integers(3, 100, shape) for kind, shape in kinds.items()})
    arguments = (
        f"--model {tmp_path}/start --text {tmp_path}/text.npz --output {tmp_path}/out --length 128 --batch 2 --steps 2 "
        f"--micro-batch 1 --budget 64 96 --evaluate-budgets 64 --page-size 16 --documents 2"
    )
    monkeypatch.setattr(sys, "argv", ["continue_training.py", *arguments.split()])
    example.main()
    assert "regression" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [t["variant"] for t in report["training"]] == ["dense", "sparse", "regression", "linear"]
    drawn = [t["budgets"] for t in report["training"]]
    assert drawn[0] == [] and len(drawn[1]) == 2 and set(drawn[1]) <= {64, 96} and drawn[1] == drawn[2] == drawn[3]
    assert {(row["trained"], row["attention"]) for row in report["rows"]} == {
        *((trained, attention) for trained in ("start", "dense") for attention in ("dense", "sparse", "regression")),
        *((name, name) for name in ("sparse", "regression", "linear")),
    }
    monkeypatch.setattr(example, "train", None)  # nothing is trained again
    example.main()


def test_benchmark_pairs(tmp_path, monkeypatch):
    """What trained models are served with, and with what each is compared."""
    benchmark = script("benchmarks/training.py")
    monkeypatch.setattr(benchmark, "BUCKETS", (1, 3))
    for name in ("dense", "sparse", "regression", "linear"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "training.json").write_text("{}")
    jobs = benchmark.jobs_of(SimpleNamespace(trained=tmp_path, model="start", budgets=[64]))
    served = {(job["trained"], job["attention"]) for job in jobs}
    assert served == {
        *((trained, attention) for trained in ("start", "dense") for attention in ("dense", "sparse", "regression")),
        *(("sparse", "trained"), ("sparse", "regression"), ("regression", "trained"), ("regression", "sparse")),
        ("linear", "trained"),
    }
    losses = {}
    for i, job in enumerate(jobs):
        losses[job["trained"], job["attention"]] = i
        done = {"losses": {"code": [[float(i), i + 1.0], [i + 2.0, i + 3.0]]}, "texts": ["7" if i % 2 else ""]}
        (tmp_path / f"{job['name']}.json").write_text(json.dumps(done))
    rows = benchmark.rows_of(jobs, {"tasks": ["single"], "answers": [["7"]]}, tmp_path)
    assert len(rows) == 3 * len(jobs)  # code, the task and the mean over tasks
    for row in rows:
        mine, trained = losses[row["trained"], row["attention"]], row["trained"]
        dense = losses["start" if trained == "start" else "dense", "dense"]
        sparse = losses[(trained, "sparse") if trained in ("start", "dense") else ("sparse", "trained")]
        own = row["attention"] == "dense" or mine == sparse
        if row["kind"] == "perplexity":
            assert row["difference"] == mine - dense
            assert row.get("sparse_difference") == (None if own else mine - sparse)
        else:
            assert row["score"] == mine % 2 and row["difference"] == mine % 2 - dense % 2
            assert row.get("sparse_difference") == (None if own else mine % 2 - sparse % 2)


def test_sinks_are_refused() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=2,
        num_experts_per_tok=1,
        vocab_size=100,
        pad_token_id=0,
    )
    model = GptOssForCausalLM(config).eval()
    attach(model, OPTIONS, PAGE)
    with pytest.raises(ValueError, match="GptOssAttention has learned attention sinks, with which SPLA does not train"):
        logits(model, tokens(30))
