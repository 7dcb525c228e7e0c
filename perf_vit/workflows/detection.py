"""Object detection: training and evaluation."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from perf_vit.data import DetectionDataModule, ObjectValidity, build_detection_datamodule, read_names
from perf_vit.errors import InputError
from perf_vit.geometry import Objects
from perf_vit.inference import DetectionPredictOptions, DetectionPredictor
from perf_vit.inference.prefetch import FirstWindows, load_ahead
from perf_vit.labels.objects import ImageRecord, OutlineMasks, objects_in, outlines_of, read_object_labels
from perf_vit.metrics import RegisteredMetrics
from perf_vit.metrics.matching import NOT_COUNTED, match_objects
from perf_vit.models import DetectionSpec, InputCheck, check_not_random, detector_kind
from perf_vit.plotting import default_colormap
from perf_vit.reporting import MATCH_LEGEND, ImageSamples, Sample, object_sample
from perf_vit.reporting.samples import class_legend
from perf_vit.tasks import DetectionTask, TrainingSteps
from perf_vit.threads import num_processors
from perf_vit.tiling import grid_windows
from perf_vit.types import Detections, ObjectLabels, Source
from perf_vit.workflows.progress import windows_progress
from perf_vit.workflows.reports import DetectionEvaluation
from perf_vit.workflows.run_config import DetectionRun
from perf_vit.workflows.task import TrainedModel, WindowedEvaluateOptions

__all__ = [
    "DetectionEvaluateOptions",
    "build_detection_data",
    "build_detection_task",
    "detection_steps",
    "evaluate_detection",
]


def build_detection_data(config: DetectionRun) -> DetectionDataModule:
    """The data module of a run.

    Raises:
        PerfVitError: A config or input that doesn't fit.
    """
    oriented = detector_kind(config.model.head) == "oriented_boxes"
    return build_detection_datamodule(config.data, config.seed, oriented=oriented)


def build_detection_task(config: DetectionRun, data: DetectionDataModule) -> DetectionTask:
    """The Lightning module of a run.

    Raises:
        PerfVitError: A model that doesn't fit, or labels without the geometry that it learns.
    """
    check_not_random(config.model)
    task = DetectionTask(config.model, _spec(config, data), config.optim)
    _check_geometry(data, task.model.spec.kind, config.model.head)
    return task


def detection_steps(config: DetectionRun) -> TrainingSteps:
    """Training steps of a run, to measure.

    Raises:
        PerfVitError: A config or input that doesn't fit.
    """
    data = build_detection_data(config)
    records = list(data.train_index)
    pixels = sum(record.extent.height * record.extent.width for record in records)
    return TrainingSteps(
        model=config.model,
        optim=config.optim,
        trainer=config.trainer,
        num_bands=len(data.normalizer.mean),
        classes=data.classes,
        batch_size=config.data.process_batch_size(config.trainer.num_devices),
        objects_per_mpx=1e6 * sum(len(record.labels) for record in records) / pixels,
    )


def _check_geometry(data: DetectionDataModule, kind: str, head: str) -> None:
    """Refuse labels without the geometry that a head learns.

    Raises:
        InputError: some have none.
    """
    for part, index in (("train", data.train_index), ("val", data.val_index)):
        # Records have these two attributes of the kinds' names; boxes all have.
        if kind != "boxes" and any(getattr(record, kind) is None for record in index):
            hint = (
                "give every object an outline or choose head faster_rcnn, fcos or retinanet"
                if kind == "masks"
                else "give outlines or four corners, or choose a head for upright boxes: fcos, retinanet or faster_rcnn"
            )
            raise InputError(
                f"model.head {head} learns {kind.replace('_', ' ')}, got labels without them in data.{part}; {hint}"
            )


@dataclass(frozen=True, kw_only=True)
class DetectionEvaluateOptions(WindowedEvaluateOptions):
    """Options of the evaluation of object detectors.

    Attributes:
        label_format: Format of the labels; as in training by default.
        names: Text file with the names of the images to score, one a line; all labelled ones by default.
    """

    label_format: str | None = None
    names: str | Path | None = None


def evaluate_detection(
    model: TrainedModel, images: Path, labels: Path, options: DetectionEvaluateOptions
) -> DetectionEvaluation:
    """Score a detector on whole images, in overlapping windows as predictions find objects.

    Objects without a valid pixel under them are ignored, as in training. All scores count, whatever the threshold.

    Args:
        model: A detector or its checkpoint.
        images: A folder, or one image.
        labels: Labels of the images.
        options: Options of the evaluation.

    Raises:
        PerfVitError: Labels or images can't be read or don't fit.
    """
    search = options.for_prediction(DetectionPredictOptions, {"score_threshold": 0.0})
    predictor = DetectionPredictor(model, search)  # type: ignore[arg-type]
    spec = predictor.model.spec
    given = {} if options.label_format is None else {"label_format": options.label_format}
    index = read_object_labels(
        labels,
        images,
        classes=spec.classes,
        names=None if options.names is None else read_names(options.names, "names"),
        open_input=partial(spec.open, check=InputCheck(None), **predictor.options.input_options),
        oriented=spec.kind == "oriented_boxes",
        **{**spec.label_options, **given},
    )
    found = DetectionEvaluation(
        spec.classes,
        spec.kind,
        score_threshold=spec.score_threshold,
        title=f"{images.name} against {labels.name}",
        registered=RegisteredMetrics("detection", spec),
    )
    legend = class_legend(spec.classes, default_colormap(len(spec.classes)))
    found.samples = samples = ImageSamples([*legend, *MATCH_LEGEND])
    ahead = load_ahead(index, partial(_opened, predictor), num_threads=1, depth=1)
    with windows_progress(f"evaluating {images.name}", "images") as on_image, closing(ahead) as opened:
        for done, (record, each) in enumerate(zip(index, opened, strict=True), 1):
            objects = predictor.find(each.first, each.source.extent)
            each.source.close()
            truth = replace(each.truth, ignored=each.truth.ignored | ~each.validity.seen)
            detections = _as_detections(objects, record)
            found.update(detections, truth)
            samples.offer(*_sample(predictor, record, objects, detections, truth))
            on_image(done, len(index))
    return found


@dataclass(frozen=True)
class _LabelledImage:
    """Image whose first windows are read.

    Attributes:
        source: The image.
        truth: Its objects.
        validity: Record of the objects on valid pixels.
        first: Reader of all windows.
    """

    source: Source
    truth: ObjectLabels
    validity: ObjectValidity
    first: FirstWindows


def _open(predictor: DetectionPredictor, record: ImageRecord, check: InputCheck) -> Source:
    """Open an image as its labels were read."""
    opened = predictor.model.spec.open(record.path, check=check, **predictor.options.input_options)
    return record.labelled(opened)


def _opened(predictor: DetectionPredictor, record: ImageRecord) -> _LabelledImage:
    """Open an image, and read its objects and as many windows as are read ahead."""
    options, spec = predictor.options, predictor.model.spec
    # Closes the handle of this thread; other threads open their own.
    with closing(_open(predictor, record, predictor.check_input)) as source:
        truth = objects_in(record, record.extent, min_visible=0.0, crop_masks=True)
        validity = ObjectValidity(source, truth.boxes_xyxy)
        windows = grid_windows(source.extent, *options.windows(spec.tile_px))
        readers = options.num_readers or num_processors()
        first = FirstWindows(validity, windows[: 2 * options.batch_size + readers])
    return _LabelledImage(source, truth, validity, first)


def _sample(
    predictor: DetectionPredictor, record: ImageRecord, objects: Objects, found: Detections, truth: ObjectLabels
) -> tuple[float, Sample]:
    """F1 of an image at the model's score threshold, and its pictures."""
    spec = predictor.model.spec
    owners = match_objects(found, truth, spec.kind, score_threshold=spec.score_threshold)
    counted, known = owners != NOT_COUNTED, ~truth.ignored
    labels = np.asarray(objects.labels, np.int64)
    right = np.zeros(len(owners), bool)
    right[owners >= 0] = truth.labels[owners[owners >= 0]] == labels[owners >= 0]
    was_found = np.zeros(len(truth), bool)
    was_found[owners[right]] = True
    f1 = 2 * right.sum() / max(1, counted.sum() + known.sum())
    title = f"F1 {f1:.3f}: {Path(record.path).name}, {known.sum()} objects, {counted.sum()} detections"
    return float(f1) if counted.any() or known.any() else math.nan, object_sample(
        title,
        partial(_open, predictor, record, InputCheck(None)),
        (outlines_of(truth)[known], was_found[known]),
        (objects.polygons()[counted], right[counted]),
        (truth.labels[known], labels[counted]),
        len(spec.classes),
    )


def _spec(config: DetectionRun, data: DetectionDataModule) -> DetectionSpec:
    split = config.data.val or config.data.train
    return DetectionSpec.from_data_config(
        config.data,
        data,
        category_ids=data.train_index.category_ids,
        label_options={
            "label_format": split.label_format,
            "skip_classes": list(config.data.skip_classes),
            "attribute": config.data.attribute,
        },
    )


def _as_detections(objects: Objects, record: ImageRecord) -> Detections:
    if objects.kind == "boxes":
        return Detections(boxes_xyxy=objects.geometry, scores=objects.scores, labels=objects.labels)
    if objects.kind == "oriented_boxes":
        return Detections(oriented_boxes=objects.geometry, scores=objects.scores, labels=objects.labels)
    masks = OutlineMasks(list(objects.geometry)).read_crops(np.arange(len(objects)), record.extent)
    return Detections(mask_crops=masks, scores=objects.scores, labels=objects.labels)
