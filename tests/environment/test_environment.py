"""`spla-env`: what the report says, with a vLLM, with a broken one and with none."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from spla_backend.environment import cli, report

ROOT = Path(__file__).resolve().parents[2]

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
}
GEMMA3 = LLAMA | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "sliding_window": 128,
    "query_pre_attn_scalar": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
GPT_OSS = LLAMA | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
LLAMA4 = LLAMA | {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "intermediate_size_mlp": 512,
    "no_rope_layers": [1, 1, 0, 1, 1, 0],  # 0: full attention
    "attention_chunk_size": 128,
    "interleave_moe_layer_step": 100,  # none
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}


def run(*arguments: str, path: list[Path], site: bool = True, **environment: str) -> str:
    """Standard output of `spla-env` in a process of its own, which finds modules in `path` first."""
    code = f"import sys; sys.path[:0] = {[str(p) for p in path]}; from spla_backend.environment.cli import main; main()"
    # Without `site` there are no packages but the standard library's.
    command = [sys.executable, "-I", *([] if site else ["-S"]), "-c", code, *arguments]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def describe(folder: Path, config: dict, *options: str) -> dict[str, str]:
    """The section about a model of which there is nothing but config.json."""
    pytest.importorskip("vllm")
    from spla_backend.environment import coverage

    (folder / "config.json").write_text(json.dumps(config))
    return coverage.describe(str(folder), options)


def test_without_vllm():
    found = run("--model", "anything", path=[ROOT], site=False)
    assert "python                       : 3." in found
    assert "Devices                      : unknown, because torch cannot be imported" in found
    assert "vLLM is not installed: install vllm-spla with the extra of an engine, cpu or cuda" in found
    assert "Model                        : anything, of which nothing can be said without vLLM" in found


def test_with_a_broken_vllm(tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise RuntimeError('libcudart.so.13:\\n  no such file')")
    found = run(path=[tmp_path, ROOT], site=False)
    assert "vLLM is installed, and its import fails: RuntimeError: libcudart.so.13: no such file" in found
    assert "Patches" not in found


def test_report():
    pytest.importorskip("vllm")
    found = run(path=[ROOT])
    assert found.startswith("=" * 30 + "\n           Versions\n")
    for line in (
        "vllm.general_plugins         : spla_backend.plugin:register, loaded by vLLM",
        "vllm.platform_plugins        : spla_backend.plugin:platform_plugin, loaded by vLLM",
        "--attention-backend spla     : known to vLLM",
        "platform                     : fits (for all models)",
        "Interfaces                   : all that SPLA uses are there",
    ):
        assert f"\n{line}\n" in found, found
    assert [name for name in ("numba", "torch", "vllm-spla") if f"\n{name:<29}: " not in found] == []


def test_plugin_that_is_not_allowed():
    pytest.importorskip("vllm")
    found = run(path=[ROOT], VLLM_PLUGINS="another")
    assert ": spla_backend.plugin:register, which vLLM does not load (VLLM_PLUGINS='another')" in found
    assert "--attention-backend spla     : unknown to vLLM\n" in found


def test_plugin_that_fails(monkeypatch):
    pytest.importorskip("vllm")
    from vllm import plugins

    def fail() -> None:
        raise TypeError("not\nlike this")

    monkeypatch.setattr(plugins, "load_plugins_by_group", lambda group: {"spla": fail})
    assert report.plugins()["vllm.general_plugins"].endswith(":register, which fails: TypeError: not like this")


def test_patches_that_do_not_fit():
    def fail() -> None:
        raise AttributeError("no such\nmethod")

    there, gone = ("os.path:join",), ("os.path:no_such_function",)
    patch = SimpleNamespace(INTERFACES=there, WHERE="all models", apply=lambda: None)
    assert report.try_patch(patch) == "fits (for all models)"
    patch = SimpleNamespace(INTERFACES=gone, WHERE="all models", apply=fail)
    assert report.try_patch(patch) == "does not fit, no_such_function missing (for all models)"
    patch = SimpleNamespace(INTERFACES=there, WHERE="all models", apply=fail)
    assert report.try_patch(patch) == "fails: AttributeError: no such method (for all models)"


def test_untested_version(monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.delenv(report.ALLOW_UNTESTED, raising=False)
    assert report.vllm_version("0.47.1")["Version"].startswith("SPLA was not tested with vLLM 0.47.1, whose internal")
    monkeypatch.setenv(report.ALLOW_UNTESTED, "1")
    assert report.vllm_version("0.47.1")["Version"] == "0.47.1, which was not tested"


def test_options_need_a_model(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--max-model-len", "100"])
    assert "--max-model-len is an option for a model, and there is no --model" in capsys.readouterr().err


def test_every_layer(tmp_path):
    found = describe(tmp_path, LLAMA)
    assert found["Layers of SPLA"] == "6 of 6: model.layers.{0-5}.self_attn.attn"
    assert found["Options of SPLA"] == "defaults"
    assert found["Start-up"] == "nothing is refused"


def test_dense_layers(tmp_path):
    option = {"spla": {"budget": 1024, "dense_layers": [0, 3]}}
    found = describe(tmp_path, LLAMA, "--additional-config", json.dumps(option))
    assert found["Options of SPLA"] == "budget=1024, dense_layers=(0, 3)"
    assert found["Layers of SPLA"] == (
        "2 of 6 (all tokens, by dense_layers): model.layers.{0, 3}.self_attn.attn; "
        "4 of 6: model.layers.{1-2, 4-5}.self_attn.attn"
    )


def test_windows(tmp_path):
    found = describe(tmp_path, GEMMA3)
    assert found["Layers of SPLA"] == "2 of 6: model.layers.{2, 5}.self_attn.attn"
    assert (
        found["Layers of CPU_ATTN"] == "4 of 6 (sliding windows of 128 tokens): model.layers.{0-1, 3-4}.self_attn.attn"
    )
    assert found["Start-up"] == "nothing is refused"


def test_chunked_local_attention(tmp_path):
    found = describe(tmp_path, LLAMA4)
    assert found["Layers of SPLA"] == "2 of 6: model.layers.{2, 5}.self_attn.attn"
    assert found["Layers of CPU_ATTN"].startswith("4 of 6 (ChunkedLocalAttention): model.layers.{0-1, 3-4}")


def test_sinks(tmp_path):
    found = describe(tmp_path, GPT_OSS)
    assert found["Layers of SPLA"] == "3 of 6: model.layers.{1, 3, 5}.attn.attn"
    assert found["Layers of CPU_ATTN"].startswith("3 of 6 (sliding windows of 128 tokens): model.layers.{0, 2, 4}")
    assert found["Start-up"] == "nothing is refused"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (GEMMA3 | {"layer_types": ["sliding_attention"] * 6}, "6 of 6 (sliding windows of 128 tokens): model.layers."),
        (BERT, "2 of 2 (EncoderOnlyAttention, encoder_only): model.encoder.layer."),
    ],
    ids=["windows", "encoder"],
)
def test_no_layer(tmp_path, config, why):
    found = describe(tmp_path, config)
    assert "Layers of SPLA" not in found
    assert found["Layers of CPU_ATTN"].startswith(why)
    assert found["Start-up"].startswith(f"SPLA computes no layer of {tmp_path}: it has no decoder layer of full")


@pytest.mark.parametrize(
    ("config", "options", "sentence"),
    [
        (
            GPT_OSS,
            ["--additional-config", '{"spla": {"combine": "double_rmsnorm", "residual": "linear"}}'],
            "refused by SPLA: SPLA does not compute these options for this model: combine 'double_rmsnorm' would undo",
        ),
        (LLAMA | {"head_dim": 72}, [], "refused by SPLA: SPLA does not support head size 72 (supported: 32, 64"),
        (LLAMA, ["--additional-config", '{"spla": {"budgets": 1}}'], "refused by SPLA: unknown SPLA option 'budgets'"),
        (LLAMA, ["--kv-cache-dtype", "fp8"], "refused by SPLA: SPLA does not support --kv-cache-dtype fp8"),
        (LLAMA, ["--max-model-len", "9999"], "refused by vLLM: User-specified max_model_len (9999) is greater than"),
        (LLAMA, ["--attention-config", '{"backend": "CPU_ATTN"}'], "SPLA was not chosen by these options"),
        (LLAMA | {"architectures": ["NoSuchModel"]}, [], "refused by vLLM: "),
    ],
    ids=["sinks", "head-size", "option", "cache", "vllm", "not-chosen", "architecture"],
)
def test_start_up(tmp_path, config, options, sentence):
    found = describe(tmp_path, config, *options)
    assert found["Start-up"].startswith(sentence)
    assert "\n" not in found["Start-up"]


def test_a_model_that_cannot_be_made(tmp_path, monkeypatch):
    """Not every model can be made without weights; the report says so, and what is known."""
    pytest.importorskip("vllm")
    from vllm.model_executor.models.llama import LlamaForCausalLM

    def fail(self, **arguments):
        raise RuntimeError("needs\nits weights")

    monkeypatch.setattr(LlamaForCausalLM, "__init__", fail)
    found = describe(tmp_path, LLAMA)
    assert found["Layers"] == "unknown, because vLLM does not make them without weights: needs its weights"
    assert "Start-up" not in found


def test_names_of_layers():
    pytest.importorskip("vllm")
    from spla_backend.environment.coverage import summarise

    names = ["a.0.b", "c.7.b", "a.1.b", "a.3.b", "head", "c.0.5.b"]
    assert summarise(names) == "a.{0-1, 3}.b, c.{7}.b, c.{0}.5.b, head"
