"""Loads `datasets/<name>/prepare.py`, which is no package."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2] / "datasets"


def load_prepare(name: str) -> ModuleType:
    """The module of a data set's script."""
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
