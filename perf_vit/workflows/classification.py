"""Networks that say one thing of a whole image, on the command line: train, predict, evaluate."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from perf_vit.data import (
    ClassificationDataConfig,
    ClassificationDataModule,
    ClassificationImages,
    ClassificationSplitConfig,
    ClassificationViews,
    RegressionDataConfig,
    build_classification_datamodule,
    collate_tiles,
    read_image_targets,
)
from perf_vit.inference import ClassificationPredictOptions, ClassificationPredictor
from perf_vit.metrics import ClassificationMetrics, ClassificationScores, RegressionScores
from perf_vit.models import ClassificationSpec
from perf_vit.tasks import (
    CLASSIFICATION_CURVES,
    CLASSIFICATION_MONITOR,
    REGRESSION_CURVES,
    REGRESSION_MONITOR,
    ClassificationTask,
    build_trainer,
    draw_classification,
)
from perf_vit.transforms import InputCheck, without_tiny
from perf_vit.workflows.progress import show, windows_progress
from perf_vit.workflows.reports import image_tables, write_image_report
from perf_vit.workflows.run_config import ClassificationRun, RegressionRun
from perf_vit.workflows.run_folder import RunFolder

__all__ = ["evaluate_classifier", "report_classifier", "train_classifier"]


def train_classifier(config: ClassificationRun | RegressionRun, *, progress: bool = True) -> Path:
    """Train a classifier of images and leave checkpoints, metrics, curves and the resolved config in the run folder.

    Everything is opened and built before the folder is touched, so a wrong argument leaves nothing behind.

    Returns:
        The best checkpoint: by F1, mean over the classes, or by R2, mean over the targets.

    Raises:
        PerfVitError: a config, input or output that doesn't fit.
    """
    run = RunFolder(config)
    data = build_classification_datamodule(config.data, config.seed)
    task = ClassificationTask(config.model, _spec(config, data), config.optim)
    is_regression = isinstance(config, RegressionRun)
    trainer = build_trainer(
        config.trainer,
        run.path,
        progress=progress,
        monitor=REGRESSION_MONITOR if is_regression else CLASSIFICATION_MONITOR,
        curves=REGRESSION_CURVES if is_regression else CLASSIFICATION_CURVES,
        draw=draw_classification,
        seed=config.seed,
    )
    run.fit(trainer, task, data)
    return run.best


def report_classifier(
    checkpoint: Path, images: Path, labels: Path | None, report: Path | None, options: ClassificationPredictOptions
) -> None:
    """Write a network's scores on labelled images, with pictures of confusion and precision, and print them."""
    scores = evaluate_classifier(checkpoint, images, labels, options)
    if report is not None:
        write_image_report(scores, report)
    show(*image_tables(scores, title=f"{images.name} against {labels.name if labels else 'its folders'}"))


def evaluate_classifier(
    checkpoint: Path,
    images: Path,
    labels: Path | None,
    options: ClassificationPredictOptions | None = None,
) -> ClassificationScores | RegressionScores:
    """Score a network on labelled images.

    Args:
        checkpoint: that `perf-vit train` wrote.
        images: a folder.
        labels: a CSV file as in training; None for folders by class.
        options: of the prediction.

    Raises:
        PerfVitError: labels or images that can't be read or don't fit.
    """
    predictor = ClassificationPredictor(checkpoint, options or ClassificationPredictOptions())
    spec = predictor.model.spec
    split = ClassificationSplitConfig(image=str(images), labels=None if labels is None else str(labels))
    columns = dict(spec.label_options)
    if spec.kind == "regression":
        config: Any = RegressionDataConfig(train=split, targets=list(spec.classes), **columns)
        labelled = read_image_targets(config, split)
    else:
        config = ClassificationDataConfig(train=split, multilabel=spec.kind == "multilabel", **columns)
        labelled = read_image_targets(config, split, names=spec.classes, allow_missing=True)
    images_seen = ClassificationImages(labelled, partial(spec.open, check=InputCheck(spec.trained_on)))
    views = ClassificationViews(images_seen, spec.normalizer, tile_px=spec.tile_px, resize=spec.resize)
    metrics = ClassificationMetrics(spec.classes, spec.kind)
    size = predictor.options.batch_size
    with windows_progress(f"evaluating {images.name}", "images") as on_image:
        for start in range(0, len(views), size):
            stop = min(start + size, len(views))
            tiles, targets, valid = collate_tiles([views[index] for index in range(start, stop)])
            metrics.update(predictor.scores(tiles, valid), targets)
            on_image(stop, len(views))
    return metrics.summary(with_curves=True)


def _spec(config: ClassificationRun | RegressionRun, data: ClassificationDataModule) -> ClassificationSpec:
    given = config.data
    if isinstance(given, RegressionDataConfig):
        numbers = torch.as_tensor(data.train.images.labelled.targets)
        std = numbers.std(0, correction=0)
        floor = numbers.abs().amax(0) * torch.finfo(torch.float32).eps
        return ClassificationSpec.from_data_config(
            given,
            data,
            classes=data.names,
            kind="regression",
            target_mean=tuple(numbers.mean(0).tolist()),
            target_std=without_tiny(std.tolist(), floor.tolist(), [f"the target {name}" for name in data.names]),
            label_options={"image_column": given.image_column},
        )
    return ClassificationSpec.from_data_config(
        given,
        data,
        classes=data.names,
        kind="multilabel" if given.multilabel else "single_label",
        label_options={"image_column": given.image_column, "label_column": given.label_column},
    )
