"""HTML page with the measurements of a conversion, in the model's folder."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from perf_vit._version import __version__
from perf_vit.files import write_text
from perf_vit.workflows.conversion_report.measure import NUM_RUNS, MeasuredConversion
from perf_vit.workflows.conversion_report.report import notes_of, tables_of
from perf_vit.workflows.conversion_report.timing import machine_name

__all__ = ["write_conversion"]

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
