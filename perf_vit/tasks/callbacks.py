"""Callbacks: history and plots, redraws of random projections, checkpoints and resuming."""

from __future__ import annotations

import csv
import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import (
    Checkpoint,
    EarlyStopping,
    ModelCheckpoint,
    RichProgressBar,
)
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.markup import escape
from torch import Tensor

from perf_vit.distributed import sample_rank_and_world_size
from perf_vit.errors import OutputError, reason_line
from perf_vit.files import atomic_file
from perf_vit.layers import redraw_projections
from perf_vit.text import printable

__all__ = [
    "SEGMENTATION_CURVES",
    "Curves",
    "EpochMeans",
    "EpochProgressBar",
    "FolderCheckpoint",
    "HistoryCallback",
    "Patience",
    "RedrawProjections",
    "StepCheckpoint",
    "StepSeeds",
    "ValidateLastEpoch",
    "WholeCheckpoints",
    "plot_history",
]

_logger = logging.getLogger("perf_vit")

# Least time between two pictures of the history.
_PLOT_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Metrics to plot and log, losses in one panel and scores in another.

    Attributes:
        losses: Names of losses.
        scores: Names of scores.
        title: Title of the score panel.
        log_losses: Whether the loss axis is logarithmic.
        score_range: Range of the score axis; None to fit the scores.
    """

    losses: tuple[str, ...]
    scores: tuple[str, ...]
    title: str
    log_losses: bool = False
    score_range: tuple[float, float] | None = (0.0, 1.0)


SEGMENTATION_CURVES = Curves(
    losses=("train/loss", "val/loss"), scores=("val/iou", "val/f1"), title="validation, mean over classes"
)


class HistoryCallback(lightning.Callback):
    """Writer of `metrics.csv` and `loss_curve.png` in the run folder.

    The table is written after each epoch. The picture takes longer than a short epoch: it is written at the end of an
    epoch if the last one is ten seconds old, and when training ends or fails. The callback also logs a line per epoch
    to the logger "perf_vit" at INFO, for runs without a terminal. The rows are part of the checkpoint, so a resumed
    run's files hold all epochs (Lightning's CSVLogger starts a new file). Epochs are counted from 1; the row of a
    validation before training has epoch 0.

    Args:
        folder: Run folder.
        curves: Metrics to plot and log.
    """

    def __init__(self, folder: Path, curves: Curves = SEGMENTATION_CURVES) -> None:
        self.folder = folder
        self.curves = curves
        self.rows: list[dict[str, float]] = []
        self._is_validated = False
        self._is_plotted = True
        self._plotted_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Return the rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows from the checkpoint of a resumed run."""
        self.rows = state_dict["rows"]

    def on_sanity_check_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Add a row with the scores before training, unless the run was resumed."""
        if not self.rows:
            self.rows = [{"epoch": 0, **{key: float(value) for key, value in trainer.callback_metrics.items()}}]

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Mark the scores as those of this epoch."""
        self._is_validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Add the row of this epoch and write the files."""
        # Lightning keeps the scores of the last validation in epochs without one.
        values = {
            key: float(value)
            for key, value in trainer.callback_metrics.items()
            if self._is_validated or not key.startswith("val/")
        }
        self._is_validated = False
        epoch = trainer.current_epoch + 1
        rows = [row for row in self.rows if row["epoch"] < epoch]
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        self.rows = [*rows, {"epoch": epoch, "lr": lr, **dict(sorted(values.items()))}]
        if trainer.is_global_zero:
            self._write()
            self._is_plotted = False
            if time.monotonic() - self._plotted_at >= _PLOT_SECONDS:
                self._plot()
            names = (*self.curves.losses, *self.curves.scores)
            shown = ", ".join(f"{key} {values[key]:.4f}" for key in names if key in values)
            _logger.info("epoch %d of %s: %s", epoch, trainer.max_epochs, shown)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Plot the rows that the picture lacks."""
        if not self._is_plotted:
            self._plot()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Plot the rows that the picture lacks, unless that fails, too."""
        with suppress(OutputError):
            self.on_train_end(trainer, pl_module)

    def _write(self) -> None:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        path = self.folder / "metrics.csv"
        with atomic_file(path) as new, new.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)

    def _plot(self) -> None:
        with atomic_file(self.folder / "loss_curve.png") as new:
            plot_history(self.rows, new, self.curves)
        self._is_plotted, self._plotted_at = True, time.monotonic()


def plot_history(
    rows: list[dict[str, float]],
    path: Path,
    curves: Curves = SEGMENTATION_CURVES,
    format: Literal["png", "svg"] = "png",  # noqa: A002
) -> None:
    """Plot losses (left) and validation scores (right) against the epoch."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, scores = figure.subplots(1, 2)
    for axes, keys in ((losses, curves.losses), (scores, curves.scores)):
        for key in keys:
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=key)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    losses.set_title("loss")
    if curves.log_losses:
        losses.set_yscale("log")
    scores.set_title(curves.title)
    if curves.score_range is not None:
        scores.set_ylim(*curves.score_range)
    figure.savefig(path, dpi=110, format=format)


