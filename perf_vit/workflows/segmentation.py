"""Segmentation: training and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchmetrics import MetricCollection

from perf_vit.data import (
    SegmentationDataModule,
    build_segmentation_datamodule,
    count_class_pixels,
    label_options,
    open_pairs,
    region_window,
)
from perf_vit.errors import ConfigError
from perf_vit.files import write_json
from perf_vit.inference import (
    SegmentationPredictOptions,
    SegmentationPredictor,
    Strip,
    class_probabilities,
    ignore_progress,
)
from perf_vit.labels import LabelSource, is_labelled_folder, warn_of_polygons_beside
from perf_vit.metrics import ClassScores, SegmentationCurves, class_scores, save_confusion_matrix, segmentation_metrics
from perf_vit.models import SegmentationSpec, Segmenter
from perf_vit.sources import unit_of
from perf_vit.tasks import SegmentationOptimConfig, SegmentationTask, balanced_weights, build_trainer, draw_segmentation
from perf_vit.transforms import InputCheck
from perf_vit.types import IGNORE_INDEX
from perf_vit.workflows.progress import mean_over_present, new_table, say_line, show, windows_progress
from perf_vit.workflows.reports import score_files
from perf_vit.workflows.run_config import SegmentationRun
from perf_vit.workflows.run_folder import RunFolder

__all__ = ["evaluate_segmenter", "train_segmenter", "with_measured_weights", "write_scores"]


def with_measured_weights(
    optim: SegmentationOptimConfig, data: SegmentationDataModule, *, multilabel: bool
) -> SegmentationOptimConfig:
    """The same with numbers in place of `class_weights: balanced`; prints them, with the pixels of each class.

    Classes without a pixel in the training labels are a warning.

    Raises:
        ConfigError: with `multilabel`, where several classes may be true at a pixel.
    """
    if optim.class_weights != "balanced":
        return optim
    if multilabel:
        raise ConfigError(
            "optim.class_weights: balanced is for classes that exclude each other; with data.multilabel, give numbers, "
            "or a loss that looks for the rare, as 'optim.loss={dice: 1}'"
        )
    pixels = count_class_pixels(data.train.sources, len(data.classes))
    weights = balanced_weights(pixels)
    table = new_table("balanced class weights", ("class", "pixels", "share", "weight"))
    for name, count, weight in zip(data.classes, pixels, weights, strict=True):
        table.add_row(name, f"{count:,}", f"{count / max(1, sum(pixels)):.3%}", f"{weight:.4g}")
    show(table)
    absent = [name for name, count in zip(data.classes, pixels, strict=True) if not count]
    if absent:
        say_line(
            "Warning",
            f"{len(absent)} of {len(pixels)} classes have no pixel in the training labels, so their weight is "
            f"1: {', '.join(absent)}",
        )
    return replace(optim, class_weights=weights)


def evaluate_segmenter(
    checkpoint: Path,
    image: Path,
    labels: Path,
    *,
    options: SegmentationPredictOptions | None = None,
    region: Sequence[int] | None = None,
    with_curves: bool = False,
    all_touched: bool | None = None,
) -> tuple[list[ClassScores], SegmentationCurves | None]:
    """Score the blended prediction of a raster against labels, read as in training; each pixel counts once.

    Of a folder of images with a folder of labels, all pixels of all images count together.

    Args:
        checkpoint: that `perf-vit train` wrote.
        image: the raster, or a folder of images.
        labels: a mask or polygons, or a folder of them.
        options: of the prediction; with tissue, pixels of glass are not scored.
        region: row, column, height, width of the part to score.
        all_touched: whether polygons label every pixel that they touch; as in training by default.
        with_curves: also measure curves and, of classes that exclude each other, the confusion matrix.

    Raises:
        ConfigError: a region that doesn't fit.
        InputError: files that can't be read or don't fit each other or the model.
    """
    options = options or SegmentationPredictOptions()
    predictor = SegmentationPredictor(checkpoint, options)
    model, spec = predictor.model, predictor.model.spec
    is_folder = is_labelled_folder(image, labels)
    if is_folder and region is not None:
        raise ConfigError(f"`region` is a part of one raster, and {image} is a folder; leave it out")
    if (options.slide_mpp, options.tissue) != (None, None) and spec.mpp is None:
        raise ConfigError("`slide_mpp` and `tissue` are for slides, and this model is one of rasters; leave them out")
    open_image = partial(spec.open, check=InputCheck(spec.trained_on), **options.input_options)
    label_options = {**spec.label_options, **({} if all_touched is None else {"all_touched": all_touched})}
    labelled = open_pairs(image, labels, open_image, spec, label_options)
    if not is_folder:
        warn_of_polygons_beside([labelled[0][1]])
    part = None if region is None else region_window(list(region), labelled[0][0], "--region")
    metrics = segmentation_metrics(len(spec.classes), multilabel=spec.multilabel)
    curves = SegmentationCurves(spec.classes, multilabel=spec.multilabel) if with_curves else None
    with windows_progress(f"evaluating {image.name}", "images" if is_folder else "windows") as on_done:
        on_window = ignore_progress if is_folder else on_done
        for number, (source, truth) in enumerate(labelled, 1):
            strips = predictor.strips(source, part or source.extent, on_progress=on_window)
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


def train_segmenter(config: SegmentationRun, *, progress: bool = True) -> Path:
    """Train a segmenter and leave checkpoints, metrics, curves and the resolved config in the run folder.

    Everything is opened and built before the folder is touched, so a wrong argument leaves nothing behind.

    Returns:
        The best checkpoint by mean validation IoU.

    Raises:
        PerfVitError: a config, input or output that doesn't fit.
    """
    run = RunFolder(config)
    data = _build_data(config)
    optim = with_measured_weights(config.optim, data, multilabel=config.data.multilabel)
    task = SegmentationTask(config.model, _spec(config, data), optim)
    trainer = build_trainer(config.trainer, run.path, progress=progress, draw=draw_segmentation, seed=config.seed)
    run.fit(trainer, task, data)
    return run.best


def _build_data(config: SegmentationRun) -> SegmentationDataModule:
    if config.data.sampler != "balanced":
        return build_segmentation_datamodule(config.data, config.seed)
    with windows_progress("looking for pixels of the classes") as on_window:
        return build_segmentation_datamodule(config.data, config.seed, on_window)


def _spec(config: SegmentationRun, data: SegmentationDataModule) -> SegmentationSpec:
    return SegmentationSpec.from_data_config(
        config.data,
        data,
        resolution_unit=None if config.data.resolution is None else unit_of(data.train.sources[0].source.crs),
        # Outlines are those of one slide.
        tissue="otsu" if config.data.tissue == "otsu" else None,
        label_options=label_options(config.data),
    )
