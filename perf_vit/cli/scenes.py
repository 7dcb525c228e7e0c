"""Networks that say one thing of a whole image, on the command line: train, predict, evaluate."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from perf_vit.cli.console import show, windows_progress
from perf_vit.cli.image_reports import image_tables, write_image_report
from perf_vit.cli.run_folder import RunFolder
from perf_vit.cli.schemas import ClassificationRun, RegressionRun
from perf_vit.data import (
    ClassificationDataConfig,
    ImageSplitConfig,
    RegressionDataConfig,
    SceneDataModule,
    SceneImages,
    SceneViews,
    build_scene_datamodule,
    collate_tiles,
    read_image_targets,
)
from perf_vit.inference import ClassificationPredictOptions, ClassificationPredictor
from perf_vit.models import ClassifierSpec
from perf_vit.tasks import (
    CLASSIFICATION_CURVES,
    CLASSIFICATION_MONITOR,
    REGRESSION_CURVES,
    REGRESSION_MONITOR,
    ClassificationScores,
    ImageMetrics,
    RegressionScores,
    SceneTask,
    build_trainer,
    draw_scene,
)
from perf_vit.transforms import InputCheck, without_tiny

__all__ = ["evaluate_scenes", "report_scenes", "train_scenes"]


def train_scenes(config: ClassificationRun | RegressionRun, *, progress: bool = True) -> Path:
    """Train a classifier of images and leave checkpoints, metrics, curves and the resolved config in the run folder.

    Everything is opened and built before the folder is touched, so a wrong argument leaves nothing behind.

    Returns:
        The best checkpoint: by F1, mean over the classes, or by R2, mean over the numbers.

    Raises:
        PerfVitError: a config, input or output that doesn't fit.
    """
    run = RunFolder(config)
    data = build_scene_datamodule(config.data, config.seed)
    task = SceneTask(config.model, _spec(config, data), config.optim)
    is_regression = isinstance(config, RegressionRun)
    trainer = build_trainer(
        config.trainer,
        run.path,
        progress=progress,
        monitor=REGRESSION_MONITOR if is_regression else CLASSIFICATION_MONITOR,
        curves=REGRESSION_CURVES if is_regression else CLASSIFICATION_CURVES,
        draw=draw_scene,
        seed=config.seed,
    )
    run.fit(trainer, task, data)
    return run.best


def report_scenes(
    checkpoint: Path, images: Path, labels: Path | None, report: Path | None, options: ClassificationPredictOptions
) -> None:
    """Write a network's scores on labelled images, with pictures of confusion and precision, and print them."""
    scores = evaluate_scenes(checkpoint, images, labels, options)
    if report is not None:
        write_image_report(scores, report)
    show(*image_tables(scores, title=f"{images.name} against {labels.name if labels else 'its folders'}"))


def evaluate_scenes(
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
    split = ImageSplitConfig(image=str(images), labels=None if labels is None else str(labels))
    columns = dict(spec.label_options)
    if spec.kind == "regression":
        config: Any = RegressionDataConfig(train=split, targets=list(spec.classes), **columns)
        labelled = read_image_targets(config, split)
    else:
        config = ClassificationDataConfig(train=split, multilabel=spec.kind == "multilabel", **columns)
        labelled = read_image_targets(config, split, names=spec.classes, allow_missing=True)
    images_seen = SceneImages(labelled, partial(spec.open, check=InputCheck(spec.trained_on)))
    views = SceneViews(images_seen, spec.normalizer, tile_px=spec.tile_px, resize=spec.resize)
    metrics = ImageMetrics(spec.classes, spec.kind)
    size = predictor.options.batch_size
    with windows_progress(f"evaluating {images.name}", "images") as on_image:
        for start in range(0, len(views), size):
            stop = min(start + size, len(views))
            tiles, targets, valid = collate_tiles([views[index] for index in range(start, stop)])
            metrics.update(predictor.scores(tiles, valid), targets)
            on_image(stop, len(views))
    return metrics.summary(with_curves=True)


def _spec(config: ClassificationRun | RegressionRun, data: SceneDataModule) -> ClassifierSpec:
    given = config.data
    if isinstance(given, RegressionDataConfig):
        numbers = torch.as_tensor(data.train.images.labelled.targets)
        std = numbers.std(0, correction=0)
        floor = numbers.abs().amax(0) * torch.finfo(torch.float32).eps
        return ClassifierSpec.from_data_config(
            given,
            data,
            classes=data.names,
            kind="regression",
            target_mean=tuple(numbers.mean(0).tolist()),
            target_std=without_tiny(std.tolist(), floor.tolist(), [f"the number {name}" for name in data.names]),
            label_options={"image_column": given.image_column},
        )
    return ClassifierSpec.from_data_config(
        given,
        data,
        classes=data.names,
        kind="multilabel" if given.multilabel else "single_label",
        label_options={"image_column": given.image_column, "label_column": given.label_column},
    )
