"""The demo's one-page report."""

from __future__ import annotations

import base64
import html
import io
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from perf_vit._version import __version__
from perf_vit.io import (
    RasterSource,
    colorize,
    default_colormap,
    natural_bands,
    open_labels,
    open_raster,
    rgb_from,
    write_text,
)
from perf_vit.tasks import ClassScores
from perf_vit.types import IGNORE_INDEX

__all__ = ["write_report"]

_DETAIL_PX = 128
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222 }
.row { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1rem }
figure { margin: 0 } img { width: 100%; image-rendering: pixelated; border: 1px solid #ccc }
table { border-collapse: collapse } td, th { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
"""


def write_report(
    path: Path,
    *,
    image: Path,
    labels: Path,
    prediction: Path,
    loss_curve: Path,
    scores: Sequence[ClassScores],
    seconds: float,
) -> Path:
    """Write a self-contained HTML page: scene, labels and prediction side by side, loss curve, metrics."""
    source = open_raster(image)
    pictures = _pictures(source, labels, prediction, [score.name for score in scores])
    row, col = int(0.72 * source.height), int(0.4 * source.width)
    detail = {name: picture[row : row + _DETAIL_PX, col : col + _DETAIL_PX] for name, picture in pictures.items()}
    curve = base64.b64encode(loss_curve.read_bytes()).decode()
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>perf_vit demo</title><style>{_STYLE}</style></head><body>
<h1>perf_vit demo</h1>
<p>{html.escape(_summary(source.height, source.width, source.num_bands, str(source.crs), seconds))}</p>
{_row(pictures)}
<h2>A part of the lower half, every pixel enlarged</h2>
{_row(detail)}
<h2>Metrics on the lower half: never trained on, though it chose the best epoch</h2>
{_table(scores)}
<h2>Training</h2>
<img style="max-width: 60rem; border: 0; image-rendering: auto" src="data:image/png;base64,{curve}" alt="loss curve">
</body></html>
"""
    write_text(path, page)
    return path


def _pictures(
    source: RasterSource, labels: Path, prediction: Path, classes: Sequence[str]
) -> dict[str, np.ndarray[Any, Any]]:
    colors = default_colormap(len(classes), background=0)
    scene = source.read(source.extent)
    truth = open_labels(labels, source, classes=classes).read(source.extent)
    mapped = open_raster(prediction).read(source.extent).pixels[0]
    return {
        "scene": rgb_from(scene, natural_bands(source)),
        "labels": colorize(np.where(scene.valid, truth, np.uint8(IGNORE_INDEX)), colors),
        "prediction": colorize(mapped, colors),
    }


def _row(pictures: Mapping[str, np.ndarray[Any, Any]]) -> str:
    figures = "\n".join(
        f'<figure><img src="{_data_uri(pixels)}" alt="{name}"><figcaption>{name}</figcaption></figure>'
        for name, pixels in pictures.items()
    )
    return f'<div class="row">\n{figures}\n</div>'


def _summary(height: int, width: int, num_bands: int, crs: str, seconds: float) -> str:
    machine = f"{platform.machine()}, threads: {torch.get_num_threads()}, torch {torch.__version__}"
    return (
        f"A generated scene of {height} x {width} pixels, {num_bands} bands, {crs}. Trained on the upper half, mapped "
        f"as a whole, in {seconds:.0f} s ({machine}, perf_vit {__version__})."
    )


def _data_uri(pixels: np.ndarray[Any, Any]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _table(scores: Sequence[ClassScores]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(s.name)}</td><td>{s.iou:.3f}</td><td>{s.f1:.3f}</td><td>{s.precision:.3f}</td>"
        f"<td>{s.recall:.3f}</td><td>{s.num_pixels:,}</td></tr>"
        for s in scores
    )
    head = "".join(f"<th>{name}</th>" for name in ("class", "IoU", "F1", "precision", "recall", "pixels"))
    return f"<table><tr>{head}</tr>{rows}</table>"
