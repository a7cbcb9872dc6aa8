"""`spla.safetensors`: what was learned for a model, calibrated or trained, and how it is stored.

The one place that knows the file. Tensors are named `layers.<i>.<parameter>`, `i` the layer's index in the model, and
are float32 for all heads of the model; tensor parallelism shares the heads out when they are loaded:

| parameter | shape | meaning |
|---|---|---|
| `gain` | `[H]` | weight of the tail's mass under `shared_normalizer`, at least 0 |
| `residual_scale` | `[1]` | factor on the covariance of the `regression` residual, in place of the option's |
| `exact_norm` | `[H, d]` | weight of the exact part's norm under `double_rmsnorm` |
| `tail_norm` | `[H, d]` | weight of the tail's norm under `double_rmsnorm` |
| `feature_weight` | `[G, d, d]` | by kv head, factor on queries and keys before the feature map of `linear` |

A file holds a parameter for all layers that SPLA computes, or for none; what it holds for `dense_layers` is not read.
Metadata of the safetensors header:
`format` is `spla`, `version` is `1`, and `spla_config` is a JSON object of the options that the parameters were made
for. These options go before SPLA's defaults and behind all others (docs/options.md).
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .options import check_parameters_file

FILE_NAME = "spla.safetensors"
"""The file beside a model's weights."""

VERSION = "1"

COMBINE_OF: dict[str, str | None] = {
    "gain": "shared_normalizer",
    "residual_scale": "shared_normalizer",
    "exact_norm": "double_rmsnorm",
    "tail_norm": "double_rmsnorm",
    "feature_weight": None,
}
"""The combination that makes use of each parameter; None: any."""

