"""The benchmark's results as a table, a CSV file and a picture."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from contenders import CHUNKED_FLOOR, FLOOR, OURS, POPULAR, SDPA
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table
from settings import PASSES, AttentionBenchmark
from sweep import Measurement

from perf_vit.errors import OutputError
from perf_vit.files import staged
from perf_vit.plotting import save_figure
from perf_vit.workflows.conversion_report import machine_name

__all__ = [
    "BASELINES",
    "COLUMNS",
    "attention_files",
    "attention_summary",
    "attention_table",
    "plot_attention",
    "write_attention",
]

BASELINES = {"x_floor": FLOOR, "x_sdpa": SDPA, "x_performer_pytorch": POPULAR}
_MEASURES = ("contender", "pass", "length", "milliseconds", "peak_mib", *BASELINES)
_SETTINGS = ("batch_size", "num_heads", "head_dim", "num_features", "dtype", "device", "num_threads", "num_runs")
COLUMNS = (*_MEASURES, *_SETTINGS, "machine", "torch")

# From here on, fixed costs of a call no longer show.
_REFERENCE_LENGTH = 4096
_FLOORS = (CHUNKED_FLOOR, FLOOR)
_COLORS = {OURS: "#0072b2", SDPA: "#d55e00", POPULAR: "#009e73", CHUNKED_FLOOR: "#bbbbbb", FLOOR: "#777777"}


def attention_table(rows: Sequence[Measurement], direction: str) -> Table:
    """One row a contender and length, with the time divided by each baseline's; narrow enough for 80 columns."""
    table = Table(title=f"Attention, {direction}")
    headers = ("L", "attention", "ms", "peak MiB", "/ floor", "/ SDPA", "/ popular")
    for header in headers:
        table.add_column(header, justify="left" if header == "attention" else "right", no_wrap=True)
    for row in (row for row in rows if row.direction == direction):
        times = [_digits(x, 2) for x in _ratios(row, rows).values()]
        memory = _digits(row.peak_bytes / 2**20, 1)
        # The floor is the last of each length's contenders.
        is_last = row.contender == FLOOR
        table.add_row(
            f"{row.length:,}", row.contender, _digits(row.seconds * 1e3, 2), memory, *times, end_section=is_last
        )
    return table


def attention_summary(rows: Sequence[Measurement]) -> list[str]:
    """Where ours gets ahead of softmax, and how its time per token grows, one line each and direction."""
    lines = []
    for direction in PASSES:
        chosen = [row for row in rows if row.direction == direction]
        crossover = _crossover(chosen)
        if crossover is not None:
            lines.append(f"{direction}: as fast as {SDPA} from L = {crossover:,.0f} on")
        ours = [row for row in chosen if row.contender == OURS and not math.isnan(row.seconds)]
        lines += [
            f"{direction}: time per token at L = {ours[-1].length:,} is {_per_token(ours[-1]) / _per_token(row):.2f} "
            f"of that at {row.length:,}"
            for row in ours
            if row.length == _REFERENCE_LENGTH and row is not ours[-1]
        ]
    return lines


def attention_files(folder: Path) -> tuple[Path, Path]:
    """Paths of the table and the picture in a folder."""
    return folder / "attention.csv", folder / "attention.png"


def write_attention(rows: Sequence[Measurement], settings: AttentionBenchmark, folder: Path) -> tuple[Path, Path]:
    """Write `attention.csv`, a row a measurement with all settings, and `attention.png` into a folder.

    Returns:
        The paths of both.

    Raises:
        OutputError: the folder can't be written to.
    """
    table, picture = attention_files(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_csv(rows, settings, table)
        plot_attention(rows, settings.describe(), picture)
    except OSError as error:
        raise OutputError(f"can't write into {folder}: {error.strerror}") from error
    return table, picture


def plot_attention(rows: Sequence[Measurement], title: str, path: Path) -> None:
    """Draw time and memory against length for both directions, on logarithmic axes."""
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, direction in enumerate(PASSES):
        chosen = [row for row in rows if row.direction == direction]
        _draw(axes[0, column], chosen, {row: row.seconds * 1e3 for row in chosen}, "milliseconds")
        # The floor's four products in full size are no floor for memory, so it is not drawn there.
        others = [row for row in chosen if row.contender not in _FLOORS]
        _draw(
            axes[1, column], others, {row: row.peak_bytes / 2**20 for row in others}, "peak MiB above inputs, outputs"
        )
        axes[0, column].set_title(direction)
        axes[1, column].set_xlabel("tokens, L")
    axes[0, 0].legend(frameon=False)
    figure.suptitle(title, fontsize=9)
    save_figure(path, figure)


def _draw(axes: Axes, rows: Sequence[Measurement], values: dict[Measurement, float], label: str) -> None:
    for name in dict.fromkeys(row.contender for row in rows):
        points = [(row.length, values[row]) for row in rows if row.contender == name and values[row] > 0]
        style = "--" if name in _FLOORS else "o-"
        axes.plot(*zip(*points, strict=True), style, color=_COLORS[name], label=name, markersize=4)
    lengths = sorted({row.length for row in rows})
    axes.set(xscale="log", yscale="log")
    ticks = _apart(lengths)
    axes.set_xticks(ticks, [f"{n / 1024:g}k" if n >= 1024 else str(n) for n in ticks], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
        axes.set_ylabel(label)


def _apart(lengths: Sequence[int]) -> list[int]:
    """Those that have room for a label on a logarithmic axis."""
    ticks = list(lengths[:1])
    for length in lengths:
        if length >= 1.9 * ticks[-1]:
            ticks.append(length)
    return ticks


def _write_csv(rows: Sequence[Measurement], settings: AttentionBenchmark, path: Path) -> None:
    constants = [getattr(settings, name) for name in _SETTINGS]
    constants += [machine_name(settings.device), torch.__version__]
    with staged(path) as folder, (folder / path.name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            numbers = (row.seconds * 1e3, row.peak_bytes / 2**20, *_ratios(row, rows).values())
            cells = ["" if math.isnan(number) else f"{number:.4f}" for number in numbers]
            writer.writerow([row.contender, row.direction, row.length, *cells, *constants])


def _ratios(row: Measurement, rows: Sequence[Measurement]) -> dict[str, float]:
    """Time of a row over each baseline's at the same length and direction; NaN where either was left out."""
    peers = {other.contender: other.seconds for other in rows if _place(other) == _place(row)}
    return {column: row.seconds / peers.get(name, math.nan) for column, name in BASELINES.items()}


def _per_token(row: Measurement) -> float:
    return row.seconds / row.length


def _crossover(rows: Sequence[Measurement]) -> float | None:
    """The length where our time equals softmax's, between the measured ones on logarithmic axes; None if nowhere."""
    seconds = {(row.contender, row.length): row.seconds for row in rows}
    lengths = sorted({row.length for row in rows})
    ahead = [math.log(seconds.get((SDPA, n), math.nan) / seconds[OURS, n]) for n in lengths]
    for (n, before), (m, after) in itertools.pairwise(zip(lengths, ahead, strict=True)):
        if before < 0 <= after:
            return float(n * (m / n) ** (before / (before - after)))
    return None


def _place(row: Measurement) -> tuple[str, int]:
    return row.direction, row.length


def _digits(value: float, decimals: int) -> str:
    return "-" if math.isnan(value) else f"{value:,.{decimals}f}"
