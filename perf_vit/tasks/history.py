"""Metrics of a run by epoch, as CSV file and plot that survive a resume."""

from __future__ import annotations

import csv
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from perf_vit.files import atomic_file

__all__ = ["SEGMENTATION_CURVES", "Curves", "HistoryCallback", "plot_history"]

_logger = logging.getLogger("perf_vit")


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
    """Writer of `metrics.csv` and `loss_curve.png` in the run folder, updated after each epoch.

    It also logs a line per epoch to the logger "perf_vit" at INFO, for runs without a terminal. The rows are part of
    the checkpoint, so a resumed run's files hold all epochs (Lightning's CSVLogger starts a new file). The row of a
    validation before training has epoch -1.

    Args:
        folder: Run folder.
        curves: Metrics to plot and log.
    """

    def __init__(self, folder: Path, curves: Curves = SEGMENTATION_CURVES) -> None:
        self.folder = folder
        self.curves = curves
        self.rows: list[dict[str, float]] = []
        self._is_validated = False

    def state_dict(self) -> dict[str, Any]:
        """Return the rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows from the checkpoint of a resumed run."""
        self.rows = state_dict["rows"]

    def on_sanity_check_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Add a row with the scores before training, unless the run was resumed."""
        if not self.rows:
            self.rows = [{"epoch": -1, **{key: float(value) for key, value in trainer.callback_metrics.items()}}]

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Mark the scores as those of this epoch."""
        self._is_validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Add the row of this epoch and rewrite both files."""
        # Lightning keeps the scores of the last validation in epochs without one.
        values = {
            key: float(value)
            for key, value in trainer.callback_metrics.items()
            if self._is_validated or not key.startswith("val/")
        }
        self._is_validated = False
        rows = [row for row in self.rows if row["epoch"] < trainer.current_epoch]
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        self.rows = [*rows, {"epoch": trainer.current_epoch, "lr": lr, **dict(sorted(values.items()))}]
        if trainer.is_global_zero:
            self._write()
            names = (*self.curves.losses, *self.curves.scores)
            shown = ", ".join(f"{key} {values[key]:.4f}" for key in names if key in values)
            _logger.info("epoch %d of %s: %s", trainer.current_epoch + 1, trainer.max_epochs, shown)

    def _write(self) -> None:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        path = self.folder / "metrics.csv"
        with atomic_file(path) as new, new.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        with atomic_file(self.folder / "loss_curve.png") as new:
            plot_history(self.rows, new, self.curves)


def plot_history(rows: list[dict[str, float]], path: Path, curves: Curves = SEGMENTATION_CURVES) -> None:
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
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    losses.set_title("loss")
    if curves.log_losses:
        losses.set_yscale("log")
    scores.set_title(curves.title)
    if curves.score_range is not None:
        scores.set_ylim(*curves.score_range)
    figure.savefig(path, dpi=110, format="png")
