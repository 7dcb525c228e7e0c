"""What the commands print: the one place where text leaves for a terminal, progress bars and tables of scores.

Names of classes, bands and files are shown as they are: no text is parsed as rich's markup, and what can't be seen is
escaped.
"""

from __future__ import annotations

import io
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleDimensions
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from perf_vit.text import printable, to_json
from perf_vit.threads import wait_passively

if TYPE_CHECKING:
    # They bring lightning, which an error in the words of a command need not wait for.
    from perf_vit.inference import InputReport, RunReport
    from perf_vit.inference.jobs import DamagedPiece
    from perf_vit.metrics import ClassScores, DetectionScores

__all__ = [
    "PlainConsole",
    "as_text",
    "console",
    "detection_table",
    "digits",
    "errors",
    "inputs_progress",
    "mean_over_present",
    "new_table",
    "note",
    "note_to_stdout",
    "print_damage",
    "progress_shown",
    "run_table",
    "say",
    "say_json",
    "say_line",
    "score_table",
    "show",
    "show_any_text",
    "show_log",
    "two_columns",
    "windows_progress",
    "working",
]

# More rows than that scroll away what matters; the report holds all.
_MAX_ROWS = 20
# A file or a pipe has no edge that a table must be cut at.
_FILE_WIDTH = 1000


class PlainConsole(Console):
    """A console to which no text is markup: [bold] is a name like any other."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    @property  # type: ignore[misc]
    def size(self) -> ConsoleDimensions:
        """Width and height: those of the terminal, as COLUMNS says, or wide enough for any table."""
        size = super().size
        if self.is_terminal or "COLUMNS" in os.environ:
            return size
        return ConsoleDimensions(_FILE_WIDTH, size.height)

    def render_str(self, text: str, **options: Any) -> Text:
        """Text to print, which everything on a console goes through, cells and titles of tables too."""
        return super().render_str(printable(text), **{**options, "markup": False, "emoji": False})


console = PlainConsole()
errors = PlainConsole(stderr=True)
_notes = errors


def say(*lines: str) -> None:
    """Print lines for people, each unwrapped."""
    for line in lines:
        console.print(line, soft_wrap=True)


def say_line(kind: str, message: str) -> None:
    """Print `kind: message` to stderr, as one line whatever the message."""
    errors.print(f"{kind}: {' '.join(message.split())}", soft_wrap=True)


def say_json(value: Any) -> None:
    """Print plain values for programs."""
    sys.stdout.write(to_json(value, indent=2, ascii_only=True) + "\n")


def note(*found: Table | str) -> None:
    """Show tables and lines in the middle of a work: on stderr or, of a command, on stdout."""
    if _shown.get():
        _notes.print(*found, sep="\n", soft_wrap=all(isinstance(each, str) for each in found))


def note_to_stdout() -> None:
    """Have notes on stdout, where the command line has all that it found."""
    global _notes
    _notes = console


def show_log() -> None:
    """Print what runs log, a line an epoch, where there is no terminal with a progress bar."""
    if not console.is_terminal:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("perf_vit").setLevel(logging.INFO)


def as_text(*tables: Table) -> str:
    """Tables as text."""
    text = io.StringIO()
    PlainConsole(file=text, width=_FILE_WIDTH).print(*tables, sep="\n")
    return text.getvalue().rstrip("\n")


def show(*tables: Table) -> None:
    """Print tables."""
    console.print(*tables, sep="\n")


def show_any_text() -> None:
    """Escape what the encodings of stdout and stderr don't have, in the place of a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A stream that was closed or moved stays as it is.
            with suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")


def new_table(title: str | None, columns: Sequence[str], left: Sequence[str] | None = None) -> Table:
    """A table of numbers, with the first column, or those named, on the left; names are broken, never cut."""
    table = Table(title=title)
    for place, name in enumerate(columns):
        is_left = place == 0 if left is None else name in left
        table.add_column(name, justify="left" if is_left else "right", overflow="fold")
    return table


def two_columns(rows: Sequence[tuple[str, str]]) -> Table:
    """Make a table of names and values, without a header."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


_shown: ContextVar[bool] = ContextVar("shown", default=True)


@contextmanager
def progress_shown(shown: bool) -> Iterator[None]:
    """Do the work of a function as its command does: threads wait passively; progress bars and notes show, or none."""
    wait_passively()
    token = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(token)


@contextmanager
def working(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner with a text, and the callback that changes it."""
    if not _shown.get():
        yield lambda changed: None
        return
    with errors.status(Text(printable(text))) as status:
        # A string would be parsed as markup.
        yield lambda changed: status.update(Text(printable(changed)))