class EpochProgressBar(RichProgressBar):
    """Lightning's progress bar, with epochs counted from 1, as in logs and file names."""

    _windows_bar: Any = None

    def _get_train_description(self, current_epoch: int) -> str:
        of_all = "" if self.trainer.max_epochs in (None, -1) else f" of {self.trainer.max_epochs}"
        # A width of its own would make the bar flicker between training and validation.
        return f"Epoch {current_epoch + 1}{of_all}".ljust(len(self.validation_description))

    def show_windows(self, description: str, done: int, total: int) -> None:
        """Show how many windows of the current slide are done, in a bar of its own.

        Args:
            description: Name of the slide, and what is done with its windows.
            done: Number of windows that are done.
            total: Number of windows.
        """
        if self.progress is None or not self.is_enabled:
            return
        if self._windows_bar is None:
            self._windows_bar = self.progress.add_task("", total=total)
        text = escape(printable(description))
        self.progress.update(self._windows_bar, description=text, completed=done, total=total)
        self.refresh()

    def hide_windows(self) -> None:
        """Remove the bar of `show_windows`."""
        if self.progress is not None and self._windows_bar is not None:
            self.progress.remove_task(self._windows_bar)
        self._windows_bar = None


class ValidateLastEpoch(lightning.Callback):
    """Validation of the last epoch, whatever Lightning's `check_val_every_n_epoch` is, so that a best model exists.

    Args:
        every_n_epochs: Number of epochs between the other validations.
    """

    def __init__(self, every_n_epochs: int) -> None:
        self.every_n_epochs = every_n_epochs

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Set the interval of an epoch that is resumed after its start, for which Lightning calls no other hook."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Set the interval that decides whether this epoch is validated."""
        is_last = trainer.current_epoch + 1 == trainer.max_epochs
        trainer.check_val_every_n_epoch = 1 if is_last else self.every_n_epochs


class RedrawProjections(lightning.Callback):
    """Redraw of the random projections of Performer attention every few optimizer steps.

    Batches from optimizer step s on train with draw number s // every_n_steps. The draw depends on
    `trainer.global_step` only: all processes agree without communication, a resumed run continues the schedule, and
    batches whose gradients accumulate into one step share a draw.

    The redraw happens before a training batch, so validation and prediction use the draw of the last training batch.
    The weights belong to this draw: `SegmentationTask` saves its number in the checkpoint, where `load_segmenter` reads
    it. Other Lightning modules need `current_draw` and `redraw_projections` in their checkpoint hooks.

    Args:
        every_n_steps: Number of optimizer steps per draw.

    Raises:
        ValueError: `every_n_steps` is less than 1.
    """

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(
                f"every_n_steps must be at least 1, got {every_n_steps}; leave the callback out to keep the first draw"
            )
        self.every_n_steps = every_n_steps

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Redraw the projections if the step needs another draw."""
        redraw_projections(pl_module, trainer.global_step // self.every_n_steps)


_MEANS = "perf_vit_means"
"""Key of the epoch's sums in a Lightning checkpoint."""


