"""Training of all tasks: from a config to a run folder."""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from perf_vit.distributed import end_processes, has_processes, rank_and_world_size
from perf_vit.errors import ConfigError, DataWarning, OptionError, extra, parsing, reason_line

with extra("train", "training"):
    from perf_vit.config import Config, Overrides, as_overrides, config_value, load_config
    from perf_vit.tasks import ThroughEncoderTask, TileFit, build_trainer, fit_max_tile
    from perf_vit.tasks.sequence_parallel import check_sequence_parallel
    from perf_vit.tasks.through_encoder import wait_for_long_steps
    from perf_vit.workflows.progress import progress_shown
    from perf_vit.workflows.registry import TASKS
    from perf_vit.workflows.reports.training import REPORT, write_training_report
    from perf_vit.workflows.run_config import TaskRunConfig
    from perf_vit.workflows.run_folder import CONFIG, RunFolder, check_config_kept
    from perf_vit.workflows.task import Task
    from perf_vit.writers import check_outputs

__all__ = ["Run", "fit_tile", "parse_bytes", "read_run", "train", "train_run", "with_out"]

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Run:
    """The folder of a training run.

    Attributes:
        folder: Path of the folder.
    """

    folder: Path

    @property
    def best(self) -> Path:
        """Path of the best checkpoint; of a distillation, of the best student's folder."""
        student = self.folder / "student"
        return student if student.is_dir() else self.folder / "checkpoints" / "best.ckpt"

    @property
    def metrics(self) -> list[dict[str, float]]:
        """Rows of `metrics.csv`, one per epoch, without the values that an epoch has none of.

        Raises:
            InputError: The file is missing or damaged.
        """
        path = self.folder / "metrics.csv"
        with parsing(path, "CSV of numbers"), path.open(newline="", encoding="utf-8") as file:
            return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]

    def load(self) -> nn.Module:
        """Load the best model, in evaluation mode, on the CPU."""
        from perf_vit.workflows.load import load

        return load(self.folder)

    def report(self, path: str | Path | None = None, *, overwrite: bool = False) -> Path:
        """Write curves, scores, worst and best validation tiles and settings as one HTML page.

        The data of the run must be there.

        Args:
            path: Output file; `report.html` in the folder by default, which is replaced.
            overwrite: Replace another file that exists.

        Raises:
            PerfVitError: The data of the run can't be read, or nothing can be written there.
        """
        if path is not None:
            check_outputs([path], [], overwrite=overwrite)
        config = read_run(self.folder / CONFIG, out=self.folder)
        task = TASKS[config.task]
        device = "cpu" if config.trainer.accelerator == "cpu" else "auto"
        return self.write_report(task, task.build_data(config), path, device=device)

    def write_report(self, task: Task, data: Any, path: str | Path | None = None, *, device: str = "auto") -> Path:
        """Write the report with the run's data module, scoring tiles on a device; see `report`."""
        target = self.folder / REPORT if path is None else Path(path)
        # A run that was never validated has no best model.
        network = self.load() if self.best.exists() else None
        tiles = getattr(data, "val", None)
        return write_training_report(target, self.folder, self.metrics, task, network, tiles, device)

    def plot(self) -> Image.Image:
        """Losses and scores by epoch, as a picture."""
        return Image.open(self.folder / "loss_curve.png")


def train(
    config: Config, overrides: Overrides | None = None, *, out: str | Path | None = None, progress: bool = True
) -> Run:
    """Train a model and leave checkpoints, metrics, curves and the resolved config in a run folder.

    Everything is opened and built before the folder is touched, so a wrong argument leaves nothing behind.

    Args:
        config: YAML file, name of a shipped config such as "segmentation/buildings", or a mapping of what a config
            holds.
        overrides: Values by dotted key, such as {"data.tile_px": 512}, or ["data.tile_px=512"].
        out: Run folder, instead of the key `out`.
        progress: Show progress bars.

    Returns:
        The run.

    Raises:
        PerfVitError: A config, input or output that doesn't fit.
    """
    run = read_run(config, overrides, out)
    if not isinstance(config, Mapping):
        check_config_kept(config, run)
    with progress_shown(progress):
        return train_run(run, progress=progress)


def read_run(config: Config, overrides: Overrides | None = None, out: str | Path | None = None) -> TaskRunConfig:
    """The resolved config of a run, in the schema of its key `task`; see `train`.

    Raises:
        ConfigError: A key or value that doesn't fit.
    """
    given = with_out(overrides, out)
    run: TaskRunConfig = load_config(config, _task_of(config, given).run_config, given)
    return run


