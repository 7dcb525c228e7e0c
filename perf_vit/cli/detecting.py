"""Object detectors on the command line: train, predict, evaluate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from perf_vit.cli.console import console, detection_table, windows_progress
from perf_vit.cli.run_folder import RunFolder
from perf_vit.cli.schemas import DetectionRun
from perf_vit.cli.segmentation_maps import on_device, resolved_precision
from perf_vit.data import ImageRecord, ObjectDataModule, build_object_datamodule, objects_in, read_object_labels
from perf_vit.errors import ConfigError, OutputError
from perf_vit.inference import Objects, predict_objects
from perf_vit.io import open_source, write_objects
from perf_vit.models import Detector, DetectorSpec, load_detector
from perf_vit.tasks import (
    DETECTION_CURVES,
    DETECTION_MONITOR,
    DetectionMetrics,
    DetectionScores,
    DetectionTask,
    build_trainer,
    draw_objects,
    plot_precision_recall,
)
from perf_vit.types import Detections, Source

__all__ = ["evaluate_detector", "find_objects", "report_objects", "train_detector"]


def train_detector(config: DetectionRun, *, progress: bool = True) -> Path:
    """Train a detector and leave checkpoints, metrics, curves and the resolved config in the run folder.

    Everything is opened and built before the folder is touched, so a wrong argument leaves nothing behind.

    Returns:
        The best checkpoint by mean AP at an IoU of .5.

    Raises:
        PerfVitError: a config, input or output that doesn't fit.
    """
    run = RunFolder(config)
    data = build_object_datamodule(config.data, config.seed)
    task = DetectionTask(config.model, _spec(config, data), config.optim)
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


def find_objects(
    checkpoint: Path,
    inputs: Sequence[str],
    output: Path,
    *,
    score_threshold: float | None = None,
    for_maps: Mapping[str, object] | None = None,
    source: dict[str, Any] | None = None,
    **engine: Any,
) -> None:
    """Write the objects of one scene, slide or mosaic.

    Args:
        checkpoint: that `perf-vit train` wrote.
        inputs: the one input.
        output: its suffix chooses the format.
        score_threshold: lowest score of an object; the checkpoint's own by default.
        for_maps: options of maps, which are refused where they are set.
        source: options of `perf_vit.open_source`.
        **engine: options of the search.

    Raises:
        ConfigError: several inputs, a threshold that is no score, or options that are for maps.
        PerfVitError: an input or output that doesn't fit.
    """
    _refuse_options_of_maps(for_maps or {}, checkpoint)
    if len(inputs) != 1:
        raise ConfigError(f"objects are found in one input at a time, got {len(inputs)}; call predict for each")
    if score_threshold is not None and not 0 <= score_threshold <= 1:
        raise ConfigError(f"--score-threshold must lie between 0 and 1, got {score_threshold:g}")
    model = load_detector(checkpoint)
    scene = _open_for(model, inputs[0], **(source or {}))
    threshold = model.spec.score_threshold if score_threshold is None else score_threshold
    with windows_progress(f"searching {Path(inputs[0]).name}") as on_window:
        objects = _detect(model, scene, threshold, on_window=on_window, **engine)
    written = write_objects(output, objects.geometry, objects.scores, objects.labels, model.spec.classes, source=scene)
    console.print(f"{len(objects):,} objects with scores from {threshold:.2f}: {written}", soft_wrap=True)


def _refuse_options_of_maps(for_maps: Mapping[str, object], checkpoint: Path) -> None:
    for name in (name for name, value in for_maps.items() if value):
        raise ConfigError(f"{name} is for maps, and {checkpoint} holds an object detector; leave it out")


def report_objects(
    checkpoint: Path,
    images: Path,
    labels: Path,
    report: Path | None,
    *,
    for_maps: Mapping[str, object] | None = None,
    **options: Any,
) -> None:
    """Print a detector's scores on labelled images, and write them with their curves where a file is named."""
    _refuse_options_of_maps(for_maps or {}, checkpoint)
    scores = evaluate_detector(checkpoint, images, labels, **options)
    console.print(*detection_table(scores, title=f"{images.name} against {labels.name}"), sep="\n")
    if report is None:
        return
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(scores.to_dict(), indent=2) + "\n")
        plot_precision_recall(scores, report.with_suffix(".png"))
    except OSError as error:
        raise OutputError(f"can't write {report}: {error.strerror}") from error


