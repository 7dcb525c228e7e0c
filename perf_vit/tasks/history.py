"""A run's metrics by epoch, as a CSV file and a picture that survive a resume."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import lightning
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["HistoryCallback", "plot_history"]

_logger = logging.getLogger("perf_vit")
_SHOWN = ("train/loss", "val/loss", "val/iou", "val/f1")


class HistoryCallback(lightning.Callback):
    """Writes `metrics.csv` and `loss_curve.png` into the run folder after each epoch.

    It logs a line an epoch to the logger "perf_vit" at INFO, for runs without a terminal. The rows are part of the
    checkpoint, so a resumed run's files hold every epoch (Lightning's CSVLogger starts a new file).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the rows of the checkpoint that a run resumes from."""
        self.rows = state_dict["rows"]

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Add this epoch's row and write both files anew."""
        values = {key: float(value) for key, value in trainer.callback_metrics.items()}
        rows = [row for row in self.rows if row["epoch"] < trainer.current_epoch]
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        self.rows = [*rows, {"epoch": trainer.current_epoch, "lr": lr, **dict(sorted(values.items()))}]
        if trainer.is_global_zero:
            self._write()
            shown = ", ".join(f"{key} {values[key]:.4f}" for key in _SHOWN if key in values)
            _logger.info("epoch %d of %s: %s", trainer.current_epoch + 1, trainer.max_epochs, shown)

    def _write(self) -> None:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        with (self.folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        plot_history(self.rows, self.folder / "loss_curve.png")


def plot_history(rows: list[dict[str, float]], path: Path) -> None:
    """Draw losses (left) and validation scores (right) against the epoch."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, scores = figure.subplots(1, 2)
    for axes, keys in ((losses, ("train/loss", "val/loss")), (scores, ("val/iou", "val/f1"))):
        for key in keys:
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=key)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    losses.set_title("loss")
    scores.set_title("validation, mean over classes")
    scores.set_ylim(0, 1)
    figure.savefig(path, dpi=110)
