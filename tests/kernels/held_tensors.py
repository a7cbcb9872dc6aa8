"""Every tensor that outlives a step: those that a layer's kernels hold, and those that their modules do."""

import functools
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch

PACKAGES = ("spla_backend", "flashinfer")


def held_tensors(*roots: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that can be reached from `roots`, from classes and modules of the kernels, each with the name of what
    holds it."""
    modules = [module for name, module in sys.modules.items() if name.startswith("spla_backend.kernels.")]
    # A module's functions and classes lead to all of the rest; those that matter are reached from the roots.
    values = [value for module in modules for value in vars(module).values() if not callable(value)]
    left: list[tuple[str, Any]] = [("", value) for value in (*roots, *values)]
    seen: set[int] = set()
    while left:
        name, value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield name, value
        else:
            left += ((inner or name, item) for inner, item in _parts(value))


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(key), item) for key, item in [*value.items()])
    elif isinstance(value, list | tuple | set | frozenset):
        yield from (("", item) for item in value)
    elif isinstance(value, functools.partial):
        yield from (("", item) for item in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, types.MethodType):
        yield from (("", value.__self__), ("", value.__func__))
    elif isinstance(value, types.FunctionType):
        yield from (("", item) for item in (value.__defaults__ or ()))
        yield from (("", cell.cell_contents) for cell in value.__closure__ or ())
    elif type(value).__module__.partition(".")[0] in PACKAGES:
        yield from getattr(value, "__dict__", {}).items()
        yield from (item for item in vars(type(value)).items() if isinstance(item[1], Mapping | list | set))
