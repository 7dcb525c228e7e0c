"""Segmentation: training and evaluation."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from perf_vit.data import (
    SegmentationDataModule,
    build_segmentation_datamodule,
    count_class_pixels,
    label_options,
    open_pairs,
    region_window,
)
from perf_vit.data.class_pixels import num_windows
from perf_vit.errors import ConfigError, DataWarning, OptionError
from perf_vit.inference import (
    SegmentationPredictOptions,
    SegmentationPredictor,
    class_probabilities,
    ignore_progress,
)
from perf_vit.labels import is_labelled_folder, warn_of_polygons_outside
from perf_vit.metrics import RegisteredMetrics
from perf_vit.models import InputCheck, SegmentationSpec, check_not_random
from perf_vit.reporting import MapSamples
from perf_vit.sources import unit_of
from perf_vit.tasks import SegmentationOptimConfig, SegmentationTask, TrainingSteps, balanced_weights
from perf_vit.types import IGNORE_INDEX, TISSUE_METHODS, Source, Window
from perf_vit.workflows.progress import new_table, note, windows_progress
from perf_vit.workflows.reports import SegmentationEvaluation
from perf_vit.workflows.run_config import SegmentationRun
from perf_vit.workflows.task import TrainedModel, WindowedEvaluateOptions

_WINDOWS_COUNTED = 1000

__all__ = [
    "SegmentationEvaluateOptions",
    "build_segmentation_data",
    "build_segmentation_task",
    "evaluate_segmentation",
    "segmentation_steps",
    "with_measured_weights",
]


def with_measured_weights(
    optim: SegmentationOptimConfig, data: SegmentationDataModule, *, multilabel: bool
) -> SegmentationOptimConfig:
    """The same with numbers in place of `class_weights: balanced`; notes them, with the pixels of each class.

    In large data these are estimates, see `count_class_pixels`.

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
    sources = data.train.sources
    with windows_progress("counting the pixels of the classes") as on_window:
        pixels = count_class_pixels(sources, len(data.classes), max_windows=_WINDOWS_COUNTED, on_window=on_window)
    weights = balanced_weights(pixels)
    is_large = num_windows(sources) > _WINDOWS_COUNTED
    how = f"; estimated if more than {_WINDOWS_COUNTED:,} windows have labels" if is_large else ""
    table = new_table(f"balanced class weights{how}", ("class", "pixels", "share", "weight"))
    for name, count, weight in zip(data.classes, pixels, weights, strict=True):
        table.add_row(name, f"{count:,}", f"{count / max(1, sum(pixels)):.3%}", f"{weight:.4g}")
    note(table)
    absent = [name for name, count in zip(data.classes, pixels, strict=True) if not count]
    if absent:
        warnings.warn(
            f"{len(absent)} of {len(pixels)} classes have no pixel in the training labels, so their weight is "
            f"1: {', '.join(absent)}",
            DataWarning,
            stacklevel=2,
        )
    return replace(optim, class_weights=weights)


def build_segmentation_task(config: SegmentationRun, data: SegmentationDataModule) -> SegmentationTask:
    """The Lightning module of a run.

    Raises:
        PerfVitError: A model or loss that doesn't fit.
    """
    check_not_random(config.model)
    optim = with_measured_weights(config.optim, data, multilabel=config.data.multilabel)
    return SegmentationTask(config.model, _spec(config, data), optim)


def build_segmentation_data(config: SegmentationRun) -> SegmentationDataModule:
    """The data module of a run.

    Raises:
        PerfVitError: A config or input that doesn't fit.
    """
    with windows_progress("looking for labelled pixels") as on_window:
        return build_segmentation_datamodule(config.data, config.seed, on_window)


def segmentation_steps(config: SegmentationRun) -> TrainingSteps:
    """Training steps of a run, to measure.

    Raises:
        PerfVitError: A config or input that doesn't fit.
    """
    # No tile is read, so no places of them need be found.
    data = build_segmentation_datamodule(replace(config.data, sampler="random"), config.seed)
    return TrainingSteps(
        model=config.model,
        # Weights that are to be measured take no more memory than any others.
        optim=replace(config.optim, class_weights=None),
        trainer=config.trainer,
        num_bands=len(data.normalizer.mean),
        classes=data.classes,
        batch_size=config.data.process_batch_size(config.trainer.num_devices),
        multilabel=config.data.multilabel,
    )