def evaluate_detector(
    checkpoint: Path,
    images: Path,
    labels: Path,
    *,
    label_format: str | None = None,
    **engine: Any,
) -> DetectionScores:
    """Score a detector on whole images, in overlapping windows as `perf-vit predict` finds objects.

    Raises:
        PerfVitError: labels or images that can't be read or don't fit.
    """
    model = load_detector(checkpoint)
    spec = model.spec
    options = {**spec.label_options, **({} if label_format is None else {"label_format": label_format})}
    source_options = {} if spec.mpp is None else {"mpp": spec.mpp}
    index = read_object_labels(labels, images, classes=spec.classes, source_options=source_options, **options)
    metrics = DetectionMetrics(spec.classes, spec.kind)
    with windows_progress(f"evaluating {images.name}", "images") as on_image:
        for done, record in enumerate(index, 1):
            source = _open_for(model, record.path)
            found = _detect(model, source, 0.0, **engine)
            source.close()
            metrics.update([_as_detections(found, record)], [objects_in(record, record.extent, min_visible=0.0)])
            on_image(done, len(index))
    return metrics.compute()


def _spec(config: DetectionRun, data: ObjectDataModule) -> DetectorSpec:
    split = config.data.val or config.data.train
    return DetectorSpec(
        classes=data.classes,
        normalizer=data.normalizer,
        tile_px=data.tile_px,
        bands=None if config.data.bands is None else tuple(config.data.bands),
        mpp=config.data.mpp,
        label_options={
            "label_format": split.format,
            "skip_classes": list(config.data.skip_classes),
            "attribute": config.data.attribute,
        },
    )


def _open_for(model: Detector, path: str, **options: Any) -> Source:
    """Open a source with the bands and nodata that a model was trained with."""
    own = {"nodata": model.spec.nodata, "mpp": model.spec.mpp}
    given = {**own, **{name: value for name, value in options.items() if value is not None}}
    return open_source(path, bands=model.spec.bands, **{k: v for k, v in given.items() if v is not None})


def _detect(
    model: Detector,
    source: Source,
    score_threshold: float,
    *,
    window_size: int | None = None,
    overlap: int | None = None,
    device: str = "auto",
    precision: str = "32",
    **options: Any,
) -> Objects:
    window_size = window_size or model.spec.tile_px
    overlap = window_size // 4 if overlap is None else overlap
    if not 0 <= overlap < window_size:
        raise ConfigError(f"--overlap must be below the window size {window_size}, got {overlap}")
    return predict_objects(
        model,
        source,
        model.spec.normalizer,
        extent=source.extent,
        window_size=window_size,
        overlap=overlap,
        device=on_device(model, device),
        precision=resolved_precision(precision),
        score_threshold=score_threshold,
        **options,
    )


def _as_detections(objects: Objects, record: ImageRecord) -> Detections:
    if objects.kind == "boxes":
        return Detections(boxes_xyxy=objects.geometry, scores=objects.scores, labels=objects.labels)
    if objects.kind == "oriented_boxes":
        return Detections(oriented_boxes=objects.geometry, scores=objects.scores, labels=objects.labels)
    masks = _burnt(objects.geometry, record.height, record.width)
    return Detections(masks=masks, scores=objects.scores, labels=objects.labels)


def _burnt(polygons: npt.NDArray[Any], height: int, width: int) -> npt.NDArray[np.bool_]:
    from rasterio.features import rasterize

    masks = [rasterize([polygon], (height, width), dtype="uint8").astype(bool) for polygon in polygons]
    return np.stack(masks) if masks else np.zeros((0, height, width), bool)
