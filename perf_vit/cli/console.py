"""What the commands print: one console, one progress bar, one table of scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from perf_vit.inference import DamagedPiece, InputReport, RunReport
from perf_vit.tasks import ClassScores, DetectionScores

__all__ = [
    "console",
    "detection_table",
    "digits",
    "errors",
    "inputs_progress",
    "print_damage",
    "run_table",
    "score_table",
    "windows_progress",
]

# More rows than that scroll away what matters; the report holds all.
_MAX_ROWS = 20

console = Console()
errors = Console(stderr=True)


@contextmanager
def windows_progress(description: str, unit: str = "windows") -> Iterator[Callable[[int, int], None]]:
    """A progress bar over windows, or other units, as the callback that the inference engine takes."""
    with _bars() as progress:
        task = progress.add_task(description, total=None, unit=unit)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def inputs_progress(
    num_inputs: int, *, windows: bool
) -> Iterator[tuple[Callable[[InputReport], None], Callable[[int, int], None] | None]]:
    """A progress bar over inputs and, where wanted, one over the windows of the current one, as callbacks."""
    with _bars() as progress:
        task = progress.add_task("predicting", total=num_inputs, unit="inputs")
        current = progress.add_task("", total=None, unit="windows") if windows else None

        def on_input(report: InputReport) -> None:
            progress.advance(task)
            if report.status == "failed":
                progress.console.print(f"failed: {report.input}: {report.error}", soft_wrap=True, markup=False)

        def on_window(done: int, total: int) -> None:
            assert current is not None
            progress.update(current, completed=done, total=total)

        yield on_input, on_window if windows else None


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=errors,
    )


def run_table(report: RunReport) -> Table:
    """One row an input that isn't simply done or there, and the totals."""
    done, skipped = report.count("done"), report.count("skipped-existing")
    title = f"{done} done, {skipped} there already, {report.count('failed')} failed, {report.count('busy')} busy"
    table = Table(title=title)
    for column in ("input", "status", "seconds", "windows", "damaged", "error"):
        table.add_column(column, justify="right" if column in {"seconds", "windows", "damaged"} else "left")
    # What needs a look comes first.
    rank = {"failed": 0, "busy": 1, "done": 2, "skipped-existing": 3}
    rows = sorted(report.inputs, key=lambda item: (rank[item.status], -len(item.damaged)))
    for item in rows[:_MAX_ROWS]:
        numbers = f"{item.seconds:.1f}", f"{item.num_windows:,}", f"{len(item.damaged):,}"
        table.add_row(escape(Path(item.input).name), item.status, *numbers, escape(item.error or ""))
    if len(rows) > _MAX_ROWS:
        table.add_row(f"... and {len(rows) - _MAX_ROWS} more")
    return table


def print_damage(damaged: Sequence[DamagedPiece]) -> None:
    """A warning with the pieces of an input that can't be read; nothing where there are none."""
    if not damaged:
        return
    table = Table(title=f"Warning: {len(damaged)} damaged pieces are nodata in the map")
    for column in ("row", "column", "height", "width", "reason"):
        table.add_column(column, justify="left" if column == "reason" else "right")
    for piece in damaged[:_MAX_ROWS]:
        table.add_row(*map(str, astuple(piece.window)), escape(piece.reason))
    if len(damaged) > _MAX_ROWS:
        table.add_row("...", "", "", "", f"and {len(damaged) - _MAX_ROWS} more")
    errors.print(table)


def score_table(scores: Sequence[ClassScores], title: str) -> Table:
    """One row a class, and the means over the classes that occur."""
    table = Table(title=title)
    for column in ("class", "IoU", "F1", "precision", "recall", "pixels"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for s in scores:
        table.add_row(s.name, *map(digits, (s.iou, s.f1, s.precision, s.recall)), f"{s.num_pixels:,}")
    table.add_section()
    means = [mean_over_present(scores, key) for key in ("iou", "f1", "precision", "recall")]
    table.add_row("mean", *map(digits, means), f"{sum(s.num_pixels for s in scores):,}")
    return table


def detection_table(scores: DetectionScores, title: str) -> tuple[Table, Table]:
    """A row a class with the means below, and a row with the scores of each size of objects."""
    classes = Table(title=title)
    for column in ("class", "AP", "AP50", "F1", "precision", "recall", "from score", "objects"):
        classes.add_column(column, justify="left" if column == "class" else "right")
    for s in scores.classes:
        values = map(digits, (s.ap, s.ap50, s.f1, s.precision, s.recall, s.threshold))
        classes.add_row(escape(s.name), *values, f"{s.num_objects:,}")
    classes.add_section()
    total = sum(s.num_objects for s in scores.classes)
    empty = "", "", ""
    classes.add_row("mean", *map(digits, (scores.ap, scores.ap50)), *empty, digits(scores.threshold), f"{total:,}")
    sizes = Table(title="AP by size of objects")
    for name in scores.ap_by_size:
        sizes.add_column(name.replace("_", " "), justify="right")
    sizes.add_row(*map(digits, scores.ap_by_size.values()))
    return classes, sizes


def mean_over_present(scores: Sequence[ClassScores], key: str) -> float:
    """Mean of one score over the classes that occur in the labels or the map; NaN if none does."""
    present: list[float] = [getattr(s, key) for s in scores if not math.isnan(s.iou)]
    return sum(present) / len(present) if present else math.nan


def digits(value: float) -> str:
    """A score with three digits, - for NaN."""
    return "-" if math.isnan(value) else f"{value:.3f}"