def _spec(config: SegmentationRun, data: SegmentationDataModule) -> SegmentationSpec:
    return SegmentationSpec.from_data_config(
        config.data,
        data,
        resolution_unit=None if config.data.resolution is None else unit_of(data.train.sources[0].source.crs),
        # Outlines are those of one slide.
        tissue=config.data.tissue if config.data.tissue in TISSUE_METHODS else None,
        label_options=label_options(config.data),
    )


@dataclass(frozen=True, kw_only=True)
class SegmentationEvaluateOptions(WindowedEvaluateOptions):
    """Options of the evaluation of segmentation maps.

    Attributes:
        flips: Average the scores of a window and its three mirror images.
        tissue: "auto", "otsu" or a file of outlines in QuPath's coordinates: the part of a slide that is scored.
        region: Row, column, height and width of the part to score, in pixels.
        all_touched: Whether polygons label every pixel that they touch; as in training by default.
    """

    flips: bool = False
    tissue: str | None = None
    region: tuple[int, int, int, int] | None = None
    all_touched: bool | None = None


def evaluate_segmentation(
    model: TrainedModel, image: Path, labels: Path, options: SegmentationEvaluateOptions
) -> SegmentationEvaluation:
    """Score the blended prediction of a raster against labels, read as in training; each pixel counts once.

    Of a folder of images with a folder of labels, all pixels of all images count together.

    Args:
        model: A segmentation model or its checkpoint.
        image: The raster, or a folder of images.
        labels: A mask or polygons, or a folder of them.
        options: Options of the evaluation; with tissue, pixels of glass are not scored.

    Raises:
        InputError: Files can't be read or don't fit each other or the model.
        OptionError: An option that doesn't fit.
    """
    predictor = SegmentationPredictor(model, options.for_prediction(SegmentationPredictOptions))  # type: ignore[arg-type]
    segmenter, spec = predictor.model, predictor.model.spec
    is_folder = is_labelled_folder(image, labels)
    _check_options(options, spec, image if is_folder else None)
    open_image = partial(spec.open, check=InputCheck(spec.trained_on), **predictor.options.input_options)
    touched = {} if options.all_touched is None else {"all_touched": options.all_touched}
    labelled = open_pairs(image, labels, open_image, spec, {**spec.label_options, **touched})
    if not is_folder:
        warn_of_polygons_outside([labelled[0][1]])
    part = None if options.region is None else _part(options.region, labelled[0][0])
    found = SegmentationEvaluation(
        spec.classes,
        multilabel=spec.multilabel,
        title=f"{image.name} against {labels.name}",
        registered=RegisteredMetrics("segmentation", spec),
    )
    found.samples = samples = MapSamples(
        spec.classes, spec.background_index, spec.multilabel, spec.tile_px, overview=not is_folder
    )
    with windows_progress(f"evaluating {image.name}", "images" if is_folder else "windows") as on_done:
        on_window = ignore_progress if is_folder else on_done
        for number, (source, truth) in enumerate(labelled, 1):
            samples.begin(source, part or source.extent)
            for strip in predictor.strips(source, part or source.extent, on_progress=on_window):
                expected = truth.read(strip.window)
                expected[..., ~strip.valid] = IGNORE_INDEX
                decided = segmenter.to_labels(torch.from_numpy(strip.scores)[None])[0]
                found.update(decided, class_probabilities(strip, multilabel=spec.multilabel), expected)
                samples.add(decided.cpu().numpy(), expected)
            samples.end()
            if is_folder:
                source.close()
                on_done(number, len(labelled))
    return found


def _part(region: tuple[int, int, int, int], source: Source) -> Window:
    try:
        return region_window(list(region), source, "region")
    except ConfigError as error:
        raise OptionError(str(error)) from error


def _check_options(options: SegmentationEvaluateOptions, spec: SegmentationSpec, folder: Path | None) -> None:
    if folder is not None and options.region is not None:
        raise OptionError(f"region is a part of one raster, and {folder} is a folder; leave it out")
    for name in ("slide_mpp", "slide_mpp_override", "tissue"):
        if getattr(options, name) is not None and spec.mpp is None:
            raise OptionError(f"{name} is for slides, and this model is one of rasters; leave it out")