_NAME = re.compile(r"layers\.(\d+)\.(\w+)")
_INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class LayerParameters:
    """What was learned for one layer, float32; None: the neutral value everywhere.

    Attributes:
        gain: `[H]`.
        residual_scale: `[1]`, the same for all heads: kernels take it as one number.
        exact_norm: `[H, d]`.
        tail_norm: `[H, d]`.
        feature_weight: `[G, d, d]`.
    """

    gain: torch.Tensor | None = None
    residual_scale: torch.Tensor | None = None
    exact_norm: torch.Tensor | None = None
    tail_norm: torch.Tensor | None = None
    feature_weight: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that there are, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def to(self, device: torch.device | str) -> "LayerParameters":
        """The same on another device."""
        return LayerParameters(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def same(self, other: "LayerParameters") -> bool:
        """Whether the values are those of `other`."""
        mine, theirs = self.tensors(), other.tensors()
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    def heads(self, rank: int, world_size: int) -> "LayerParameters":
        """The part of one of `world_size` ranks, which share the query heads evenly and in order; several of them share
        a kv head where there are fewer of these.

        Raises:
            ValueError: The heads do not divide.
        """
        part = {}
        for name, tensor in self.tensors().items():
            if name == "residual_scale":
                part[name] = tensor
                continue
            if name == "feature_weight":
                first = rank * tensor.shape[0] // world_size
                part[name] = tensor[first : first + max(1, tensor.shape[0] // world_size)]
                continue
            if tensor.shape[0] % world_size:
                raise ValueError(f"SPLA cannot share {tensor.shape[0]} heads evenly between {world_size} ranks")
            size = tensor.shape[0] // world_size
            part[name] = tensor[rank * size : (rank + 1) * size]
        return LayerParameters(**part)

    @property
    def norm_weights(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`(exact_norm, tail_norm)` as kernels take them; None where there is neither."""
        if self.exact_norm is None or self.tail_norm is None:
            return None
        return self.exact_norm, self.tail_norm


def find(model: str, *sources: Mapping[str, Any] | None) -> Path | None:
    """The file of a model.

    Args:
        model: The model's folder, or its name on the Hugging Face hub.
        sources: Option mappings, the first that names `parameters_file` winning: a path, from the current folder or the
            model's, or `none`. Where none does, it is the file beside the weights, if there is one.

    Raises:
        ValueError: A file was asked for and there is none.
    """
    named = [s["parameters_file"] for s in sources if isinstance(s, Mapping) and "parameters_file" in s]
    wanted = named[0] if named else None
    check_parameters_file(wanted)
    if wanted == "none":
        return None
    if wanted is None:
        beside = Path(model) / FILE_NAME if os.path.isdir(model) else _cached(model)
        return beside if beside is not None and beside.is_file() else None
    for path in (Path(wanted).expanduser(), Path(model) / wanted):
        if path.is_file():
            return path
    raise ValueError(
        f"SPLA finds no file of learned parameters at {wanted}, neither from the current folder nor from the model's: "
        "set the option parameters_file to a file, or to 'none' to do without"
    )


def _cached(model: str) -> Path | None:
    """The file of a model of the hub, where it lies in the local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(model, FILE_NAME)
    except HFValidationError:  # no model of the hub
        return None
    return Path(path) if isinstance(path, str) else None


def read_options(path: Path) -> dict[str, Any]:
    """The options in a file's header, of which nothing is known but that they are a JSON object.

    Raises:
        ValueError: Not such a file.
    """
    with _open(path) as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != "spla":
        raise ValueError(f"{path} holds no SPLA parameters, its header does not say format 'spla': name another file")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path} is of version {metadata.get('version')} and this vllm-spla reads version {VERSION}: install a "
            "newer vllm-spla or write the file again"
        )
    try:
        options = json.loads(metadata.get("spla_config", "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"spla_config in the header of {path} is not JSON ({error}): write the file again") from error
    if not isinstance(options, dict):
        raise ValueError(f"spla_config in the header of {path} is not a JSON object: write the file again")
    # What the defaults were when files did not say it.
    return {"fine_block_size": 0, "statistics_dtype": "auto", **options}


def check(
    path: Path,
    *,
    layers: Iterable[int],
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    combine: str,
    residual: str,
    dense_layers: Iterable[int] = (),
) -> set[str]:
    """Check a whole file against a model; only its header is read.

    Args:
        path: The file.
        layers: Indices of the layers of full attention.
        num_heads: Query heads of the model.
        num_kv_heads: Its kv heads.
        head_size: `d`.
        combine: The combination in use.
        residual: The residual in use.
        dense_layers: Those among `layers` that SPLA leaves dense, which need no parameters.

    Returns:
        The parameters that it holds.

    Raises:
        ValueError: A tensor is unknown, missing, of another shape, or of no use to `combine`; one sentence.
    """
    read_options(path)
    layers = set(layers)
    found: dict[str, set[int]] = {}
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            layer, parameter = _parse(path, name)
            if layer not in layers:
                raise ValueError(
                    f"{path} holds {name}, but layer {layer} is none that SPLA computes in this model (those are "
                    f"{_ranges(layers)}): use the file of this model"
                )
            _check_tensor(path, name, file.get_slice(name), num_heads, num_kv_heads, head_size)
            if parameter == "feature_weight" and residual != "linear":
                raise ValueError(
                    f"{path} holds {name}, which the SPLA option residual {residual!r} makes no use of: set residual "
                    "to 'linear', or parameters_file to 'none' to do without the file"
                )
            if COMBINE_OF[parameter] not in (None, combine):
                raise ValueError(
                    f"{path} holds {name}, which the SPLA option combine {combine!r} makes no use of: set combine to "
                    f"{COMBINE_OF[parameter]!r}, or parameters_file to 'none' to do without the file"
                )
            found.setdefault(parameter, set()).add(layer)
    if combine == "double_rmsnorm" and found:
        found.setdefault("exact_norm", set())
        found.setdefault("tail_norm", set())
    layers -= set(dense_layers)
    for parameter, have in found.items():
        if layers - have:
            raise ValueError(
                f"{path} lacks layers.{min(layers - have)}.{parameter}, it holds the parameter for "
                f"{_ranges(have) or 'no layer'} and SPLA computes {_ranges(layers)}: write the file again with "
                "all of them"
            )
    return set(found)


def holds_parameters(path: Path) -> bool:
    """Whether a file holds more than options.

    Raises:
        ValueError: Not such a file.
    """
    with _open(path) as file:
        return bool(file.keys())


def read_layer(path: Path, layer: int, *, num_heads: int, num_kv_heads: int, head_size: int) -> LayerParameters:
    """What a file holds for one layer, of all heads; nothing where it holds options alone.

    Args:
        path: The file.
        layer: Index of the layer in the model.
        num_heads: Query heads of the model.
        num_kv_heads: Its kv heads.
        head_size: `d`.

    Raises:
        ValueError: Something for other layers only, or of the wrong shape.
    """
    tensors = {}
    with _open(path) as file:
        names = file.keys()
        for name in names:
            index, parameter = _parse(path, name)
            if index == layer:
                _check_tensor(path, name, file.get_slice(name), num_heads, num_kv_heads, head_size)
                tensors[parameter] = file.get_tensor(name)
    if names and not tensors:
        raise ValueError(f"{path} holds nothing for layer {layer} of the model: write the file again with all layers")
    negative = any(tensors[name].amin() < 0 for name in ("gain", "residual_scale") if name in tensors)
    if negative or not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError(
            f"{path} holds negative gains or scales or numbers that are not finite for layer {layer}: write it again"
        )
    return LayerParameters(**tensors)


def write(path: Path, layers: Mapping[int, LayerParameters], options: Mapping[str, Any]) -> None:
    """Write a file, and an index of the weights beside it where a model folder has none.

    vLLM takes every `*.safetensors` in a folder for weights unless an index says which are.

    Args:
        path: The file; its folder exists.
        layers: By index in the model, all heads.
        options: SPLA options that the parameters were made for.
    """
    tensors = {
        f"layers.{i}.{name}": tensor.detach().to("cpu", torch.float32).contiguous()
        for i, layer in layers.items()
        for name, tensor in layer.tensors().items()
    }
    metadata = {"format": "spla", "version": VERSION, "spla_config": json.dumps(dict(options), sort_keys=True)}
    path.write_bytes(save(tensors, metadata))  # with the user's usual permissions, which save_file does not give
    weights = [file for file in sorted(path.parent.glob("*.safetensors")) if file.name != path.name]
    index = path.parent / _INDEX_NAME
    if not weights or index.exists():
        return
    weight_map: dict[str, str] = {}
    size = 0
    for weights_file in weights:
        size += weights_file.stat().st_size
        with _open(weights_file) as file:
            weight_map |= dict.fromkeys(file.keys(), weights_file.name)
    index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1) + "\n")


def check_place(path: Path) -> None:
    """Refuse a file where vLLM would take it for weights.

    Raises:
        ValueError: It lies beside weights that have no index.
    """
    folder = path.parent
    others = any(file.name != path.name for file in folder.glob("*.safetensors"))
    if others and not (folder / _INDEX_NAME).exists():
        raise ValueError(
            f"{path} lies beside weights without {_INDEX_NAME}, so that vLLM takes it for weights: move it to another "
            "folder and set the SPLA option parameters_file to its path (spla-calibrate writes the index itself)"
        )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path} as safetensors: {error}") from error


def _parse(path: Path, name: str) -> tuple[int, str]:
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in COMBINE_OF:
        known = ", ".join(f"layers.<i>.{parameter}" for parameter in COMBINE_OF)
        raise ValueError(f"{path} holds an unknown tensor {name!r}: this vllm-spla knows {known}")
    return int(match[1]), match[2]


def _check_tensor(path: Path, name: str, tensor: Any, num_heads: int, num_kv_heads: int, head_size: int) -> None:
    expected = [num_heads, head_size] if name.endswith("_norm") else [num_heads]
    if name.endswith(".residual_scale"):
        expected = [1]
    if name.endswith(".feature_weight"):
        expected = [num_kv_heads, head_size, head_size]
    shape, dtype = list(tensor.get_shape()), tensor.get_dtype()
    if shape != expected or dtype != "F32":
        raise ValueError(
            f"{path}: {name} is {dtype} {shape} and should be F32 {expected} for this model: use the file of this model"
        )


def _ranges(numbers: set[int]) -> str:
    """`0-3, 5`, for messages."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
