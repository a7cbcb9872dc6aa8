"""The sections of the report, in the form of those of `vllm collect-env`."""

import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType

from .. import patches
from ..engine.interfaces import PLUGIN, find_missing
from ..engine.registration import BACKEND_NAME
from ..engine.vllm_versions import ALLOW_UNTESTED
from ..evaluate.report import hardware, versions

GROUPS = {
    "vllm.general_plugins": "spla",
    "vllm.platform_plugins": "spla",
    "vllm.stat_logger_plugins": "spla_metrics",
}
_NO_VLLM = "vLLM is not installed: install vllm-spla with the extra of an engine, cpu or cuda"


def sections(model: str | None, options: Sequence[str]) -> Iterator[str]:
    """The report, piece by piece: what comes late takes seconds.

    Args:
        model: A model folder or name; None for no section about a model.
        options: Those of `vllm serve` for it.
    """
    yield section("Versions", versions())
    yield section("Devices", devices())
    vllm, problem = _import_vllm()
    if vllm is None:
        about = {} if model is None else {"Model": f"{model}, of which nothing can be said without vLLM"}
        yield section("vLLM", {"Version": problem} | about)
        return
    yield section("Plugin", plugins())
    yield section(
        "Patches of vLLM", {module.__name__.rpartition(".")[2]: try_patch(module) for module in all_patches()}
    )
    yield section("vLLM", vllm_version(vllm.__version__))
    if model is not None:
        from . import coverage

        yield section("Model", coverage.describe(model, options))


def section(title: str, lines: Mapping[str, str]) -> str:
    """A headed table of names and values."""
    line = "=" * 30
    return "\n".join([line, f"{title:^30}".rstrip(), line, *(f"{name:<29}: {value}" for name, value in lines.items())])


def devices() -> dict[str, str]:
    """Machine, processor and GPUs."""
    found = {"OS": platform.platform()}
    try:
        import torch
    except ImportError as error:
        return found | {"Devices": f"unknown, because torch cannot be imported: {error}"}
    if not torch.cuda.is_available():
        return found | {"CPU": hardware(), "GPU": "none that torch sees", "CUDA of torch": str(torch.version.cuda)}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / 2**30
        found[f"GPU {i}"] = f"{properties.name}, compute {properties.major}.{properties.minor}, {memory:.0f} GiB"
    return found | {"CUDA of torch": str(torch.version.cuda)}


def _import_vllm() -> tuple[ModuleType | None, str]:
    """The package vllm, or why there is none; a broken installation raises whatever it likes."""
    if importlib.util.find_spec("vllm") is None:
        return None, _NO_VLLM
    try:
        import vllm
        import vllm.config
    except Exception as error:
        return None, f"vLLM is installed, and its import fails: {_one_line(error)}"
    return vllm, ""


def plugins() -> dict[str, str]:
    """Of every group of entry points that we have one in: what vLLM makes of it, by vLLM's own loader."""
    from vllm.plugins import load_plugins_by_group

    found = {}
    for group, name in GROUPS.items():
        entries = importlib.metadata.entry_points(group=group, name=name)
        if not entries:
            found[group] = "not installed: run `pip install` on vllm-spla in this environment"
            continue
        load = load_plugins_by_group(group).get(name)
        names = " and ".join(sorted(entry.value for entry in entries))
        if load is None:
            found[group] = f"{names}, which vLLM does not load (VLLM_PLUGINS={os.environ.get('VLLM_PLUGINS')!r})"
            continue
        try:
            if not isinstance(load, type):  # vLLM makes one of a class when an engine is there
                load()
            found[group] = f"{names}, loaded by vLLM"
        except Exception as error:
            found[group] = f"{names}, which fails: {_one_line(error)}"
    return found | {"--attention-backend spla": _backend_state()}


def _backend_state() -> str:
    from ..patches import platform

    missing = find_missing(PLUGIN + platform.INTERFACES)
    if missing:
        return f"unknown to vLLM, which does not have {', '.join(missing)}"
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return "known to vLLM" if BACKEND_NAME in AttentionBackendEnum.__members__ else "unknown to vLLM"


def all_patches() -> list[ModuleType]:
    """The modules of `spla_backend.patches`."""
    return [importlib.import_module(f"{patches.__name__}.{m.name}") for m in pkgutil.iter_modules(patches.__path__)]


def try_patch(module: ModuleType) -> str:
    """Whether a patch fits this vLLM; it is applied, in this process."""
    missing = find_missing(module.INTERFACES)
    if missing:
        return f"does not fit, {', '.join(missing)} missing (for {module.WHERE})"
    try:
        apply: Callable[[], None] = module.apply
        apply()
    except Exception as error:
        return f"fails: {_one_line(error)} (for {module.WHERE})"
    return f"fits (for {module.WHERE})"


def vllm_version(version: str) -> dict[str, str]:
    """Whether SPLA starts with this version of vLLM, and what it would miss."""
    from vllm.platforms import current_platform

    from ..engine import vllm_versions

    try:
        vllm_versions.check_vllm(version)
        state = f"{version}, which was {'' if vllm_versions.is_tested(version) else 'not '}tested"
    except ValueError as error:
        state = str(error)
    missing = vllm_versions.find_missing()
    return {
        "Version": state,
        ALLOW_UNTESTED: os.environ.get(ALLOW_UNTESTED, "not set"),
        "Platform": type(current_platform).__name__,
        "Interfaces": f"missing: {', '.join(missing)}" if missing else "all that SPLA uses are there",
    }


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
