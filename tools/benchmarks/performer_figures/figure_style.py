"""What the figures share: their look, and rows of numbers as a CSV file or a table for the page."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

from perf_vit.workflows.progress import console

BLUE, RED, GREEN, PURPLE, YELLOW, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#777777"


@dataclass(frozen=True)
class Row:
    """One number behind a figure; where there are many draws, their standard deviation (or error) and 10 and 90 %."""

    figure: str
    setting: str
    quantity: str
    value: float
    spread: float = math.nan
    low: float = math.nan
    high: float = math.nan


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of 256 colours, a third of the size of one in true colour."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def label_logarithms(axis: Axis) -> None:
    """Numbers at 1, 2 and 5 times the powers of ten, or at these alone where there are many."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}".replace("0.", ".", 1)))
    axis.set_minor_locator(NullLocator())


def write_rows(rows: Iterable[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Row))
        for row in rows:
            writer.writerow(_cell(value) for value in astuple(row))


def read_rows(path: Path) -> list[Row]:
    """Rows of an earlier run, so that one figure can be drawn again without the others; none without a file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        next(file)
        return [Row(*cells[:3], *(float(cell or "nan") for cell in cells[3:])) for cells in csv.reader(file)]


def print_markdown(title: str, header: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    table = [header, ["---"] * len(header), *lines]
    text = "\n".join("| " + " | ".join(line) + " |" for line in table)
    console.print(f"\n{title}\n\n{text}\n", highlight=False, markup=False, soft_wrap=True)


def digits(value: float) -> str:
    """A number as the page writes it: .0123, .123, 1.23, 12.3, 4,560."""
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    exponent = math.floor(math.log10(abs(value))) if value else 0
    decimals = min(max(0, 2 - exponent), 4)
    text = f"{value:,.{decimals}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return "" if math.isnan(value) else f"{value:.4g}"
