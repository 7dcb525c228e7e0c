"""Object detectors on the command line: train, predict, evaluate."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from perf_vit.data import DetectionDataModule, ObjectValidity, build_detection_datamodule, read_names
from perf_vit.errors import InputError
from perf_vit.geometry import Objects
from perf_vit.inference import DetectionPredictOptions, DetectionPredictor
from perf_vit.labels.objects import ImageRecord, OutlineMasks, objects_in, read_object_labels
from perf_vit.models import DetectionSpec, detector_kind
from perf_vit.tasks import DETECTION_CURVES, DETECTION_MONITOR, DetectionTask, build_trainer, draw_objects
from perf_vit.transforms import InputCheck
from perf_vit.types import Detections
from perf_vit.workflows.progress import show, windows_progress
from perf_vit.workflows.reports import DetectionReport
from perf_vit.workflows.run_config import DetectionRun
from perf_vit.workflows.run_folder import RunFolder

__all__ = ["evaluate_detector", "report_detector", "train_detector"]


def train_detector(config: DetectionRun, *, progress: bool = True) -> Path:
    """Train a detector and leave checkpoints, metrics, curves and the resolved config in the run folder.

    Everything is opened and built before the folder is touched, so a wrong argument leaves nothing behind.

    Returns:
        The best checkpoint by mean AP at an IoU of .5.

    Raises:
        PerfVitError: a config, input or output that doesn't fit.
    """
    run = RunFolder(config)
    oriented = detector_kind(config.model.head) == "oriented_boxes"
    data = build_detection_datamodule(config.data, config.seed, oriented=oriented)
    task = DetectionTask(config.model, _spec(config, data), config.optim)
    _check_geometry(data, task.model.spec.kind, config.model.head)
    trainer = build_trainer(
        config.trainer,
        run.path,
        progress=progress,
        monitor=DETECTION_MONITOR,
        curves=DETECTION_CURVES,
        draw=draw_objects,
        seed=config.seed,
    )
    run.fit(trainer, task, data)
    return run.best


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


def report_detector(checkpoint: Path, images: Path, labels: Path, report: Path | None, **options: Any) -> None:
    """Write a detector's scores on labelled images with their curves where a file is named, and print them."""
    scores = evaluate_detector(checkpoint, images, labels, **options)
    if report is not None:
        scores.write(report)
    show(*scores.tables(f"{images.name} against {labels.name}"))


def evaluate_detector(
    checkpoint: Path,
    images: Path,
    labels: Path,
    *,
    options: DetectionPredictOptions | None = None,
    label_format: str | None = None,
    names: Path | None = None,
) -> DetectionReport:
    """Score a detector on whole images, in overlapping windows as `perf-vit predict` finds objects.

    Objects without a valid pixel under them are ignored, as in training.

    Args:
        checkpoint: that `perf-vit train` wrote.
        images: a folder, or one image.
        labels: of the images.
        options: of the search; all scores count, whatever its threshold.
        label_format: as in training by default.
        names: a text file with the names of the images to score, one a line; all labelled ones by default.

    Raises:
        PerfVitError: labels or images that can't be read or don't fit.
    """
    predictor = DetectionPredictor(checkpoint, replace(options or DetectionPredictOptions(), score_threshold=0.0))
    spec = predictor.model.spec
    label_options = {**spec.label_options, **({} if label_format is None else {"label_format": label_format})}
    chosen = None if names is None else read_names(names, "--list")
    index = read_object_labels(
        labels,
        images,
        classes=spec.classes,
        names=chosen,
        open_input=partial(spec.open, check=InputCheck(None)),
        oriented=spec.kind == "oriented_boxes",
        **label_options,
    )
    check = InputCheck(spec.trained_on)
    report = DetectionReport(spec.classes, spec.kind, score_threshold=spec.score_threshold)
    with windows_progress(f"evaluating {images.name}", "images") as on_image:
        for done, record in enumerate(index, 1):
            source = spec.open(record.path, check=check)
            truth = objects_in(record, record.extent, min_visible=0.0, crop_masks=True)
            reader = ObjectValidity(source, truth.boxes_xyxy)
            found = predictor.find(reader, source.extent)
            source.close()
            truth = replace(truth, ignored=truth.ignored | ~reader.seen)
            report.update(_as_detections(found, record), truth)
            on_image(done, len(index))
    return report


def _spec(config: DetectionRun, data: DetectionDataModule) -> DetectionSpec:
    split = config.data.val or config.data.train
    return DetectionSpec.from_data_config(
        config.data,
        data,
        category_ids=data.train_index.category_ids,
        label_options={
            "label_format": split.format,
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