@contextmanager
def windows_progress(description: str, unit: str = "windows") -> Iterator[Callable[[int, int], None]]:
    """A progress bar over windows, or other units, as the callback that the inference engine takes."""
    if not _shown.get():
        yield lambda done, total: None
        return
    progress, is_started = _bars(), False
    task = progress.add_task(printable(description), total=None, unit=unit)

    def on_progress(done: int, total: int) -> None:
        nonlocal is_started
        if not is_started:
            # Inputs that are refused before any work need no bar.
            progress.start()
            is_started = True
        progress.update(task, completed=done, total=total)

    try:
        yield on_progress
    finally:
        if is_started:
            progress.stop()


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
            if report.status == "failed" and _shown.get():
                say_line("failed", f"{report.input}: {report.error}")

        def on_window(done: int, total: int) -> None:
            assert current is not None
            progress.update(current, completed=done, total=total)

        yield on_input, on_window if windows else None


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=errors,
        disable=not _shown.get(),
    )


def run_table(report: RunReport) -> Table:
    """One row an input that isn't simply done or there, and the totals."""
    done, skipped = report.count("done"), report.count("skipped-existing")
    title = f"{done} done, {skipped} there already, {report.count('failed')} failed, {report.count('busy')} busy"
    columns = ("input", "status", "seconds", "windows", "damaged", "error")
    table = new_table(title, columns, left=("input", "status", "error"))
    # What needs a look comes first.
    rank = {"failed": 0, "busy": 1, "done": 2, "skipped-existing": 3}
    rows = sorted(report.inputs, key=lambda item: (rank[item.status], -len(item.damaged)))
    for item in rows[:_MAX_ROWS]:
        numbers = f"{item.seconds:.1f}", f"{item.num_windows:,}", f"{len(item.damaged):,}"
        table.add_row(Path(item.input).name, item.status, *numbers, item.error or "")
    if len(rows) > _MAX_ROWS:
        table.add_row(f"... and {len(rows) - _MAX_ROWS} more")
    return table


def print_damage(damaged: Sequence[DamagedPiece]) -> None:
    """A warning with the pieces of an input that can't be read; nothing where there are none."""
    if not damaged:
        return
    title = f"Warning: {len(damaged)} damaged pieces of the input were left out"
    table = new_table(title, ("row", "column", "height", "width", "reason"), left=("reason",))
    for piece in damaged[:_MAX_ROWS]:
        table.add_row(*map(str, astuple(piece.window)), piece.reason)
    if len(damaged) > _MAX_ROWS:
        table.add_row("...", "", "", "", f"and {len(damaged) - _MAX_ROWS} more")
    errors.print(table)


def score_table(scores: Sequence[ClassScores], title: str) -> Table:
    """One row a class, and the means over the classes that occur."""
    table = new_table(title, ("class", "IoU", "F1", "precision", "recall", "pixels"))
    for s in scores:
        table.add_row(s.name, *map(digits, (s.iou, s.f1, s.precision, s.recall)), f"{s.num_pixels:,}")
    table.add_section()
    means = [mean_over_present(scores, key) for key in ("iou", "f1", "precision", "recall")]
    table.add_row("mean", *map(digits, means), f"{sum(s.num_pixels for s in scores):,}")
    return table


def detection_table(scores: DetectionScores, title: str) -> tuple[Table, Table]:
    """A row a class with the means below, and a row with the scores of each size of objects."""
    columns = ("class", "AP", "AP50", "F1", "precision", "recall", "from score", "objects")
    classes = new_table(title, columns)
    for s in scores.classes:
        values = map(digits, (s.ap, s.ap50, s.f1, s.precision, s.recall, s.threshold))
        classes.add_row(s.name, *values, f"{s.num_objects:,}")
    classes.add_section()
    total = sum(s.num_objects for s in scores.classes)
    empty = "", "", ""
    classes.add_row("mean", *map(digits, (scores.ap, scores.ap50)), *empty, digits(scores.threshold), f"{total:,}")
    names = [name.replace("_", " ") for name in scores.ap_by_size]
    sizes = new_table("AP by size of objects", names, left=())
    sizes.add_row(*map(digits, scores.ap_by_size.values()))
    return classes, sizes


def mean_over_present(scores: Sequence[ClassScores], key: str) -> float:
    """Mean of one score over the classes that occur in the labels or the map; NaN if none does."""
    present: list[float] = [getattr(s, key) for s in scores if not math.isnan(s.iou)]
    return sum(present) / len(present) if present else math.nan


def digits(value: float) -> str:
    """A score with three digits, - for NaN."""
    return "-" if math.isnan(value) else f"{value:.3f}"
