"""What SPLA uses of vLLM's internals is listed, is there, and is named where it is not."""

import ast
import dataclasses
import importlib
import os
import pkgutil
import re
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from spla_backend import patches, plugin
from spla_backend.engine import interfaces, vllm_versions
from spla_backend.patches import llvmlite_wrapper

PATCHES = [importlib.import_module(f"spla_backend.patches.{m.name}") for m in pkgutil.iter_modules(patches.__path__)]
PACKAGE = Path(interfaces.__file__).resolve().parents[1]
# What users call has no place in the lists: spla-eval starts engines as anybody does, spla-env asks vLLM in the report.
SOURCES = [
    path
    for folder in ("engine", "kernels", "patches")
    for path in sorted((PACKAGE / folder).rglob("*.py"))
    if "training" not in path.parts
]


def listed() -> set[str]:
    lists = (interfaces.PLUGIN, interfaces.CONFIGURATION, interfaces.BACKEND, interfaces.CACHE, interfaces.MEMORY)
    lists += (
        interfaces.METRICS,
        interfaces.CPU_KERNELS,
        interfaces.GPU_KERNELS,
        *(patch.INTERFACES for patch in PATCHES),
    )
    return {interface.partition("(")[0] for part in lists for interface in part}


def test_this_vllm_has_them():
    assert vllm_versions.find_missing() == interfaces.find_missing(interfaces.METRICS) == []
    for patch in PATCHES:
        assert interfaces.find_missing(patch.INTERFACES) == []
    llvmlite_wrapper.apply()  # to look loads llvmlite, beside which vLLM starts no engine without this patch


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_are_listed(path):
    """Every name that these modules import from vLLM; modules count by what is listed of them."""
    names = {re.sub(r"\..*", "", interface.partition(":")[2]) for interface in listed()}
    found = {(interface.partition(":")[0], name) for interface in listed() for name in names if f":{name}" in interface}
    modules = {module for module, _ in found}
    unlisted = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm."):
            for alias in node.names:
                if (node.module, alias.name) not in found and f"{node.module}.{alias.name}" not in modules:
                    unlisted.append(f"{node.module}:{alias.name}")
        elif isinstance(node, ast.ImportFrom) and node.module == "vllm":
            unlisted += [f"vllm.{a.name}" for a in node.names if f"vllm.{a.name}" not in modules]
    assert not unlisted


def test_what_is_overridden_is_listed():
    """A method that vLLM renames is no error in Python: ours would be called by nobody."""
    classes = []
    for name in ("backend", "builder", "impl", "metadata", "metrics", "state"):
        module = importlib.import_module(f"spla_backend.engine.{name}")
        classes += [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    seen, unlisted = 0, []
    for cls in classes:
        for base in (b for b in cls.__mro__ if b.__module__.startswith("vllm.")):
            ours = {n for n in vars(cls) if n in vars(base) and (n == "__init__" or not n.startswith("__"))}
            made = {"_abc_impl", "_is_protocol"} | ({"__init__"} if dataclasses.is_dataclass(cls) else set())
            for name in ours - made:
                seen += 1
                of_class = {i.rpartition(".")[0].rpartition(":")[2] for i in listed() if i.endswith(f".{name}")}
                bases = {b.__name__ for b in cls.__mro__ if b.__module__.startswith("vllm.")}
                if not of_class & bases:
                    unlisted.append(f"{base.__module__}:{base.__qualname__}.{name} ({cls.__name__})")
    assert seen > 20
    assert not unlisted


def test_missing_ones_are_named():
    module = "vllm.v1.attention.backend"
    assert interfaces.find_missing(
        [
            "vllm.no_such_module:Anything",
            "vllm.no_such_module:Anything.else",
            f"{module}:NoSuchClass.method(spec)",
            f"{module}:AttentionBackend.no_such_method",
            f"{module}:AttentionBackend.customize_spec(spec, page)",
            f"{module}:AttentionBackend.customize_spec(spec)",
            f"{module}:CommonAttentionMetadata.no_such_field",
            f"{module}:CommonAttentionMetadata.seq_lens",
            "vllm.config:CacheConfig.no_such_field",
        ]
    ) == [
        "vllm.no_such_module",
        "NoSuchClass.method",
        "AttentionBackend.no_such_method",
        "AttentionBackend.customize_spec(page)",
        "CommonAttentionMetadata.no_such_field",
        "CacheConfig.no_such_field",
    ]
    with pytest.raises(ValueError, match="is not written as module:Name"):
        interfaces.find_missing(["vllm.config"])


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("0.32.0", True),
        ("0.33.1+cpu", True),
        ("0.33.0.post1", True),
        ("0.33.1.dev12+g0123abc", False),
        ("0.33.0rc1", False),
        ("0.3.2", False),
        ("0.34.0", False),
        ("1.32.0", False),
        ("dev", False),
    ],
)
def test_which_versions_are_tested(version, tested):
    assert vllm_versions.is_tested(version) == tested


@pytest.mark.parametrize("value", ["0", "", "yes"])
def test_only_1_allows_others(monkeypatch, value):
    monkeypatch.setenv(plugin.ALLOW_UNTESTED, value)
    with pytest.raises(ValueError, match=r"SPLA was not tested with vLLM 0\.47\.1"):
        vllm_versions.check_vllm("0.47.1")


def test_vllm_without_a_place_for_plugins(monkeypatch, caplog):
    """Users of other backends must not notice; others are told why the backend is not there."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from spla_backend.engine.logger import logger
    from spla_backend.patches import platform

    called = []
    monkeypatch.delattr(AttentionBackendEnum, "register")
    monkeypatch.setattr(platform, "apply", lambda: called.append("platform"))
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level("WARNING"):
        plugin.register()
    assert not called
    assert "SPLA is not available as an attention backend: it uses vLLM's AttentionBackendEnum.register" in caplog.text


def test_vllm_knows_the_variable(monkeypatch):
    """vLLM warns of variables that begin as its own and that it does not know, or refuses them."""
    from vllm import envs
    from vllm.platforms import current_platform

    monkeypatch.setenv(plugin.ALLOW_UNTESTED, "1")
    monkeypatch.setattr(envs, "environment_variables", dict(envs.environment_variables))
    envs.environment_variables.pop(plugin.ALLOW_UNTESTED, None)
    for name in [n for n in os.environ if n.startswith("VLLM_") and n not in envs.environment_variables]:
        if name != plugin.ALLOW_UNTESTED:  # what engines of other tests left
            monkeypatch.delenv(name)
    with pytest.raises(ValueError, match="Unknown vLLM environment variable detected: VLLM_SPLA_ALLOW"):
        current_platform.validate_environ(True)
    plugin.register()
    current_platform.validate_environ(True)
