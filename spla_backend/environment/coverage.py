"""Which layers of a model SPLA computes: vLLM is asked, with the model on torch's device `meta`, without weights."""

import contextlib
import re
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..engine.checks import describe_unused, is_chosen, refuse_spec, resolve_options
from ..engine.registration import BACKEND_NAME
from ..options import RefusedError, SplaOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def describe(model: str, options: Sequence[str]) -> dict[str, str]:
    """Names and values of the report's section about a model.

    Args:
        model: A folder or a name.
        options: Those of `vllm serve`.
    """
    lines = {"Model": model, "Options of vLLM": shlex.join(options) or "none"}
    try:
        config = make_config(model, options)
    except RefusedError as error:
        return lines | {"Start-up": f"refused by SPLA: {error}"}
    except Exception as error:  # vLLM's own checks raise all sorts
        return lines | {"Start-up": f"refused by vLLM: {_sentence(error)}"}
    if not is_chosen(config):
        return lines | {"Start-up": "SPLA was not chosen by these options: --attention-backend spla does it"}
    chosen = resolve_options(config)
    lines["Options of SPLA"] = _differences(chosen) or "defaults"
    try:
        make_layers(config)
        layers = _layers(config)
        for layer in layers.values():
            if layer.get_attn_backend().get_name() == BACKEND_NAME:
                refuse_spec(layer, config)
    except Exception as error:  # a model's constructor raises whatever it likes
        if isinstance(error, ValueError) and "SPLA" in str(error):
            return lines | {"Start-up": f"refused by SPLA: {error}"}
        return lines | {"Layers": f"unknown, because vLLM does not make them without weights: {_sentence(error)}"}
    return lines | _by_backend(layers, chosen) | {"Start-up": describe_unused(config) or "nothing is refused"}


def _differences(options: SplaOptions) -> str:
    """The options that are not at their defaults."""
    defaults = SplaOptions()
    pairs = ((f.name, getattr(options, f.name)) for f in fields(options))
    return ", ".join(f"{name}={value!r}" for name, value in pairs if value != getattr(defaults, name))


def _by_backend(layers: Mapping[str, Any], options: SplaOptions) -> dict[str, str]:
    """Which backend computes which layers, and of other backends than SPLA, why."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, layer in layers.items():
        backend = layer.get_attn_backend().get_name()
        if backend != BACKEND_NAME:
            reason = f" ({_reason(layer)})"
        else:
            reason = " (all tokens, by dense_layers)" if _index(name) in options.dense_layers else ""
        found.setdefault(backend, {}).setdefault(reason, []).append(name)
    return {
        f"Layers of {backend}": "; ".join(
            f"{len(names)} of {len(layers)}{reason}: {summarise(names)}" for reason, names in by_reason.items()
        )
        for backend, by_reason in found.items()
    }


def make_config(model: str, options: Sequence[str]) -> "VllmConfig":
    """What `vllm serve MODEL OPTIONS` would start with; the backend is spla where the options name none.

    Raises:
        RefusedError: SPLA refuses it.
        Exception: vLLM does.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="spla-env", add_help=False))
    arguments = EngineArgs.from_cli_args(parser.parse_args(["--model", model, *options]))
    attention = arguments.attention_config
    if arguments.attention_backend is None and attention.backend is None and not attention.backend_per_kind:
        arguments.attention_backend = "spla"
    return arguments.create_engine_config()


def make_layers(config: "VllmConfig") -> None:
    """Make the model, as one rank with no weights, so that its layers ask for their backends and stand in `config`.

    Raises:
        Exception: A layer is refused, or vLLM cannot make the model so.
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    dtype = set_default_torch_dtype(config.model_config.dtype)
    with set_current_vllm_config(config), _one_rank(), dtype, torch.device("meta"):
        initialize_model(config)


@contextlib.contextmanager
def _one_rank() -> Iterator[None]:
    """The process groups that layers are made in, of this process alone."""
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    with tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        try:
            ensure_model_parallel_initialized(1, 1)
            yield
        finally:
            cleanup_dist_env_and_memory()


def _layers(config: "VllmConfig") -> dict[str, Any]:
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    return get_layers_from_vllm_config(config, AttentionLayerBase)


def _reason(layer: Any) -> str:
    """Why a layer is not SPLA's, by what the layer says of itself."""
    if getattr(layer, "sliding_window", None):
        return f"sliding windows of {layer.sliding_window} tokens"
    attention = getattr(getattr(layer, "attn_type", None), "value", "decoder")
    return f"{type(layer).__name__}, {attention}" if attention != "decoder" else type(layer).__name__


def _index(name: str) -> int:
    from vllm.model_executor.models.utils import extract_layer_index

    return extract_layer_index(name)


def summarise(names: Iterable[str]) -> str:
    """Names of layers with their indices taken out and put together: `model.layers.{0-4, 6}.self_attn.attn`."""
    by_pattern: dict[tuple[str, str], list[int]] = {}
    others = []
    for name in names:
        match = re.fullmatch(r"(.*?\.)(\d+)((?:\..*)?)", name)
        if match is None:
            others.append(name)
        else:
            by_pattern.setdefault((match[1], match[3]), []).append(int(match[2]))
    found = [f"{before}{{{_ranges(numbers)}}}{after}" for (before, after), numbers in by_pattern.items()]
    return ", ".join(found + others)


def _ranges(numbers: Iterable[int]) -> str:
    """`0-4, 6` of 0, 1, 2, 3, 4 and 6."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _sentence(error: BaseException) -> str:
    """The message in one line; of pydantic's errors, in which vLLM's checks end, what the check said."""
    details = getattr(error, "errors", None)
    if callable(details):
        messages = [str(detail["msg"]).removeprefix("Value error, ") for detail in details()]
        return " ".join(" ".join(messages).split())
    return " ".join(str(error).split()) or type(error).__name__
