"""The layout's one rule: a module imports from lower levels only, never from a sibling package."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "perf_vit"

LEVELS = {
    "_version": -1,
    "types": 0,
    "errors": 0,
    "text": 0,
    "threads": 0,
    "registry": 0,
    # Above errors, which they raise, and below all else.
    "config": 1,
    "files": 1,
    "finite": 1,
    "ops": 1,
    "tiling": 1,
    "distributed": 1,
    "geometry": 1,
    "layers": 2,
    "plotting": 2,
    "sources": 3,
    "transforms": 2,
    "conversion": 3,
    "backbones": 4,
    "labels": 4,
    "models": 5,
    "metrics": 6,
    "reporting": 6,
    "streaming": 6,
    "writers": 6,
    "data": 6,
    "tasks": 7,
    "inference": 7,
    "workflows": 8,
    "cli": 9,
    "__main__": 10,
    "__init__": 10,
}


def _owner(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported_packages(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, package) of every `perf_vit.package` that the module imports, at its top or inside functions."""
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "perf_vit":
            names = [f"perf_vit.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found += [(node.lineno, n.split(".")[1]) for n in names if n.startswith("perf_vit.")]
    return found


def _violations(source: str, owner: str) -> list[str]:
    return [
        f"line {line}: {owner} (level {LEVELS[owner]}) imports {package} (level {LEVELS[package]})"
        for line, package in _imported_packages(ast.parse(source))
        if package != owner and LEVELS[package] >= LEVELS[owner]
    ]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_imports_from_lower_levels_only(path: Path) -> None:
    assert _violations(path.read_text(), _owner(path)) == []


def test_relative_imports_are_not_used() -> None:
    relative = [
        f"{path}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    assert relative == []


@pytest.mark.parametrize(
    ("source", "owner"),
    [
        ("import perf_vit.data", "models"),
        ("from perf_vit.sources import open_source", "transforms"),
        ("def f():\n    from perf_vit import cli", "tasks"),
    ],
)
def test_rule_sees_an_import_upwards_or_sideways(source: str, owner: str) -> None:
    assert len(_violations(source, owner)) == 1


def test_nothing_imports_the_datasets_or_tools_folders() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in {"datasets", "tools"}, path
            elif isinstance(node, ast.Import):
                assert not {a.name.split(".")[0] for a in node.names} & {"datasets", "tools"}, path
