"""The whole road on a scene that it makes itself."""

from __future__ import annotations

import base64
import html
import io
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from perf_vit._version import __version__
from perf_vit.data import make_ship_scene
from perf_vit.files import write_text
from perf_vit.labels import open_labels
from perf_vit.metrics import ClassScores
from perf_vit.plotting import colorize, default_colormap, natural_bands, rgb_from
from perf_vit.sources import RasterSource, open_raster
from perf_vit.types import IGNORE_INDEX
from perf_vit.workflows.evaluate import evaluate
from perf_vit.workflows.predict import predict
from perf_vit.workflows.progress import note
from perf_vit.workflows.run_folder import RUN_FILES, check_run_files
from perf_vit.workflows.task import Evaluation
from perf_vit.workflows.train import train
from perf_vit.writers import check_outputs, existing_error, existing_outputs

__all__ = ["Demo", "run_demo", "write_report"]


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What a demo made.

    Attributes:
        map: Path of the map.
        report: Path of the report, an HTML page.
        scores: Scores of the lower half.
        seconds: Time of all of it.
    """

    map: Path
    report: Path
    scores: Evaluation
    seconds: float

    @property
    def iou(self) -> float:
        """IoU of ships."""
        return next(float(row["iou"]) for row in self.scores.table if row["name"] == "ship")


def run_demo(out: Path, seed: int = 0, *, overwrite: bool = False) -> Demo:
    """Make a scene, train on its upper half, score its lower half, map all of it, write `report.html`.

    Args:
        out: folder for all of that.
        seed: decides the scene and the training.
        overwrite: replace an earlier demo in the folder.

    Raises:
        OutputError: a file exists without `overwrite`, or `run` is a folder of something else; nothing is written then.
    """
    run = out / "run"
    check_outputs(_files(out), [], overwrite=overwrite)
    if not overwrite and (found := existing_outputs(run / name for name in RUN_FILES)):
        raise existing_error(found[0])
    check_run_files(run)
    start = time.perf_counter()
    scene = make_ship_scene(out / "scene", seed=seed)
    note(f"scene: {scene.image} ({scene.num_targets} ships), labels: {scene.labels}")

    half = scene.size_px // 2
    upper, lower = [0, 0, half, scene.size_px], [half, 0, scene.size_px - half, scene.size_px]
    for name in ("last.ckpt", "best.ckpt"):
        (run / "checkpoints" / name).unlink(missing_ok=True)
    files = {"image": scene.image, "labels": scene.labels}
    overrides = {
        "seed": seed,
        **{f"data.{part}.{key}": path for part in ("train", "val") for key, path in files.items()},
        "data.train.region": upper,
        "data.val.region": lower,
    }
    checkpoint = train("segmentation/demo", overrides, out=run).best

    output = out / "map.tif"
    # What a killed demo left is of another scene file.
    predict(checkpoint, scene.image, output, quicklook=True, overwrite=overwrite, resume=False)
    scored = evaluate(checkpoint, scene.image, scene.labels, region=tuple(lower))
    scored.title = "lower half of the scene: not trained on, but it chose the best epoch"
    scored.to_json(out / "scores.json")
    report = write_report(
        out / "report.html",
        image=scene.image,
        labels=scene.labels,
        prediction=output,
        loss_curve=run / "loss_curve.png",
        scores=[ClassScores(**row) for row in scored.table],
        seconds=time.perf_counter() - start,
    )
    return Demo(map=output, report=report, scores=scored, seconds=time.perf_counter() - start)


def _files(out: Path) -> list[Path]:
    """All that a demo writes but its run."""
    scene = [out / "scene" / name for name in ("scene.tif", "ships.geojson")]
    return [*scene, *(out / name for name in ("map.tif", "map.png", "scores.json", "report.html"))]


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
