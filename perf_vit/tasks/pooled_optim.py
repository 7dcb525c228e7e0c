"""How classifiers of images and slides are optimised."""

from __future__ import annotations

from dataclasses import dataclass

from perf_vit.errors import ConfigError
from perf_vit.tasks.optimize import OptimizerConfig

__all__ = ["ClassificationOptimConfig", "check_classification_loss"]


@dataclass(kw_only=True)
class ClassificationOptimConfig(OptimizerConfig):
    """Optimizer, schedule and loss.

    Attributes:
        label_smoothing: share of the target that all classes have in common.
        class_weights: one factor a class in the loss of classes.
    """

    lr: float = 5e-4
    label_smoothing: float = 0.0
    class_weights: list[float] | None = None


def check_classification_loss(config: ClassificationOptimConfig, num_classes: int) -> None:
    """Refuse values that no training can go with.

    Raises:
        ConfigError: smoothing out of range, or another number of weights than of classes.
    """
    if not 0 <= config.label_smoothing < 1:
        raise ConfigError(f"expected optim.label_smoothing from 0 to below 1, got {config.label_smoothing:g}")
    if config.class_weights is not None and len(config.class_weights) != num_classes:
        raise ConfigError(
            f"optim.class_weights must give one weight a class, got {len(config.class_weights)} for {num_classes}"
        )
