"""The registry of tasks: one entry a task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from perf_vit.config import ConfigKey, config_keys, config_value, given_keys, json_schema, shipped_configs
from perf_vit.errors import ConfigError, extra
from perf_vit.registry import Registry, did_you_mean

with extra("train", __name__):
    from perf_vit.inference import (
        ClassificationPredictOptions,
        ClassificationPredictor,
        DetectionPredictOptions,
        DetectionPredictor,
        SegmentationPredictOptions,
        SegmentationPredictor,
        SlideClassificationPredictOptions,
        SlideClassificationPredictor,
    )
    from perf_vit.inference.predictor import PREDICTORS, register_predictor
    from perf_vit.models import NETWORKS, register_network
    from perf_vit.tasks import (
        CLASSIFICATION_CURVES,
        CLASSIFICATION_MONITOR,
        DETECTION_CURVES,
        DETECTION_MONITOR,
        REGRESSION_CURVES,
        REGRESSION_MONITOR,
        SLIDE_CURVES,
        SLIDE_MONITOR,
        draw_classification,
        draw_objects,
        draw_segmentation,
    )
    from perf_vit.tasks.callbacks import SEGMENTATION_CURVES
    from perf_vit.workflows.classification import (
        build_classification_data,
        build_classification_task,
        evaluate_classification,
    )
    from perf_vit.workflows.detection import (
        DetectionEvaluateOptions,
        build_detection_data,
        build_detection_task,
        detection_steps,
        evaluate_detection,
    )
    from perf_vit.workflows.load import task_name
    from perf_vit.workflows.reports import (
        ClassificationEvaluation,
        DetectionEvaluation,
        RegressionEvaluation,
        SegmentationEvaluation,
    )
    from perf_vit.workflows.reports.tile_scores import ClassificationTiles, DetectionTiles, SegmentationTiles
    from perf_vit.workflows.run_config import (
        ClassificationRun,
        DetectionRun,
        DistillationRun,
        RegressionRun,
        SegmentationRun,
        SlideClassificationRun,
    )
    from perf_vit.workflows.segmentation import (
        SegmentationEvaluateOptions,
        build_segmentation_data,
        build_segmentation_task,
        evaluate_segmentation,
        segmentation_steps,
    )
    from perf_vit.workflows.slide_classification import (
        SlideClassificationEvaluateOptions,
        build_slide_data,
        build_slide_task,
        evaluate_slide_classification,
        prepare_slides,
    )
    from perf_vit.workflows.task import EvaluateOptions, Task

__all__ = ["TASKS", "config_schema", "config_schemas", "register_task", "task_keys", "task_of"]

TASKS: Registry[Task] = Registry("task", ConfigError)
"""Tasks by name."""


def register_task(task: Task) -> None:
    """Register a task: configs, checkpoints, Python calls and the command line know its name.

    Args:
        task: The task.

    Raises:
        ValueError: If the name is taken.
    """
    TASKS.add(task.name, task)
    if task.name not in NETWORKS:
        register_network(task.name, task.network)
    if task.name not in PREDICTORS:
        register_predictor(task.name, task.predictor, task.predict_options)


def config_schemas() -> dict[str, type[Any]]:
    """The dataclasses of configs, by the value of the key `task`: of all tasks, and of distillation."""
    return {**{name: task.run_config for name, task in TASKS.items()}, "distillation": DistillationRun}


def config_schema() -> dict[str, Any]:
    """A JSON schema of configs of all tasks, for editors."""
    return json_schema(config_schemas(), "segmentation")


def task_keys(task: str, *, usual: bool = False) -> list[ConfigKey]:
    """The config keys of a task with type, default and meaning.

    Args:
        task: Name of a task, or "distillation".
        usual: Leave out keys that are neither required nor set by a shipped config of the task.

    Raises:
        ConfigError: There is no such task.
    """
    schemas = config_schemas()
    if task not in schemas:
        raise ConfigError(f"task must be one of {', '.join(schemas)}, got {task!r}{did_you_mean(task, schemas)}")
    keys = config_keys(schemas[task])
    if not usual:
        return keys
    shipped = [name for name in shipped_configs() if config_value(name, "task") == task]
    given = {key for name in shipped for key in given_keys(name)}
    return [key for key in keys if key.default is None or key.name in given]


def task_of(model: nn.Module | str | Path) -> Task:
    """The task of a model, or of its checkpoint; any other network is one of segmentation.

    Raises:
        CheckpointError: It can't be read, or holds a backbone without a task.
    """
    return TASKS[task_name(model)]


register_task(
    Task(
        name="segmentation",
        network=NETWORKS["segmentation"],
        run_config=SegmentationRun,
        build_data=build_segmentation_data,
        build_module=build_segmentation_task,
        monitor="val/iou",
        curves=SEGMENTATION_CURVES,
        tile_scores=SegmentationTiles,
        draw=draw_segmentation,
        training_steps=segmentation_steps,
        predictor=SegmentationPredictor,
        predict_options=SegmentationPredictOptions,
        evaluate=evaluate_segmentation,
        evaluate_options=SegmentationEvaluateOptions,
        evaluation=SegmentationEvaluation,
    )
)
register_task(
    Task(
        name="detection",
        network=NETWORKS["detection"],
        run_config=DetectionRun,
        build_data=build_detection_data,
        build_module=build_detection_task,
        monitor=DETECTION_MONITOR,
        curves=DETECTION_CURVES,
        tile_scores=DetectionTiles,
        draw=draw_objects,
        training_steps=detection_steps,
        predictor=DetectionPredictor,
        predict_options=DetectionPredictOptions,
        evaluate=evaluate_detection,
        evaluate_options=DetectionEvaluateOptions,
        evaluation=DetectionEvaluation,
    )
)
register_task(
    Task(
        name="classification",
        network=NETWORKS["classification"],
        run_config=ClassificationRun,
        build_data=build_classification_data,
        build_module=build_classification_task,
        monitor=CLASSIFICATION_MONITOR,
        curves=CLASSIFICATION_CURVES,
        tile_scores=ClassificationTiles,
        draw=draw_classification,
        predictor=ClassificationPredictor,
        predict_options=ClassificationPredictOptions,
        evaluate=evaluate_classification,
        evaluate_options=EvaluateOptions,
        evaluation=ClassificationEvaluation,
        needs_labels=False,
    )
)
register_task(
    replace(
        TASKS["classification"],
        name="regression",
        network=NETWORKS["regression"],
        run_config=RegressionRun,
        monitor=REGRESSION_MONITOR,
        curves=REGRESSION_CURVES,
        evaluation=RegressionEvaluation,
    )
)
register_task(
    Task(
        name="slide_classification",
        network=NETWORKS["slide_classification"],
        run_config=SlideClassificationRun,
        build_data=build_slide_data,
        build_module=build_slide_task,
        prepare_data=prepare_slides,
        monitor=SLIDE_MONITOR,
        curves=SLIDE_CURVES,
        predictor=SlideClassificationPredictor,
        predict_options=SlideClassificationPredictOptions,
        evaluate=evaluate_slide_classification,
        evaluate_options=SlideClassificationEvaluateOptions,
        evaluation=ClassificationEvaluation,
    )
)