class WholeCheckpoints(TorchCheckpointIO):
    """Atomic checkpoint writer: renames a temporary file in the target folder, so a killed process keeps the last one.

    Lightning moves the file from the system's temporary folder, which copies across file systems.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: Contents.
            path: Output file.
            storage_options: Not used.

        Raises:
            OutputError: The file can't be written, e.g. because the disk is full.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_file(path) as unfinished, unfinished.open("wb") as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:
            # torch raises RuntimeError if writing fails.
            raise OutputError(f"can't write {path}: {reason_line(error)}; is the disk full?") from error


class FolderCheckpoint(ModelCheckpoint):
    """Lightning's checkpoint callback, which also finds its best score after the run folder was moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore scores and files, relative to the current folder."""
        state = {**state_dict, "dirpath": self.dirpath}
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = self._here(state[key])
        state["best_k_models"] = {self._here(path): score for path, score in state["best_k_models"].items()}
        super().load_state_dict(state)

    def _here(self, path: str) -> str:
        return os.path.join(str(self.dirpath), os.path.basename(path)) if path else path


class Patience(EarlyStopping):
    """Lightning's early stopping, with the patience of the current config after a resume; stopped runs stay stopped."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score and the number of validations since."""
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop at once if the patience is already exhausted."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class StepSeeds(lightning.Callback):
    """Seeding of each training step, so that dropout and sampled anchors depend on the step and the process only.

    No random state has to be saved in checkpoints, which one process writes for all.

    Args:
        seed: Seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed torch's generators."""
        # Processes that share a tile decide alike which layers to drop.
        place = (self.seed, trainer.current_epoch, batch_idx, sample_rank_and_world_size()[0])
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1))


class EpochMeans(lightning.Callback):
    """Saving of the sums behind the epoch's training means in checkpoints within an epoch.

    Lightning resets them on resume. A checkpoint holds the sums of the process that writes it; with several processes,
    the row of the interrupted epoch averages the batches after the resume only.
    """

    def __init__(self) -> None:
        self._before: dict[str, list[Tensor]] = {}

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the sums."""
        if trainer.training and trainer.world_size == 1:
            checkpoint[_MEANS] = {key: list(_sums(metric)) for key, metric in _means(trainer).items()}

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the sums of an unfinished epoch."""
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
        if epochs["processed"] < epochs["started"] and trainer.world_size == 1:
            self._before = checkpoint.get(_MEANS, {})

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the restored sums to those of the first batch."""
        means = _means(trainer)
        for key, before in self._before.items():
            if key in means:
                for now, earlier in zip(_sums(means[key]), before, strict=True):
                    now += earlier.to(now.device)
        self._before = {}


def _means(trainer: lightning.Trainer) -> dict[str, Any]:
    """Return Lightning's metrics that are logged as means over the epoch's batches."""
    results = trainer._results
    return {key: each for key, each in (results or {}).items() if each.meta.on_epoch and each.meta.is_mean_reduction}


def _sums(metric: Any) -> tuple[Tensor, Tensor]:
    """Return the sum of values weighted by batch size, and the sum of batch sizes."""
    return metric.value, metric.cumulated_batch_size


class StepCheckpoint(Checkpoint):
    """Checkpoint every few optimizer steps, written over that of the last epoch.

    None is written at the end of an epoch, where the epoch's checkpoint follows after validation.

    Args:
        path: Checkpoint file.
        every_n_steps: Number of optimizer steps between checkpoints.
    """

    def __init__(self, path: Path, every_n_steps: int) -> None:
        self.path = path
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint if it is due; not between the accumulated batches of a step."""
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and trainer.global_step % self.every_n_steps == 0 and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)
