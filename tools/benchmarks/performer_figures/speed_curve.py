"""Figure 3: time and memory against the number of tokens, from a measurement made before."""

import csv
from pathlib import Path

import typer
from figure_style import BLUE, GREEN, GREY, RED, new_figure, save
from matplotlib.axes import Axes

from perf_vit.cli.benchmarks.contenders import FLOOR, OURS, POPULAR, SDPA
from perf_vit.cli.benchmarks.sweep import PASSES

COLORS = {OURS: BLUE, SDPA: RED, POPULAR: GREEN, FLOOR: GREY}
MEASURES = {"milliseconds": "milliseconds", "peak_mib": "peak MiB above inputs, outputs"}
SETTINGS = (
    "B={batch_size} H={num_heads} D={head_dim} M={num_features} {dtype}, {machine}, {num_threads} threads, "
    "torch {torch}, median of {num_runs}"
)


def draw(table: Path, path: Path) -> None:
    """Draw the CSV file of `perf-vit benchmark attention`: [time, memory] x [forward, forward + backward]."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise typer.BadParameter(
            f"expected rows of `perf-vit benchmark attention`, got none in {table}", param_hint="--speed-csv"
        )
    figure = new_figure(10, 7)
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, direction in enumerate(PASSES):
        chosen = [row for row in rows if row["pass"] == direction]
        for line, (measure, label) in enumerate(MEASURES.items()):
            _draw(axes[line, column], chosen, measure)
            axes[line, 0].set_ylabel(label)
        axes[0, column].set_title(direction)
        axes[1, column].set_xlabel("tokens, L")
    axes[0, 0].legend(frameon=False)
    figure.suptitle(SETTINGS.format(**rows[0]), fontsize=9)
    save(figure, path)


def _draw(axes: Axes, rows: list[dict[str, str]], measure: str) -> None:
    for name, color in COLORS.items():
        # The floor's products in full size are no floor for memory. Where a contender was left out, its cell is empty.
        own = [row for row in rows if row["contender"] == name and (name, measure) != (FLOOR, "peak_mib")]
        points = [(int(row["length"]), float(row[measure])) for row in own if float(row[measure] or 0) > 0]
        if points:
            axes.plot(
                *zip(*points, strict=True), "--" if name == FLOOR else "o-", color=color, label=name, markersize=4
            )
    lengths = sorted({int(row["length"]) for row in rows})
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(lengths, [f"{n / 1024:g}k" if n >= 1024 else str(n) for n in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
