"""What the commands print: one console, one progress bar, one table of scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from perf_vit.tasks import ClassScores

__all__ = ["console", "errors", "score_table", "windows_progress"]

console = Console()
errors = Console(stderr=True)


@contextmanager
def windows_progress(description: str, unit: str = "windows") -> Iterator[Callable[[int, int], None]]:
    """A progress bar over windows, or other units, as the callback that the inference engine takes."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def score_table(scores: Sequence[ClassScores], title: str) -> Table:
    """One row a class, and the means over the classes that occur."""
    table = Table(title=title)
    for column in ("class", "IoU", "F1", "precision", "recall", "pixels"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for s in scores:
        table.add_row(s.name, *map(_digits, (s.iou, s.f1, s.precision, s.recall)), f"{s.num_pixels:,}")
    table.add_section()
    means = [mean_over_present(scores, key) for key in ("iou", "f1", "precision", "recall")]
    table.add_row("mean", *map(_digits, means), f"{sum(s.num_pixels for s in scores):,}")
    return table


def mean_over_present(scores: Sequence[ClassScores], key: str) -> float:
    """Mean of one score over the classes that occur in the labels or the map; NaN if none does."""
    present: list[float] = [getattr(s, key) for s in scores if not math.isnan(s.iou)]
    return sum(present) / len(present) if present else math.nan


def _digits(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
