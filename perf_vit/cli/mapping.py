"""`perf-vit predict` and `perf-vit evaluate`: a checkpoint on a raster."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from perf_vit.cli.console import mean_over_present, windows_progress
from perf_vit.data import region_window
from perf_vit.errors import ConfigError, OutputError
from perf_vit.inference import OutputKind, predict, segment_strips
from perf_vit.io import RasterSource, open_labels, open_raster, write_map_quicklook
from perf_vit.models import Segmenter, load_segmenter
from perf_vit.tasks import ClassScores, class_scores, segmentation_metrics
from perf_vit.types import IGNORE_INDEX

__all__ = ["evaluate_raster", "open_for", "predict_raster", "write_scores"]

_PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


def predict_raster(
    checkpoint: Path,
    image: Path,
    output: Path,
    *,
    kind: OutputKind = "classes",
    quicklook: bool = True,
    **engine: Any,
) -> None:
    """Write the map of a raster, and its quicklook beside it as `output` with the suffix .png."""
    model = load_segmenter(checkpoint)
    source = open_for(model, image)
    with windows_progress(f"predicting {image.name}") as on_window:
        predict(model, source, output, kind=kind, on_window=on_window, **_engine(model, **engine))
    if quicklook:
        write_map_quicklook(source, output, output.with_suffix(".png"), model.spec.classes)


def evaluate_raster(
    checkpoint: Path,
    image: Path,
    labels: Path,
    *,
    region: Sequence[int] | None = None,
    **engine: Any,
) -> list[ClassScores]:
    """Score the blended prediction of a raster against labels, read as in training; each pixel counts once."""
    model = load_segmenter(checkpoint)
    source = open_for(model, image)
    truth = open_labels(labels, source, classes=model.spec.classes, **model.spec.label_options)
    extent = region_window(None if region is None else list(region), source, "--region")
    metrics = segmentation_metrics(len(model.spec.classes))
    with windows_progress(f"evaluating {image.name}") as on_window:
        for strip in segment_strips(model, source, extent=extent, on_window=on_window, **_engine(model, **engine)):
            expected = truth.read(strip.window)
            expected[~strip.valid] = IGNORE_INDEX
            predicted = strip.scores.argmax(0)
            metrics.update(torch.from_numpy(predicted)[None], torch.from_numpy(expected).long()[None])
    return class_scores(metrics, model.spec.classes)


def open_for(model: Segmenter, image: Path) -> RasterSource:
    """Open a raster with the bands and nodata that a model was trained with."""
    return open_raster(image, bands=model.spec.bands, nodata=model.spec.nodata)


def write_scores(scores: Sequence[ClassScores], path: Path) -> None:
    """Scores per class and their means, as JSON."""
    content = {
        "classes": [score.to_dict() for score in scores],
        "mean": {key: mean_over_present(scores, key) for key in ("iou", "f1", "precision", "recall")},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"can't write {path}: {error.strerror}") from error


def _engine(model: Segmenter, *, device: str = "auto", precision: str = "32", **options: Any) -> dict[str, Any]:
    """Put the model on its device and turn the command line's words into the engine's arguments."""
    if precision not in _PRECISIONS:
        raise ConfigError(f"--precision must be one of {', '.join(_PRECISIONS)}, got {precision}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return {"device": device, "precision": _PRECISIONS[precision], **options}
