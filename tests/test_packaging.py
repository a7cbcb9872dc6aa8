"""What is installed, under which names: by a wheel from the sdist, by `pip install`, editable, and in a checkout."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip"]
OFFLINE = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
# What the source says must be importable: every module, those behind the two links included.
MODULES = sorted(
    {  # once: in an unpacked sdist the links are folders
        f"{prefix}/{path.relative_to(folder).as_posix()}"
        for prefix, folder in (
            ("spla_backend", ROOT / "spla_backend"),
            ("spla_backend/kernels", ROOT / "spla_backend" / "kernels"),
            ("spla_backend/patches", ROOT / "spla_backend" / "patches"),
        )
        for path in folder.rglob("*.py")
    }
)
# Prints where modules come from; `-I -S` keeps the checkout and the installed package out of `sys.path`.
FIND = """
import importlib.util, site, sys
site.addsitedir(sys.argv[1])
ours = ["spla_backend.kernels.layout", "spla_backend.patches.platform"]
for name in [*ours, "kernels", "patches", "tests", "benchmarks"]:
    spec = importlib.util.find_spec(name)
    print(name, spec and spec.origin)
"""


HOOK = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def skip_without_pip() -> None:
    """Not by looking for its module: setuptools would then leave distutils alone, and vLLM could not be imported."""
    if not any(importlib.metadata.distributions(name="pip")):
        pytest.skip("needs pip")


def found_in(site: Path) -> dict[str, str]:
    lines = run(sys.executable, "-I", "-S", "-c", FIND, site, cwd=site).splitlines()
    return dict(line.split(" ", 1) for line in lines)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with its links, so that building leaves nothing in the real one."""
    copy = tmp_path_factory.mktemp("source") / "vllm-spla"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "results")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", HOOK.format("sdist"), folder, cwd=source)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel_file(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    skip_without_pip()
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", *OFFLINE, "--wheel-dir", folder, sdist, cwd=folder)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(wheel_file)


@pytest.mark.skipif(not (ROOT / "kernels").exists(), reason="an unpacked sdist, in which the links are folders")
def test_links_are_links() -> None:
    assert (ROOT / "spla_backend" / "kernels").readlink() == Path("../kernels")
    assert (ROOT / "spla_backend" / "patches").readlink() == Path("../patches")


def test_sdist_holds_what_builds_and_tests_the_wheel(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive}
    assert not [name for name, member in members.items() if not (member.isfile() or member.isdir())]
    assert set(MODULES) <= set(members)
    wanted = {
        "spla_backend/kernels/gpu/decode/fused.cu",
        "pyproject.toml",
        "setup.py",
        "LICENSE",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    }
    for folder in ("tests", "scripts", "requirements", "examples", "benchmarks"):
        files = [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()]
        wanted |= {str(path) for path in files if not {"__pycache__", "results"} & set(path.parts)}
    assert wanted <= set(members)


def test_wheel_from_the_sdist_is_imported(wheel_file: Path, tmp_path: Path) -> None:
    run(*PIP, "install", *OFFLINE, "--target", tmp_path, wheel_file, cwd=tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import spla_backend.options as o; print(o.__file__)"
    assert Path(run(sys.executable, "-P", "-c", code, cwd=tmp_path).strip()).is_relative_to(tmp_path)


def test_wheel_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {"spla_backend/kernels/layout.py", "spla_backend/patches/platform.py"} < set(MODULES)
    assert sorted(name for name in names if name.endswith(".py")) == MODULES
    assert "spla_backend/py.typed" in names
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"spla_backend"}


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    def read(name: str) -> str:
        (member,) = [n for n in wheel.namelist() if n.endswith(f".dist-info/{name}")]
        return wheel.read(member).decode()

    metadata = Parser().parsestr(read("METADATA"))
    assert metadata["Name"] == "vllm-spla"
    assert metadata["License-Expression"] == "Apache-2.0"
    core = [r.split(";")[0] for r in metadata.get_all("Requires-Dist") or [] if "extra ==" not in r]
    assert not [r for r in core if r.startswith(("torch", "vllm", "triton", "nvidia"))], core
    entry_points = read("entry_points.txt")
    assert "spla = spla_backend.plugin:register" in entry_points.split("[vllm.general_plugins]")[1]
    assert "spla-model = spla_backend.models.cli:main" in entry_points
    assert "spla-eval = spla_backend.evaluate.cli:main" in entry_points
    assert "spla-env = spla_backend.environment.cli:main" in entry_points


def test_description_names_no_file_by_a_link(wheel: zipfile.ZipFile) -> None:
    """A package index shows the description alone: its links and pictures lead to other pages, or there are none."""
    (member,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(wheel.read(member).decode())
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload()
    readme = (ROOT / "README.md").read_text()
    assert re.findall("^#.*$", text, re.MULTILINE) == re.findall("^#.*$", readme, re.MULTILINE)
    for picture in re.findall(r"!\[(.*?)\]", readme, re.DOTALL):
        assert f"*Picture: {picture}.*" in text
    targets = re.findall(r"\]\s*\(\s*<?([^)\s>]*)", text)  # [text](target)
    targets += re.findall(r"^\s*\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)  # [name]: target
    targets += re.findall(r"""\b(?:src|href)\s*=\s*["']?([^"'\s>]*)""", text)
    assert "https://arxiv.org/abs/2601.22379" in targets
    assert [target for target in targets if not target.startswith("https://")] == []


def test_install_into_a_folder(source: Path, tmp_path: Path) -> None:
    skip_without_pip()
    for _ in range(2):  # The second time over the first.
        run(*PIP, "install", *OFFLINE, "--upgrade", "--target", tmp_path, ".", cwd=source)
    found = found_in(tmp_path)
    assert found["spla_backend.kernels.layout"] == str(tmp_path / "spla_backend/kernels/layout.py")
    assert found["spla_backend.patches.platform"] == str(tmp_path / "spla_backend/patches/platform.py")
    assert found["kernels"] == found["patches"] == found["tests"] == found["benchmarks"] == "None"


def test_editable_install_exposes_our_name_only(source: Path, tmp_path: Path) -> None:
    run(sys.executable, "-c", HOOK.format("editable"), tmp_path, cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    found = found_in(site)
    for name in ("spla_backend.kernels.layout", "spla_backend.patches.platform"):
        assert Path(found[name]).resolve() == (source / name.replace(".", "/")).with_suffix(".py").resolve()
    assert found["kernels"] == found["patches"] == found["tests"] == found["benchmarks"] == "None"


def test_transformers_imports_in_the_checkout() -> None:
    """A popular library is called `kernels`; transformers must not take our folder for it."""
    pytest.importorskip("transformers")
    code = "import transformers, transformers.integrations.hub_kernels; print(transformers.LlamaForCausalLM.__name__)"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "LlamaForCausalLM"


def test_plugin_imports_nothing_heavy() -> None:
    code = """
import sys
import spla_backend.plugin
heavy = {"torch", "triton", "vllm", "transformers", "numpy"} & set(sys.modules)
kernels = [name for name in sys.modules if name.startswith("spla_backend.kernels")]
assert not heavy and not kernels, (heavy, kernels)
"""
    run(sys.executable, "-c", code, cwd=ROOT)
