"""Registry of metrics that training and evaluation compute beside the built-in ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torchmetrics import Metric

from perf_vit.errors import ConfigError
from perf_vit.models.input_spec import TaskSpec
from perf_vit.registry import Registry

__all__ = ["METRICS", "RegisteredMetrics", "register_metric"]

MakeMetric = Callable[[Any], Metric]
F = TypeVar("F", bound=MakeMetric)

METRICS: Registry[MakeMetric] = Registry("metric")
"""Functions that make a metric from a model's spec, by "task/name"."""

# Names that tasks log themselves.
_BUILT_IN = frozenset(
    {
        *("accuracy", "ap", "ap50", "ap75", "auroc", "f1", "iou", "log_likelihood", "loss", "mae", "negative_loss"),
        *("r2", "recall", "rmse"),
    }
)


def register_metric(task: str, name: str) -> Callable[[F], F]:
    """Decorate a function that makes a torchmetrics `Metric` from a model's spec, for validation and evaluation.

    The metric's `update` gets class indices of pixels and labels, both [B, H, W] (segmentation; 0 and 1 of each class,
    [B, K, H, W], with `multilabel`), scores [B, K] and targets (classification, regression, slide_classification), or
    lists of `Detections` and `ObjectLabels` (detection). Its `compute` returns one number, or one a class. Both are
    logged as "val/NAME" and written to `metrics.csv` and to the JSON file of `evaluate`.

    Args:
        task: Name of the task.
        name: Name of the metric in files and logs.

    Raises:
        ValueError: If the name is taken.
    """
    if name in _BUILT_IN:
        raise ValueError(f"metric {name!r} is a built-in one; use another name")
    return METRICS.register(f"{task}/{name}")


class RegisteredMetrics(nn.Module):
    """The registered metrics of a task.

    Args:
        task: Name of the task.
        spec: Spec of the model.
    """

    def __init__(self, task: str, spec: TaskSpec) -> None:
        super().__init__()
        self.classes = spec.classes
        made = {key.removeprefix(f"{task}/"): METRICS[key] for key in METRICS if key.startswith(f"{task}/")}
        self.names = list(made)
        self.metrics = nn.ModuleList(make(spec) for make in made.values())

    def update(self, predicted: Any, labels: Any) -> None:
        """Update with a batch of predictions and labels."""
        for metric in self.metrics:
            metric.update(predicted, labels)  # type: ignore[operator]

    def compute(self) -> dict[str, float]:
        """Return values by name: NAME, the mean of the known values of classes, and NAME/CLASS.

        Raises:
            ConfigError: If a metric returns something else than a number, or a number a class.
        """
        values: dict[str, float] = {}
        for name, metric in zip(self.names, self.metrics, strict=True):
            values |= self._named(name, metric.compute())  # type: ignore[operator]
        return values

    def reset(self) -> None:
        """Forget all batches."""
        for metric in self.metrics:
            metric.reset()  # type: ignore[operator]

    def _named(self, name: str, value: Any) -> dict[str, float]:
        # `compute` may return a plain number.
        numbers = torch.as_tensor(value).flatten().tolist()
        if len(numbers) == 1:
            return {name: numbers[0]}
        if len(numbers) != len(self.classes):
            raise ConfigError(
                f"metric {name} must return one number or one a class, {len(self.classes)}, got {len(numbers)}"
            )
        known = [number for number in numbers if not math.isnan(number)]
        by_class = {f"{name}/{each}": number for each, number in zip(self.classes, numbers, strict=True)}
        return {name: sum(known) / len(known) if known else math.nan, **by_class}
