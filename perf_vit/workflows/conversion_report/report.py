"""Report of a conversion: where the model lies, tables of measurements, notes, and the HTML page with them."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table
from torch import nn

from perf_vit._version import __version__
from perf_vit.conversion import load_converted
from perf_vit.files import write_text
from perf_vit.layers import MixerOptions
from perf_vit.layers.window_mixers import WindowedOptions
from perf_vit.workflows.conversion_report.measure import NUM_RUNS, SOFTMAX_TOKENS, MeasuredConversion
from perf_vit.workflows.conversion_report.timing import machine_name
from perf_vit.workflows.progress import as_text, new_table

__all__ = ["ConversionReport", "notes_of", "tables_of", "write_conversion"]

# Columns of the table of layers, as mixers name their sizes.
_SIZES = ("window", "sinks", "clusters", "features")


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """A converted model and what was measured of it.

    Attributes:
        folder: Folder of the model.
        path: Path of the report, an HTML page.
        measured: Fidelity of the layers and of the final tokens, and times.
    """

    folder: Path
    path: Path
    measured: MeasuredConversion

    @property
    def table(self) -> list[dict[str, Any]]:
        """Relative error of the outputs of each converted layer, at the largest size of `measured.fidelity`."""
        return [{"layer": index, "error": error} for index, error in self.measured.fidelity[-1].errors.items()]

    @property
    def notes(self) -> list[str]:
        """What was not measured."""
        return notes_of(self.measured)

    def tables(self) -> list[Table]:
        """All figures for people."""
        return [_filled(*each) for each in tables_of(self.measured)]

    def load(self) -> nn.Module:
        """Load the converted model, in evaluation mode, on the CPU."""
        return load_converted(self.folder)

    def __str__(self) -> str:
        return "\n".join([as_text(*self.tables()), *self.notes])

    __repr__ = __str__


def _filled(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = new_table(title, head)
    for row in rows:
        table.add_row(*row)
    return table


def tables_of(measured: MeasuredConversion) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return (title, header, rows) of each table."""
    largest = measured.fidelity[-1]
    cosines = [
        [f"{each.size_px:,}", name, str(len(x)), f"{sum(x) / len(x):.4f}", f"{min(x):.4f}"]
        for each in measured.fidelity
        for name, x in (("patch tokens", each.patch_cosines), ("class token", each.class_cosines))
        if x
    ]
    layers = [
        [str(index), f"{error:.4f}", *_sizes(measured.options[index], largest.grid)]
        for index, error in largest.errors.items()
    ]
    speeds = [
        [
            f"{speed.size_px:,}",
            f"{speed.num_tokens:,}",
            "not run" if speed.softmax is None else f"{speed.softmax:.3f}",
            f"{speed.plain:.3f}",
            f"{speed.converted:.3f}",
            "-" if speed.softmax is None else f"{speed.converted / speed.softmax:.2f}",
            f"{speed.converted / speed.plain:.2f}",
        ]
        for speed in measured.speeds
    ]
    head = ["px", "tokens", "softmax", "plain FAVOR+", "converted", "/ softmax", "/ plain"]
    return [
        (
            "Cosine of final tokens with those of the softmax model",
            ["px", "", "images", "mean", "worst image"],
            cosines,
        ),
        ("Seconds of one image, and the converted model's over the others'", head, speeds),
        (
            f"Relative error of attention outputs at {largest.size_px:,} px, on the softmax model's inputs",
            ["layer", "error", *_SIZES],
            layers,
        ),
    ]


def _sizes(options: MixerOptions, grid: tuple[int, int]) -> list[str]:
    summary = options.summary(grid)
    return [str(summary.get(name, "-")) for name in _SIZES]


def notes_of(measured: MeasuredConversion) -> list[str]:
    """Return what holds by itself, and what was not measured."""
    exact, (given, larger) = measured.max_exact_px, measured.speeds
    notes = []
    if exact:
        notes.append(f"Converted layers are exact (softmax) up to {exact} x {exact} px, and linear in larger images.")
    if measured.native_size is not None:
        windows = [index for index, each in measured.options.items() if isinstance(each, WindowedOptions)]
        see_all = [str(index) for index in range(max(measured.options) + 1) if index not in windows]
        notes.append(
            f"In larger images, layers {', '.join(see_all) or 'none'} see the whole image and all others windows of "
            f"{measured.native_size} x {measured.native_size} patches, after which positions repeat: the model is not "
            "meant to equal softmax attention over the whole image."
        )
    if given.size_px <= exact:
        notes.append(f"At {given.size_px} px the converted model equals the softmax model.")
    if given.size_px <= exact < larger.size_px and larger.softmax is not None and len(measured.fidelity) == 1:
        notes.append(f"Fidelity at {larger.size_px} px was not measured, because an image is smaller.")
    left_out = [speed for speed in measured.speeds if speed.softmax is None]
    return notes + [
        f"Softmax was not run at {speed.size_px} px: {speed.num_tokens:,} tokens are more than {SOFTMAX_TOKENS:,}; "
        "`time_softmax` runs it."
        for speed in left_out
    ]


REPORT = "fidelity.html"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } svg { max-width: 100%; height: auto } pre { background: #f4f4f4;
padding: .8rem; overflow-x: auto }
"""


def write_conversion(measured: MeasuredConversion, folder: Path, *, home: Path, title: str, images: str) -> Path:
    """Write `fidelity.html`, which needs no other file, into a model's folder.

    Args:
        measured: Measurements to show.
        folder: Folder of the saved model, to which the report is written.
        home: Folder that the model will be loaded from.
        title: Name of the converted model.
        images: Images of the measurements, in words.

    Raises:
        OutputError: The folder can't be written to.
    """
    tables = [(heading, _html_table(head, rows)) for heading, head, rows in tables_of(measured)]
    sections = "".join(f"<h2>{html.escape(heading)}</h2>\n{table}\n" for heading, table in tables)
    notes = "".join(f"<p>{html.escape(note)}</p>\n" for note in notes_of(measured))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}, linear</title><style>{_STYLE}</style></head>
<body>
<h1>{html.escape(title)}, linear</h1>
<p>Measured on {html.escape(images)}. {html.escape(_machine())}</p>
{_chart(measured)}
{sections}{notes}
<h2>Load it</h2>
<pre>model = perf_vit.load("{html.escape(str(home))}")</pre>
</body></html>
"""
    path = folder / REPORT
    write_text(path, page)
    return path


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    header = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table><tr>{header}</tr>\n{body}</table>"


def _chart(measured: MeasuredConversion) -> str:
    """Bars of the layers' errors, as SVG."""
    errors = measured.fidelity[-1].errors
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.bar(range(len(errors)), list(errors.values()), color="#0072b2")
    axes.set_xticks(range(len(errors)), [str(index) for index in errors])
    axes.set(xlabel="layer", ylabel="relative error", ylim=(0, None))
    axes.grid(axis="y", alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _machine() -> str:
    return (
        f"Times are medians of {NUM_RUNS} forward passes in fp32 on {machine_name('cpu')}, threads: "
        f"{torch.get_num_threads()}, torch {torch.__version__}, perf_vit {__version__}."
    )
