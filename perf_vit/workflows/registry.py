"""`perf-vit train`: which task a config is of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from perf_vit.config import config_value, load_config
from perf_vit.errors import ConfigError
from perf_vit.workflows.classification import train_classifier
from perf_vit.workflows.detection import train_detector
from perf_vit.workflows.run_config import (
    ClassificationRun,
    DetectionRun,
    RegressionRun,
    SegmentationRun,
    SlideClassificationRun,
)
from perf_vit.workflows.run_folder import check_config_kept
from perf_vit.workflows.segmentation import train_segmenter
from perf_vit.workflows.slide_classification import train_slide_classifier

__all__ = ["TRAINING_TASKS", "train_from_config"]

TRAINING_TASKS: dict[str, tuple[type, Callable[[Any], Path]]] = {
    "segmentation": (SegmentationRun, train_segmenter),
    "detection": (DetectionRun, train_detector),
    "classification": (ClassificationRun, train_classifier),
    "regression": (RegressionRun, train_classifier),
    "slide_classification": (SlideClassificationRun, train_slide_classifier),
}
"""Of each task, the schema of its configs and what trains it."""


def train_from_config(config: str, overrides: Sequence[str]) -> Path:
    """Train what the config's key `task` says, segmentation without the key.

    Returns:
        The best checkpoint.

    Raises:
        PerfVitError: a config, input or output that doesn't fit.
    """
    task = config_value(config, "task", overrides, "segmentation")
    if task not in TRAINING_TASKS:
        raise ConfigError(f"task must be one of {', '.join(TRAINING_TASKS)}, got {task}")
    schema, train = TRAINING_TASKS[task]
    run: Any = load_config(config, schema, overrides)
    check_config_kept(config, run)
    return train(run)
