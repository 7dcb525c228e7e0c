"""What the figures share: their look, and rows of numbers as a CSV file or a table for the page."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from perf_vit.cli.console import console

BLUE, RED, GREEN, PURPLE, YELLOW, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#777777"


@dataclass(frozen=True)
class Row:
    """One number behind a figure, with its standard deviation or error where it has one."""

    figure: str
    setting: str
    quantity: str
    value: float
    spread: float = math.nan

    @property
    def key(self) -> tuple[str, str, str]:
        return self.figure, self.setting, self.quantity


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    # Without matplotlib's version in the file, the same numbers give the same bytes for longer.
    figure.savefig(path, dpi=110, metadata={"Software": None})


def write_rows(rows: Iterable[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Row))
        for row in rows:
            *words, value, spread = astuple(row)
            writer.writerow([*words, f"{value:.5g}", "" if math.isnan(spread) else f"{spread:.3g}"])


def read_rows(path: Path) -> list[Row]:
    """Rows of an earlier run, so that one figure can be drawn again without the others; none without a file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        cells = [(r["figure"], r["setting"], r["quantity"], r["value"], r["spread"]) for r in csv.DictReader(file)]
    return [Row(f, s, q, float(value), float(spread or "nan")) for f, s, q, value, spread in cells]


def print_markdown(title: str, header: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    table = [header, ["---"] * len(header), *lines]
    text = "\n".join("| " + " | ".join(line) + " |" for line in table)
    console.print(f"\n{title}\n\n{text}\n", highlight=False, markup=False, soft_wrap=True)


def digits(value: float) -> str:
    """Three significant digits, in the page's way: .123, 1.23, 12.3, 4,560."""
    if math.isnan(value):
        return "-"
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 4)}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:,.{decimals}f}"
