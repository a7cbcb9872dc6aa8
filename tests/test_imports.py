"""No module of the package imports another that imports it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "spla_backend"


def files(folder: Path = PACKAGE) -> Iterator[Path]:
    """Source files, those behind the links `kernels` and `patches` too."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from files(path)
        elif path.suffix == ".py":
            yield path


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in files()}


def imports(node: ast.AST, in_functions: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Statements that run when a module is imported, or later if `in_functions`; not those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            if in_functions:
                yield from imports(child, in_functions)
        elif not (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")):
            yield from imports(child, in_functions)


def imported(module: str, in_functions: bool) -> set[str]:
    """Modules of the package that a module imports."""
    path, found = MODULES[module], set()
    package = module.split(".")[: None if path.name == "__init__.py" else -1]
    for statement in imports(ast.parse(path.read_text()), in_functions):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
            continue
        base = package[: len(package) - statement.level + 1] if statement.level else []
        source = ".".join([*base, *([statement.module] if statement.module else [])])
        found |= {source, *(f"{source}.{alias.name}" for alias in statement.names)}
    return found & MODULES.keys() - {module}


def cycles(in_functions: bool) -> list[list[str]]:
    """Groups of modules each of which reaches all others of its group."""
    edges = {module: imported(module, in_functions) for module in MODULES}

    def reached(module: str) -> set[str]:
        seen: set[str] = set()
        left = [module]
        while left:
            new = edges[left.pop()] - seen
            seen |= new
            left += new
        return seen

    reach = {module: reached(module) for module in MODULES}
    groups = {tuple(sorted(x for x in reach[m] if m in reach[x])) for m in MODULES if m in reach[m]}
    return [list(group) for group in sorted(groups)]


def test_modules_are_found() -> None:
    assert {"spla_backend.kernels.dispatch", "spla_backend.patches.platform", "spla_backend"} <= MODULES.keys()
    assert "spla_backend.kernels.interface" in imported("spla_backend.kernels.dispatch", in_functions=False)
    assert "spla_backend.kernels.gpu.attention" in imported("spla_backend.kernels.dispatch", in_functions=True)


@pytest.mark.parametrize("in_functions", [False, True], ids=["on-import", "at-any-time"])
def test_no_module_imports_itself_by_way_of_others(in_functions: bool) -> None:
    assert cycles(in_functions) == []
