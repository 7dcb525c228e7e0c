"""Which files in a folder are those of a training run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from perf_vit.config import find_config, is_dumped
from perf_vit.errors import OutputError
from perf_vit.io import check_outputs

__all__ = ["CONFIG", "RUN_FILES", "check_config_kept", "check_run_files"]

CONFIG = "config.yaml"
"""The resolved config, whose first line says that the folder is a run's."""

RUN_FILES = (CONFIG, "checkpoints", "metrics.csv", "loss_curve.png", "pictures", "tensorboard", "wandb")
"""Files and folders that a run writes into its folder."""


def check_config_kept(config: str | Path, run: Any) -> None:
    """Refuse a new run that would write its resolved config over the file that it was made from.

    Args:
        config: that the run was loaded from.
        run: the loaded config, with `out` and `resume`.

    Raises:
        OutputError: it would.
    """
    dumped = Path(run.out) / CONFIG
    if dumped.exists() and not run.resume:
        check_outputs([dumped], [find_config(config)], overwrite=True)


def check_run_files(folder: Path, more: Iterable[str] = ()) -> None:
    """Refuse a folder where a run would write over files that no run has made.

    Args:
        folder: of the run.
        more: names of what this run writes besides `RUN_FILES`.

    Raises:
        OutputError: names the first such file.
    """
    if is_dumped(folder / CONFIG):
        return
    for name in (*RUN_FILES, *more):
        if os.path.lexists(folder / name):
            raise OutputError(
                f"{folder / name} exists already and is not of a run of perf-vit, whose {CONFIG} would say so; move it "
                "away or choose another out="
            )
