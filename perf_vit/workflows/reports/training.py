"""The report of a training run: curves, scores of the best model, worst and best validation tiles, settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from perf_vit.inference import move_to_device
from perf_vit.reporting import ImageSamples, Page, Row, Sample, Settings
from perf_vit.tasks import LOSS_MONITOR
from perf_vit.tasks.callbacks import plot_history
from perf_vit.tasks.optim import with_valid
from perf_vit.workflows.progress import windows_progress
from perf_vit.workflows.task import Evaluation, Task

__all__ = ["REPORT", "write_training_report"]

REPORT = "report.html"
"""Name of the report in a run folder."""

# Tiles that stand for all in the report; training has scored all.
_MAX_TILES = 256

_PANELS = ("image", "labels", "prediction", "errors")
_WITH_TEXT = ("image", "labels and prediction")


def write_training_report(
    path: Path,
    folder: Path,
    rows: Sequence[dict[str, float]],
    task: Task,
    network: nn.Module | None,
    tiles: Any,
    device: str,
) -> Path:
    """Write the page of a run.

    Args:
        path: Output file.
        folder: Run folder.
        rows: Rows of `metrics.csv`.
        task: Task of the run.
        network: Best network; None for none, which leaves out scores and tiles.
        tiles: Validation data.
        device: Device that scores the tiles, "auto" for a GPU if there is one.

    Raises:
        OutputError: The page can't be written.
    """
    # Where the score of the task is undefined.
    monitor = LOSS_MONITOR if any(LOSS_MONITOR in row for row in rows) else task.monitor
    best = max((row for row in rows if monitor in row), key=lambda row: row[monitor], default={})
    page = Page(title=f"{task.label.removeprefix('a ').removeprefix('an ')}: {folder.name}")
    page.numbers = {"epochs": f"{max((int(row['epoch']) for row in rows), default=0)}"}
    if best:
        page.numbers |= {"best epoch": f"{int(best['epoch'])}", monitor: f"{best[monitor]:.3f}"}

    def curves(first: Path) -> list[Path]:
        plot_history(list(rows), first, task.curves, format="svg")
        return [first]

    page.add("Curves", Row.of_plots(curves, {"": "losses and validation scores by epoch"}))
    if network is not None and task.tile_scores is not None and task.draw is not None:
        evaluation, text = _validated(task, network, tiles, device)
        evaluation.add_to(page)
        page.subtitle = text
    else:
        values = {name: f"{value:.4g}" for name, value in best.items() if name.startswith("val/")}
        page.add("Scores of the best epoch", Settings.of_values("Validation", values) if values else None)
    page.add("Settings", Settings(title="config.yaml", text=(folder / "config.yaml").read_text(encoding="utf-8")))
    return page.write(path)


def _validated(task: Task, network: Any, tiles: Any, device: str) -> tuple[Evaluation, str]:
    """Score the best network on validation tiles, and keep the worst and best as pictures."""
    assert task.tile_scores is not None
    device = move_to_device(network, device)
    scores = task.tile_scores(network.eval())
    samples = ImageSamples(scores.legend)
    chosen = np.unique(np.linspace(0, len(tiles) - 1, _MAX_TILES).round().astype(int))
    with windows_progress("validating for the report", "tiles") as on_tile, torch.inference_mode():
        for done, index in enumerate(chosen.tolist(), 1):
            image, labels, valid = with_valid(tiles[index])
            found = network(*(each[None].to(device) for each in (image, valid) if each is not None))[0]
            score, text = scores.update(found, labels)
            samples.offer(score, _sample(task, network, f"{text}: tile {index}", image, labels, found))
            on_tile(done, len(chosen))
    evaluation = scores.finish()
    of_all = "" if len(chosen) == len(tiles) else f" of {len(tiles):,}"
    evaluation.title = f"{len(chosen):,}{of_all} validation tiles"
    evaluation.samples = samples
    return evaluation, f"Best model on {evaluation.title}, which also chose it."


def _sample(task: Task, network: Any, title: str, image: Any, labels: Any, found: Any) -> Sample:
    def draw() -> dict[str, Any]:
        assert task.draw is not None
        panels = task.draw(image, labels, network, found)
        return dict(zip(_PANELS if len(panels) > 2 else _WITH_TEXT, panels, strict=False))

    return Sample(title=title, draw=draw, lossless=(*_PANELS[1:], *_WITH_TEXT[1:]))
