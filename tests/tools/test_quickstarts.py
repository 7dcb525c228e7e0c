"""tools/quickstarts.py: every extra that a user installs has a quickstart."""

import importlib
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_extra_has_a_quickstart_whose_scripts_compile(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    quickstarts = importlib.import_module("quickstarts").QUICKSTARTS
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    of_developers = {"dev", "docs"}
    assert set(quickstarts) == {"core", *project["optional-dependencies"]} - of_developers
    steps = [step for parts in quickstarts.values() for part in parts for step in part]
    for step in steps:
        if isinstance(step, str):
            compile(step, "<quickstart>", "exec")
        else:
            assert step[0] == "perf-vit"