def _task_of(config: Config, overrides: Overrides) -> Task:
    return TASKS[str(config_value(config, "task", overrides, "segmentation"))]


def with_out(overrides: Overrides | None, out: str | Path | None) -> Overrides:
    """Overrides with a run folder, if one is given."""
    given = as_overrides(overrides)
    if out is None:
        return given
    return {**given, "out": str(out)} if isinstance(given, Mapping) else [*given, f"out={json.dumps(str(out))}"]


def train_run(config: TaskRunConfig, *, progress: bool = True) -> Run:
    """Train the model of a resolved config; see `train`."""
    task = TASKS[config.task]
    run = RunFolder(config)
    config = run.config
    data: Any = task.build_data(config)
    module = task.build_module(config, data)
    run.check_network(module)
    trainer = build_trainer(
        config.trainer,
        run.path,
        progress=progress,
        monitor=getattr(module, "monitor", None) or task.monitor,
        curves=task.curves,
        draw=task.draw,
        seed=config.seed,
    )
    if config.trainer.sequence_parallel:
        check_sequence_parallel(trainer, module)
    if isinstance(module, ThroughEncoderTask):
        wait_for_long_steps(trainer)
    if task.prepare_data is not None:
        # Features are computed on the device of this process.
        module.to(trainer.strategy.root_device)
        data = task.prepare_data(config, data, module, run.path)
    # A task of one's own may have other keys of data.
    data.global_batch_size = getattr(getattr(config, "data", None), "global_batch_size", None)
    is_own_group = not has_processes()
    run.fit(trainer, module, data)
    if is_own_group:
        # Only the first process writes the report, and the others don't wait for it.
        end_processes()
    found = Run(run.path)
    if config.trainer.report and trainer.is_global_zero:
        _report_or_warn(found, task, data, str(trainer.strategy.root_device))
    return found


def _report_or_warn(run: Run, task: Task, data: Any, device: str) -> None:
    """Write the report of a run that has ended well, which it stays without a report."""
    try:
        if rank_and_world_size()[1] > 1:
            raise ConfigError("the caller's process group is still there; call Run.report in a single process")
        run.write_report(task, data, device=device)
    # Data, registered tasks and metrics, drawing and the device have errors of their own.
    except Exception as error:
        message = f"{run.folder} is trained but has no report: {reason_line(error)}"
        warnings.warn(message, DataWarning, stacklevel=2)


def fit_tile(
    config: Config,
    overrides: Overrides | None = None,
    *,
    memory: str | None = None,
    batch_size: int | None = None,
    max_tile: int = 8192,
    on_measured: Callable[[int, int | None], None] = lambda tile_px, peak_bytes: None,
) -> TileFit:
    """Find the largest tile that a config can be trained on, by training steps on growing tiles.

    Args:
        config: Config of a run as `train` takes it; its data must be there: they have the bands and classes.
        overrides: Values by dotted key.
        memory: Memory such as 16GB; what is free by default.
        batch_size: Tiles of a step; the config's by default.
        max_tile: Largest tile size to try, in pixels.
        on_measured: Called with each tile size and the bytes that it took, None where these were too many.

    Raises:
        PerfVitError: A config or input that doesn't fit, a task without tiles, or too little memory for any tile.
    """
    limit = None if memory is None else parse_bytes(memory)
    given = as_overrides(overrides)
    task = _task_of(config, given)
    if task.training_steps is None:
        having = [name for name, each in TASKS.items() if each.training_steps is not None]
        raise ConfigError(f"tiles are fitted for configs of {' and '.join(having)}, got one of {task.name}: {config}")
    # Nothing is written, so a run folder is not asked for.
    run = read_run(config, given, ".")
    if run.trainer.sequence_parallel:
        raise ConfigError(
            "tiles are fitted for one process, got trainer.sequence_parallel="
            f"{str(run.trainer.sequence_parallel).lower()}, with which several share a tile; set it to false"
        )
    steps = task.training_steps(run)
    steps = steps if batch_size is None else replace(steps, batch_size=batch_size)
    return fit_max_tile(steps, limit, max_tile_px=max_tile, on_measured=on_measured)


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 16GB, 500MB or 1.5GiB.

    Raises:
        OptionError: No such size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([MGT]I?B)\s*", text.upper())
    if match is None or float(match[1]) <= 0:
        raise OptionError(f"memory must be a size such as 16GB, 500MB or 1.5GiB, got {text}")
    return int(float(match[1]) * _UNITS[match[2]])
