"""Modules loaded once, before processes are forked."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fuzzing.judge import Limits, run_in_fork

import perf_vit

__all__ = ["import_package", "import_what_runs_need"]


def import_package() -> None:
    """Import all of perf_vit; commands import their parts when they are called."""
    for module in pkgutil.walk_packages(perf_vit.__path__, "perf_vit."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def import_what_runs_need(actions: dict[str, Callable[[], None]], folder: Path, limits: Limits) -> None:
    """Run actions in forks, and import here what they imported there.

    The parent itself must not run them: threads that libraries start don't survive a fork.

    Raises:
        RuntimeError: an action failed.
    """
    for name, action in actions.items():

        def listed(action: Callable[[], None] = action, name: str = name) -> None:
            before = set(sys.modules)
            try:
                action()
            finally:
                (folder / f"{name}.modules").write_text("\n".join(sorted(set(sys.modules) - before)))

        outcome = run_in_fork(listed, folder / name, limits)
        if outcome.code != 0:
            raise RuntimeError(f"{name} failed on undamaged files: {outcome.errors.strip() or outcome}")
        for module in (folder / f"{name}.modules").read_text().splitlines():
            # Parts of packages that can't be imported alone; the command does it again.
            with suppress(Exception):
                importlib.import_module(module)
