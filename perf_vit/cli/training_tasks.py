"""`perf-vit train`: which task a config is of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from perf_vit.cli.detecting import train_detector
from perf_vit.cli.schemas import DetectionRun, SegmentationRun
from perf_vit.cli.training import train_segmentation
from perf_vit.config import config_value, load_config
from perf_vit.errors import ConfigError

__all__ = ["train_from_config"]


def train_from_config(config: str, overrides: Sequence[str]) -> Path:
    """Train what the config's key `task` says: segmentation, also without the key, or detection.

    Returns:
        The best checkpoint.

    Raises:
        PerfVitError: a config, input or output that doesn't fit.
    """
    task = config_value(config, "task", overrides, "segmentation")
    if task == "detection":
        return train_detector(load_config(config, DetectionRun, overrides))
    if task == "segmentation":
        return train_segmentation(load_config(config, SegmentationRun, overrides))
    raise ConfigError(f"task must be segmentation or detection, got {task}")
