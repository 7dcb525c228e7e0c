"""`perf-vit predict` and `perf-vit evaluate`: a checkpoint on a raster."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torchmetrics import MetricCollection

from perf_vit.cli.console import mean_over_present, print_damage, windows_progress
from perf_vit.cli.score_files import score_files
from perf_vit.cli.segmentation_maps import SegmentationMaps, model_resolution, on_device, open_for, resolved_precision
from perf_vit.data import find_label_pairs, is_labelled_folder, region_window
from perf_vit.errors import ConfigError, InputError
from perf_vit.inference import MapInput, MapResult, OutputKind, Strip, class_probabilities, segment_strips
from perf_vit.io import (
    LabelFiles,
    LabelSource,
    RasterSource,
    SlideSource,
    open_labels,
    open_raster,
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

_Labelled: TypeAlias = tuple[RasterSource | SlideSource, LabelSource]


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
    given = {name: value for name, value in (("slide_mpp", slide_mpp), ("tissue", tissue)) if value is not None}
    if given and spec.mpp is None:
        raise ConfigError("--slide-mpp and --tissue are for slides, and this model is one of rasters; leave them out")
    options = _label_options(model)
    if all_touched is not None:
        options["all_touched"] = all_touched
    labelled = (_open_folder if is_folder else _open_one)(model, image, labels, given, options)
    check_input = InputCheck(spec.trained_on)
    part = None if region is None else region_window(list(region), labelled[0][0], "--region")
    engine = _engine(model, **engine)
    metrics = segmentation_metrics(len(spec.classes), multilabel=spec.multilabel)
    curves = SegmentationCurves(spec.classes, multilabel=spec.multilabel) if with_curves else None
    with windows_progress(f"evaluating {image.name}", "images" if is_folder else "windows") as on_done:
        if not is_folder:
            engine["on_window"] = on_done
        for number, (source, truth) in enumerate(labelled, 1):
            check_input(source)
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


def _open_one(
    model: Segmenter, image: Path, labels: Path, given: Mapping[str, Any], options: Mapping[str, Any]
) -> list[_Labelled]:
    source = _open_image(model, image, given)
    truth = open_labels(labels, source, **options)
    warn_of_polygons_beside([truth])
    return [(source, truth)]


def _open_folder(
    model: Segmenter, images: Path, labels: Path, given: Mapping[str, Any], options: Mapping[str, Any]
) -> list[_Labelled]:
    """All images of a folder, closed, and their labels.

    Raises:
        InputError: images with other bands than the model's.
    """
    pairs = find_label_pairs(images, labels)
    sources = []
    for image, _ in pairs:
        sources.append(_open_image(model, image, given))
        sources[-1].close()
    num_bands = len(model.spec.normalizer.mean)
    others = [source for source in sources if source.num_bands != num_bands]
    if others:
        raise InputError(
            f"{len(others)} of {len(sources)} images in {images} have another number of bands than the model, "
            f"{num_bands}: the first, {others[0].path}, has {others[0].num_bands}"
        )
    files = LabelFiles([file for _, file in pairs], sources, **options)
    files.look()
    return [(source, files[index]) for index, source in enumerate(sources)]


def _label_options(model: Segmenter) -> dict[str, Any]:
    spec = model.spec
    return {
        "classes": spec.classes,
        "background": spec.background,
        "multilabel": spec.multilabel,
        **spec.label_options,
    }


def _open_image(model: Segmenter, image: Path, given: Mapping[str, Any]) -> RasterSource | SlideSource:
    """An image as the model was trained on; `given` options of slides go before those of training."""
    spec = model.spec
    if spec.mpp is None:
        return open_raster(image, bands=spec.bands, nodata=spec.nodata, resolution=model_resolution(model))
    source = open_for(model, image, **{"slide_mpp": spec.slide_mpp, "tissue": spec.tissue, **given})
    # A raster refuses mpp.
    assert isinstance(source, SlideSource)
    return source


def _engine(model: Segmenter, *, device: str = "auto", precision: str = "32", **options: Any) -> dict[str, Any]:
    """Put the model on its device and turn the command line's words into the engine's arguments."""
    return {"precision": resolved_precision(precision), "device": on_device(model, device), **options}
