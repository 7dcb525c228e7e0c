"""`perf-vit predict` and `perf-vit evaluate`: a checkpoint on a raster."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from perf_vit.cli.console import mean_over_present, print_damage, windows_progress
from perf_vit.cli.segmentation_maps import SegmentationMaps, on_device, open_for, resolved_precision
from perf_vit.data import region_window
from perf_vit.errors import OutputError
from perf_vit.inference import MapInput, OutputKind, class_probabilities, segment_strips
from perf_vit.io import RasterSource, SlideSource, open_labels, open_raster, warn_of_polygons_beside
from perf_vit.models import Segmenter, load_segmenter
from perf_vit.tasks import (
    ClassScores,
    SegmentationCurves,
    class_scores,
    save_confusion_matrix,
    segmentation_metrics,
)
from perf_vit.types import IGNORE_INDEX

__all__ = ["evaluate_raster", "predict_raster", "write_scores"]


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
    maps = SegmentationMaps(checkpoint, kind=kind, quicklook=quicklook, **engine)
    job = maps.job(MapInput(str(image), output))
    with windows_progress(f"predicting {image.name}") as on_window:
        result = maps.make(job, on_window=on_window)
    print_damage(result.damaged)


def evaluate_raster(
    checkpoint: Path,
    image: Path,
    labels: Path,
    *,
    region: Sequence[int] | None = None,
    with_curves: bool = False,
    **engine: Any,
) -> tuple[list[ClassScores], SegmentationCurves | None]:
    """Score the blended prediction of a raster against labels, read as in training; each pixel counts once.

    Args:
        checkpoint: that `perf-vit train` wrote.
        image: the raster.
        labels: a mask or polygons.
        region: row, column, height, width of the part to score.
        with_curves: also measure curves and the confusion matrix.
        **engine: options of the prediction.
    """
    model = load_segmenter(checkpoint)
    source = _open_labelled(model, image)
    spec = model.spec
    truth = open_labels(labels, source, classes=spec.classes, multilabel=spec.multilabel, **spec.label_options)
    warn_of_polygons_beside([truth])
    extent = region_window(None if region is None else list(region), source, "--region")
    metrics = segmentation_metrics(len(spec.classes), multilabel=spec.multilabel)
    # A confusion matrix is of classes that exclude each other.
    curves = SegmentationCurves(spec.classes) if with_curves and not spec.multilabel else None
    with windows_progress(f"evaluating {image.name}") as on_window:
        for strip in segment_strips(model, source, extent=extent, on_window=on_window, **_engine(model, **engine)):
            expected = truth.read(strip.window)
            expected[..., ~strip.valid] = IGNORE_INDEX
            predicted = model.decide(torch.from_numpy(strip.scores)[None])
            metrics.update(predicted, torch.from_numpy(expected).long()[None])
            if curves is not None:
                curves.update(class_probabilities(strip), expected)
    return class_scores(metrics, spec.classes), curves


def write_scores(scores: Sequence[ClassScores], path: Path, curves: SegmentationCurves | None = None) -> None:
    """Scores per class and their means, as JSON; of curves, also precision-recall and confusion matrix as pictures.

    Raises:
        OutputError: nothing can be written there.
    """
    content: dict[str, Any] = {
        "classes": [score.to_dict() for score in scores],
        "mean": {key: mean_over_present(scores, key) for key in ("iou", "f1", "precision", "recall")},
    }
    if curves is not None:
        content |= curves.to_dict()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
        if curves is not None:
            curves.plot(path.with_suffix(".png"))
            save_confusion_matrix(curves.confusion, curves.classes, path.with_name(f"{path.stem}_confusion.png"))
    except OSError as error:
        raise OutputError(f"can't write {path}: {error.strerror}") from error


def _open_labelled(model: Segmenter, image: Path) -> RasterSource | SlideSource:
    spec = model.spec
    if spec.mpp is None:
        return open_raster(image, bands=spec.bands, nodata=spec.nodata, resolution=spec.resolution)
    source = open_for(model, image)
    # A raster refuses mpp.
    assert isinstance(source, SlideSource)
    return source


def _engine(model: Segmenter, *, device: str = "auto", precision: str = "32", **options: Any) -> dict[str, Any]:
    """Put the model on its device and turn the command line's words into the engine's arguments."""
    return {"precision": resolved_precision(precision), "device": on_device(model, device), **options}
