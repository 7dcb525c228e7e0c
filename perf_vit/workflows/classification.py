"""Image classification and regression: training and evaluation."""

from __future__ import annotations

import warnings
from contextlib import closing
from functools import partial
from itertools import islice
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
    read_image_targets,
)
from perf_vit.errors import DataWarning
from perf_vit.finite import check_finite
from perf_vit.inference import ClassificationPredictOptions, ClassificationPredictor
from perf_vit.inference.prefetch import load_ahead
from perf_vit.labels.tables import ImageTargets
from perf_vit.metrics import ClassificationMetrics, RegisteredMetrics, RegressionScores
from perf_vit.models import ClassificationSpec, InputCheck, check_not_random, collate_tiles
from perf_vit.reporting import ImageSamples, Sample, text_sample
from perf_vit.tasks import LOSS_MONITOR, ClassificationTask
from perf_vit.transforms import replace_tiny_std
from perf_vit.workflows.progress import windows_progress
from perf_vit.workflows.reports import ClassificationEvaluation, RegressionEvaluation
from perf_vit.workflows.run_config import ClassificationRun, RegressionRun
from perf_vit.workflows.task import EvaluateOptions, TrainedModel

__all__ = ["build_classification_data", "build_classification_task", "evaluate_classification"]


def build_classification_data(config: ClassificationRun | RegressionRun) -> ClassificationDataModule:
    """The data module of a run.

    Raises:
        PerfVitError: A config or input that doesn't fit.
    """
    return build_classification_datamodule(config.data, config.seed)


def build_classification_task(
    config: ClassificationRun | RegressionRun,
    data: ClassificationDataModule,
    task_class: type[ClassificationTask] = ClassificationTask,
) -> ClassificationTask:
    """The Lightning module of a run.

    Args:
        config: Config of the run.
        data: Its data module.
        task_class: Class of the module.

    Raises:
        PerfVitError: A model that doesn't fit.
    """
    check_not_random(config.model)
    task = task_class(config.model, _spec(config, data), config.optim)
    if (reason := _undefined_score(config, data.val.images.labelled.targets)) is not None:
        warnings.warn(
            f"{reason}, so best.ckpt has the lowest val/loss; validate on other images for a score",
            DataWarning,
            stacklevel=2,
        )
        task.monitor = LOSS_MONITOR
    return task


def _undefined_score(config: ClassificationRun | RegressionRun, targets: Any) -> str | None:
    """Why validation targets give every model the same R2 or F1; None if they don't."""
    if isinstance(config.data, RegressionDataConfig):
        is_constant = (targets == targets[0]).all()
        return (
            f"each target has one value in {len(targets)} validation images: R2 is undefined" if is_constant else None
        )
    is_empty = config.data.multilabel and not targets.any()
    return f"none of {len(targets)} validation images has a class: F1 is undefined" if is_empty else None


def evaluate_classification(
    model: TrainedModel, images: Path, labels: Path | None, options: EvaluateOptions
) -> ClassificationEvaluation | RegressionEvaluation:
    """Score a classifier or regression network on labelled images.

    Args:
        model: A model or its checkpoint.
        images: A folder.
        labels: A CSV file as in training; None for folders by class.
        options: Options of the evaluation.

    Raises:
        PerfVitError: Labels or images can't be read or don't fit.
    """
    predictor = ClassificationPredictor(model, options.for_prediction(ClassificationPredictOptions))  # type: ignore[arg-type]
    spec = predictor.model.spec
    labelled = _labelled_images(spec, images, labels)
    images_seen = ClassificationImages(labelled, partial(spec.open, check=predictor.check_input))
    views = ClassificationViews(
        images_seen, spec.normalizer, tile_px=spec.tile_px, resize=spec.resize, whole=spec.whole
    )
    metrics = ClassificationMetrics(spec.classes, spec.kind)
    registered = RegisteredMetrics(predictor.model.task, spec)
    readers = predictor.num_readers
    ahead = load_ahead(
        range(len(views)), views.__getitem__, num_threads=readers, depth=2 * options.batch_size + readers
    )
    shown, done = ImageSamples(num=6), 0
    with windows_progress(f"evaluating {images.name}", "images") as on_image, closing(ahead) as samples:
        while batch := list(islice(samples, options.batch_size)):
            tiles, targets, valid = collate_tiles(batch)
            found = predictor.scores(tiles, valid)
            check_finite(found, "scores", labelled.paths[done:].__getitem__)
            metrics.update(found, targets)
            registered.update(found, targets)
            for path, each, target in zip(labelled.paths[done:], found, targets, strict=False):
                shown.offer(*_sample(predictor, path, each, target))
            done += len(batch)
            on_image(done, len(views))
    title = f"{images.name} against {labels.name if labels else 'its folders'}"
    scores = metrics.summary(with_curves=True)
    evaluation: ClassificationEvaluation | RegressionEvaluation
    if isinstance(scores, RegressionScores):
        evaluation = RegressionEvaluation(scores, title=title, registered=registered)
    else:
        evaluation = ClassificationEvaluation(scores, title=title, registered=registered)
    evaluation.samples = shown
    return evaluation


def _labelled_images(spec: ClassificationSpec, images: Path, labels: Path | None) -> ImageTargets:
    """Read labels with the columns that the model was trained on."""
    split = ClassificationSplitConfig(image=str(images), labels=None if labels is None else str(labels))
    columns = dict(spec.label_options)
    if spec.kind == "regression":
        numbers = RegressionDataConfig(train=split, targets=list(spec.classes), **columns)
        return read_image_targets(numbers, split)
    config = ClassificationDataConfig(train=split, multilabel=spec.kind == "multilabel", **columns)
    return read_image_targets(config, split, names=spec.classes, allow_missing=True)


def _sample(predictor: ClassificationPredictor, path: str, found: torch.Tensor, target: Any) -> tuple[float, Sample]:
    """Score of an image, higher for better, and its picture with truth and prediction."""
    spec = predictor.model.spec
    if spec.kind == "single_label":
        best, true = int(found.argmax()), int(target)
        score = float(found[true])
        said = f"{spec.classes[best]} {float(found[best]):.2f}, true {spec.classes[true]} {score:.2f}"
    else:
        score = -float((found - torch.as_tensor(target)).abs().mean())
        pairs = zip(spec.classes, found.tolist(), torch.as_tensor(target).tolist(), strict=True)
        said = "; ".join(f"{name} {value:.4g}, true {truth:.4g}" for name, value, truth in pairs)
    return score, text_sample(f"{said}: {Path(path).name}", partial(spec.open, path, check=InputCheck(None)))


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
            whole=data.val.whole,
            target_mean=tuple(numbers.mean(0).tolist()),
            target_std=replace_tiny_std(std.tolist(), floor.tolist(), [f"the target {name}" for name in data.names]),
            label_options={"image_column": given.image_column},
        )
    return ClassificationSpec.from_data_config(
        given,
        data,
        classes=data.names,
        kind="multilabel" if given.multilabel else "single_label",
        label_options={"image_column": given.image_column, "label_column": given.label_column},
    )
