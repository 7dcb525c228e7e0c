"""Sizes of the package that keep it readable: modules, functions, packages, and options that travel by name."""

import ast
import statistics
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "perf_vit"
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]
NUM_LINES = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
# Arguments of timm's own functions, which change with its versions.
TIMM_SIGNATURES = {
    "conversion/save.py:load_converted",
    "conversion/save.py:load_softmax",
    "conversion/weights.py:create_with_weights",
    "backbones/hct.py:hct_base",
    "backbones/linear_vit.py:__init__",
    "backbones/rope_vit.py:__init__",
    "models/valid_tokens.py:forward",
}
# Signatures of other libraries, which call or are called with them.
OTHER_SIGNATURES = {"cli/main.py:show", "workflows/progress.py:__init__"}


def functions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of the package with its name, "package/module.py:function"."""
    return [
        (f"{path.relative_to(PACKAGE).as_posix()}:{node.name}", node)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines without the docstring."""
    first = function.body[0]
    docs = first.end_lineno - first.lineno + 1 if ast.get_docstring(function, clean=False) is not None else 0
    return function.end_lineno - function.lineno + 1 - docs


def only_forwards_options(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether the function does nothing with its `**options` but pass them on."""
    if function.args.kwarg is None:
        return False
    name, nodes = function.args.kwarg.arg, list(ast.walk(function))
    num_uses = sum(isinstance(node, ast.Name) and node.id == name for node in nodes)
    forwarded = [
        keyword
        for call in nodes
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg is None and isinstance(keyword.value, ast.Name) and keyword.value.id == name
    ]
    return 0 < len(forwarded) == num_uses


def test_the_package_has_at_most_286_modules_of_readable_length() -> None:
    assert len(MODULES) <= 286
    assert 120 <= statistics.median(NUM_LINES.values()) <= 190
    assert [str(path) for path, lines in NUM_LINES.items() if lines > 450] == []


def test_no_package_has_more_than_20_modules_flat() -> None:
    packages = Counter(path.parent for path in MODULES)
    assert [str(folder) for folder, num in packages.items() if num > 20] == []


def test_few_functions_are_longer_than_40_lines() -> None:
    assert len([name for name, function in functions() if num_lines(function) > 40]) <= 6


def test_options_are_forwarded_unnamed_to_timm_only() -> None:
    assert {name for name, each in functions() if only_forwards_options(each)} == TIMM_SIGNATURES | OTHER_SIGNATURES


def test_forwarding_is_recognised() -> None:
    code = "def f(a, **b): return g(a, **b)\ndef h(**b): return g(**b, c=len(b))\ndef i(**b): return b"
    assert [only_forwards_options(each) for each in ast.parse(code).body] == [True, False, False]
