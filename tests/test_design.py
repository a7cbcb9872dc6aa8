"""`docs/design.md` names places in the source; they exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DESIGN = (ROOT / "docs" / "design.md").read_text()
CONCEPTS = ("store", "fold", "score", "select", "attend", "subtract", "combine")
PATHS = ("reference", "torch", "numba", "GPU decode", "fused", "prefill")


def section(title: str) -> str:
    """Text from a heading that contains `title` to the next one of its level."""
    return re.split(r"^## ", DESIGN.split(title, 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def concept_table() -> tuple[list[str], dict[str, list[str]]]:
    """Header cells, and the cells of every concept; the concepts themselves are left out."""
    lines = [line.strip("| ") for line in section("Concept by path").splitlines() if line.startswith("|")]
    header, _, *body = ([cell.strip() for cell in re.split(r" \| ", line)] for line in lines)
    return header[1:], {concept: cells for concept, *cells in body}


def names_of(path: Path) -> set[str]:
    """Functions, classes and methods (`Class.method`) of a Python file, functions of a CUDA one."""
    if path.suffix == ".cu":
        return set(re.findall(r"^(?:DEVICE|KERNEL\(.*?\)) (?:[\w<>*&:]+ )*\*?(\w+)\(", path.read_text(), re.MULTILINE))
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def find(name: str, folder: str = "") -> Path:
    """A file of the package, by its path from `folder` of the package, or from the package where it says so itself."""
    return ROOT / "spla_backend" / ("" if "/" in name else folder) / name


HEADER, TABLE = concept_table()
CELLS = [(concept, path) for concept in CONCEPTS for path in range(len(PATHS))]


def test_table_has_every_concept_and_path() -> None:
    assert list(TABLE) == list(CONCEPTS)
    assert len(HEADER) == len(PATHS) and all(cell.startswith(path) for cell, path in zip(HEADER, PATHS, strict=True))
    assert all(len(cells) == len(PATHS) for cells in TABLE.values())


@pytest.mark.parametrize(("concept", "path"), CELLS, ids=[f"{concept}-{PATHS[path]}" for concept, path in CELLS])
def test_places_exist(concept: str, path: int) -> None:
    (folder,) = re.findall(r"`(.*?)/`", HEADER[path])
    places = re.findall(r"`(\S+?)::(\S+?)`", TABLE[concept][path])
    assert places, f"{concept} by {PATHS[path]} names no place"
    for file, name in places:
        assert name in names_of(find(file, folder)), f"{file} has no {name}"


def test_tree_is_the_tree() -> None:
    """Section 7 names files and folders that exist, and every file with kernels."""
    named: set[str] = set()
    folders: list[str] = []
    for line in section("Where things are").split("```")[1].splitlines():
        if match := re.match(r"( *)(\S+)(?:  |$)", line):
            indent, name = len(match[1]) // 2, match[2].rstrip("/")
            folders[indent:] = [f"{folders[indent - 1]}/{name}" if indent else name]
            named.add(folders[indent])
    # In an unpacked sdist what the two links point to is in their places.
    missing = [name for name in named if not ((ROOT / name).exists() or find(name).exists())]
    assert not missing
    kernels = find("kernels")
    files = {f"kernels/{path.relative_to(kernels)}" for path in kernels.rglob("*") if path.suffix in (".py", ".cu")}
    assert files and files <= named, f"section 7 does not name {files - named}"
