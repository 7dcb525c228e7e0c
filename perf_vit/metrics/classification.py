"""Scores of networks that say one thing of a whole image or slide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional import mean_absolute_error, mean_squared_error
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_f1_score,
    binary_precision,
    binary_precision_recall_curve,
    binary_recall,
    multiclass_confusion_matrix,
)
from torchmetrics.utilities import dim_zero_cat

from perf_vit.metrics.plots import PrecisionRecall
from perf_vit.models import ImageLabelKind
from perf_vit.text import without_nan

__all__ = ["ClassificationMetrics", "ClassificationScores", "ImageClassScores", "RegressionScores", "TargetScores"]


@dataclass(frozen=True, slots=True)
class ImageClassScores:
    """Scores of one class; 0 to 1, NaN where they have no meaning: of AUROC, where all or no images are of it.

    `auroc` and `average_precision` are areas under the ROC and the precision-recall curve, against all other classes.
    """

    name: str
    f1: float
    precision: float
    recall: float
    auroc: float
    average_precision: float
    num_images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationScores:
    """Scores of a classifier.

    Attributes:
        accuracy: share of images whose class is right; with several classes an image, mean over images and classes.
        f1: mean over the classes that occur in labels or predictions.
        auroc: mean over the classes that have it.
        classes: one a class.
        confusion: images by true class and predicted one, [K][K]; None with several classes an image.
        precision_recall: precision and recall of each class over its thresholds, where they were asked for.
    """

    accuracy: float
    f1: float
    auroc: float
    classes: tuple[ImageClassScores, ...]
    confusion: list[list[int]] | None
    precision_recall: tuple[PrecisionRecall, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values but for the curves, NaN as None, for JSON."""
        values = asdict(replace(self, precision_recall=None))
        del values["precision_recall"]
        return dict(without_nan(values))

    def overall(self) -> dict[str, float]:
        """Names and values for logs."""
        return {"accuracy": self.accuracy, "f1": self.f1, "auroc": self.auroc}


@dataclass(frozen=True, slots=True)
class TargetScores:
    """Errors of one number, in its unit, and the share of its variance that is explained, NaN if it has none."""

    name: str
    mae: float
    rmse: float
    r2: float
    num_images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RegressionScores:
    """Scores of a regression network.

    Attributes:
        r2: mean over the targets that have it.
        targets: one entry a target.
    """

    r2: float
    targets: tuple[TargetScores, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, NaN as None, for JSON."""
        return dict(without_nan(asdict(self)))

    def overall(self) -> dict[str, float]:
        """Names and values for logs."""
        count = len(self.targets)
        return {
            "r2": self.r2,
            "mae": sum(target.mae for target in self.targets) / count,
            "rmse": sum(target.rmse for target in self.targets) / count,
        }


class ClassificationMetrics(Metric):
    """Collects scores and targets over batches and processes.

    Args:
        names: of the classes or targets.
        kind: what the targets are.
    """

    full_state_update = False
    scores: list[Tensor]
    targets: list[Tensor]

    def __init__(self, names: Sequence[str], kind: ImageLabelKind) -> None:
        super().__init__()
        self.names = tuple(names)
        self.kind = kind
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("targets", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            scores: probabilities or targets, [B, K].
            targets: class indices, [B]; or 0 and 1, or regression targets, [B, K].
        """
        self.scores.append(scores.detach().float())
        self.targets.append(targets.detach())

    def compute(self) -> tuple[Tensor, Tensor]:
        """All scores and targets so far, of all processes."""
        return dim_zero_cat(self.scores), dim_zero_cat(self.targets)

    def summary(self, *, with_curves: bool = False) -> ClassificationScores | RegressionScores:
        """What all images so far come to; of classes, with precision and recall over all thresholds if asked for."""
        scores, targets = self.compute()
        # torchmetrics gives a single number without its axes.
        scores = scores.reshape(-1, len(self.names))
        if self.kind == "regression":
            return _number_scores(scores, targets.reshape(scores.shape), self.names)
        if self.kind == "multilabel":
            return _class_scores(
                scores, targets.reshape(scores.shape), self.names, single=False, with_curves=with_curves
            )
        return _class_scores(scores, targets.reshape(-1), self.names, single=True, with_curves=with_curves)


def _class_scores(
    scores: Tensor, targets: Tensor, names: Sequence[str], *, single: bool, with_curves: bool
) -> ClassificationScores:
    count = len(names)
    if single:
        predicted = torch.nn.functional.one_hot(scores.argmax(1), count)
        truth = torch.nn.functional.one_hot(targets, count)
    else:
        predicted, truth = (scores > 0.5).long(), targets.long()
    classes = [_one_class(name, scores[:, i], predicted[:, i], truth[:, i]) for i, name in enumerate(names)]
    right = predicted == truth
    confusion = multiclass_confusion_matrix(scores.argmax(1), targets, count).tolist() if single else None
    return ClassificationScores(
        accuracy=(right.all(1) if single else right).float().mean().item(),
        f1=_mean_of_known([each.f1 for each in classes]),
        auroc=_mean_of_known([each.auroc for each in classes]),
        classes=tuple(classes),
        confusion=confusion,
        precision_recall=tuple(map(_curve, scores.T, truth.T)) if with_curves else None,
    )


def _curve(scores: Tensor, truth: Tensor) -> PrecisionRecall:
    precision, recall, _ = binary_precision_recall_curve(scores, truth)
    return precision.cpu().numpy(), recall.cpu().numpy()


def _one_class(name: str, scores: Tensor, predicted: Tensor, truth: Tensor) -> ImageClassScores:
    positives = int(truth.sum())
    occurs = positives + int(predicted.sum()) > 0
    f1, precision, recall = (
        score(predicted, truth).item() if occurs else math.nan
        for score in (binary_f1_score, binary_precision, binary_recall)
    )
    auroc = binary_auroc(scores, truth).item() if 0 < positives < len(truth) else math.nan
    area = binary_average_precision(scores, truth).item() if positives else math.nan
    return ImageClassScores(name, f1, precision, recall, auroc, area, positives)


def _number_scores(values: Tensor, targets: Tensor, names: Sequence[str]) -> RegressionScores:
    found = []
    for index, name in enumerate(names):
        # In float64: squares of large numbers lose the errors.
        value, target = values[:, index].double().contiguous(), targets[:, index].double().contiguous()
        mse = mean_squared_error(value, target).item()
        variance = target.var(correction=0).item()
        r2 = 1 - mse / variance if variance > 0 else math.nan
        mae = mean_absolute_error(value, target).item()
        found.append(TargetScores(name, mae, math.sqrt(mse), r2, len(target)))
    return RegressionScores(r2=_mean_of_known([each.r2 for each in found]), targets=tuple(found))


def _mean_of_known(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
