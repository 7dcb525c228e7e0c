"""`perf-vit predict` and `perf-vit evaluate`: a checkpoint on a raster."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchmetrics import MetricCollection

from perf_vit.cli.console import mean_over_present, print_damage, windows_progress
from perf_vit.cli.score_files import score_files
from perf_vit.cli.segmentation_maps import SegmentationMaps, on_device, resolved_precision
from perf_vit.data import is_labelled_folder, open_pairs, region_window
from perf_vit.errors import ConfigError
from perf_vit.inference import MapInput, MapResult, OutputKind, Strip, class_probabilities, segment_strips
from perf_vit.io import (
    LabelSource,
    warn_of_polygons_beside,
    write_json,
)
from perf_vit.models import Segmenter, load_segmenter
from perf_vit.tasks import (
    ClassScores,
    SegmentationCurves,
    class_scores,
    save_confusion_matrix,
    segmentation_metrics,
)
from perf_vit.transforms import InputCheck
from perf_vit.types import IGNORE_INDEX

__all__ = ["evaluate_raster", "predict_raster", "write_scores"]


def predict_raster(
    checkpoint: Path,
    image: str | Path,
    output: Path,
    *,
    kind: OutputKind = "classes",
    quicklook: bool = True,
    **engine: Any,
) -> MapResult:
    """Write the map of a raster, a path or a URL, and its quicklook beside it as `output` with the suffix .png."""
    maps = SegmentationMaps(checkpoint, kind=kind, quicklook=quicklook, **engine)
    item = MapInput(os.fspath(image), output)
    job = maps.job(item)
    maps.check([item])
    with windows_progress(f"predicting {Path(image).name}") as on_window:
        result = maps.make(job, on_window=on_window)
    print_damage(result.damaged)
    return result


def evaluate_raster(
    checkpoint: Path,
    image: Path,
    labels: Path,
    *,
    region: Sequence[int] | None = None,
    with_curves: bool = False,
    all_touched: bool | None = None,
    slide_mpp: float | None = None,
    tissue: str | None = None,
    **engine: Any,
) -> tuple[list[ClassScores], SegmentationCurves | None]:
    """Score the blended prediction of a raster against labels, read as in training; each pixel counts once.

    Of a folder of images with a folder of labels, all pixels of all images count together.

    Args:
        checkpoint: that `perf-vit train` wrote.
        image: the raster, or a folder of images.
        labels: a mask or polygons, or a folder of them.
        region: row, column, height, width of the part to score.
        all_touched: whether polygons label every pixel that they touch; as in training by default.
        with_curves: also measure curves and, of classes that exclude each other, the confusion matrix.
        slide_mpp: micrometres per pixel of level 0 of slides, instead of what the model was trained with.
        tissue: "otsu" or a GeoJSON file of outlines, likewise; pixels of glass are not scored then.
        **engine: options of the prediction.

    Raises:
        ConfigError: a region that doesn't fit.
        InputError: files that can't be read or don't fit each other or the model.
    """
    model = load_segmenter(checkpoint)
    spec = model.spec
    is_folder = is_labelled_folder(image, labels)
    if is_folder and region is not None:
        raise ConfigError(f"--region is a part of one raster, and {image} is a folder; leave it out")
    if (slide_mpp, tissue) != (None, None) and spec.mpp is None:
        raise ConfigError("--slide-mpp and --tissue are for slides, and this model is one of rasters; leave them out")
    open_image = partial(spec.open, check=InputCheck(spec.trained_on), slide_mpp=slide_mpp, tissue=tissue)
    options = {**spec.label_options, **({} if all_touched is None else {"all_touched": all_touched})}
    labelled = open_pairs(image, labels, open_image, spec, options)
    if not is_folder:
        warn_of_polygons_beside([labelled[0][1]])
    part = None if region is None else region_window(list(region), labelled[0][0], "--region")
    engine = _engine(model, **engine)
    metrics = segmentation_metrics(len(spec.classes), multilabel=spec.multilabel)
    curves = SegmentationCurves(spec.classes, multilabel=spec.multilabel) if with_curves else None
    with windows_progress(f"evaluating {image.name}", "images" if is_folder else "windows") as on_done:
        if not is_folder:
            engine["on_window"] = on_done
        for number, (source, truth) in enumerate(labelled, 1):
            strips = segment_strips(model, source, extent=part or source.extent, **engine)
            _count(model, strips, truth, metrics, curves)
            if is_folder:
                source.close()
                on_done(number, len(labelled))
    return class_scores(metrics, spec.classes), curves


def _count(
    model: Segmenter,
    strips: Iterable[Strip],
    truth: LabelSource,
    metrics: MetricCollection,
    curves: SegmentationCurves | None,
) -> None:
    """Add the pixels of an image to metrics and curves."""
    for strip in strips:
        expected = truth.read(strip.window)
        expected[..., ~strip.valid] = IGNORE_INDEX
        predicted = model.decide(torch.from_numpy(strip.scores)[None])
        metrics.update(predicted, torch.from_numpy(expected).long()[None])
        if curves is not None:
            curves.update(class_probabilities(strip, multilabel=model.spec.multilabel), expected)


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
    _, curve, matrix = score_files(path, "segmentation")
    write_json(path, content)
    if curves is not None:
        curves.plot(curve)
    if curves is not None and curves.confusion is not None:
        save_confusion_matrix(curves.confusion, curves.classes, matrix)


def _engine(model: Segmenter, *, device: str = "auto", precision: str = "32", **options: Any) -> dict[str, Any]:
    """Put the model on its device and turn the command line's words into the engine's arguments."""
    return {"precision": resolved_precision(precision), "device": on_device(model, device), **options}
