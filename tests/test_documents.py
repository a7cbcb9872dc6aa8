"""Documents name files, functions and options that exist."""

import re
from pathlib import Path

import pytest

from spla_backend.options import SplaOptions

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/README.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
RESULTS = ROOT / "benchmarks" / "results"
FOLDERS = (
    r"(?:benchmarks|docs|examples|kernels|patches|requirements|scripts|spla_backend|tests"
    r"|algorithm|calibrate|engine|environment|evaluate|models)"
)


def exists(path: Path) -> bool:
    """Whether a path of the repository exists; an unpacked sdist has no results, and folders in the place of links."""
    if path.is_relative_to(RESULTS) and not RESULTS.exists():
        return True
    inside = path.relative_to(ROOT)
    return any((ROOT / folder / inside).exists() for folder in ("", "spla_backend", "tests"))


def anchors(path: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        if "://" in link:
            continue
        path = (document.parent / file).resolve() if file else document
        if not exists(path) or (anchor and anchor not in anchors(path)):
            missing.append(link)
    for name in re.findall(rf"`({FOLDERS}/[\w/]+\.\w+)(?:::[\w.]+)?`", text):
        if not exists(ROOT / name):
            missing.append(name)
    for name in re.findall(r"`((?:[a-z0-9_]+_h200|quality_\w+|engine_cpu)\.json)`", text):
        if not exists(RESULTS / name):
            missing.append(name)
    assert not missing


def test_tests_named_in_the_table_exist() -> None:
    missing, path = [], ROOT / "tests"
    for file, function in re.findall(r"`([\w/]+\.py)?::(\w+)`", (path / "README.md").read_text()):
        if file:  # else the file of the name before
            path = ROOT / "tests" / file
        if f"def {function}(" not in path.read_text():
            missing.append(f"{path.name}::{function}")
    assert not missing


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_option_is_documented() -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "options.md").read_text(), re.MULTILINE))
    assert set(SplaOptions.__dataclass_fields__) <= documented
