"""Metrics of image and slide classification and of regression."""

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
    """Scores of one class against all others, from 0 to 1; NaN where undefined.

    Attributes:
        name: Class name.
        f1: F1 score.
        precision: Precision.
        recall: Recall.
        auroc: Area under the ROC curve; NaN if all or no images have the class.
        average_precision: Area under the precision-recall curve.
        num_images: Number of images of the class.
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
        accuracy: Share of images classified correctly; for multi-label classification the mean over images and classes.
        f1: Mean F1 over the classes that occur in labels or predictions.
        auroc: Mean AUROC over the classes where it is defined.
        classes: Scores per class.
        confusion: Image counts, rows true and columns predicted classes, [K][K]; None for multi-label classification.
        precision_recall: Precision-recall curve per class; None unless requested.
    """

    accuracy: float
    f1: float
    auroc: float
    classes: tuple[ImageClassScores, ...]
    confusion: list[list[int]] | None
    precision_recall: tuple[PrecisionRecall, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the scores without the curves as plain values for JSON, NaN as None."""
        values = asdict(replace(self, precision_recall=None))
        del values["precision_recall"]
        return dict(without_nan(values))

    def overall(self) -> dict[str, float]:
        """Return the overall scores by name, for logging."""
        return {"accuracy": self.accuracy, "f1": self.f1, "auroc": self.auroc}


@dataclass(frozen=True, slots=True)
class TargetScores:
    """Errors of one regression target.

    Attributes:
        name: Target name.
        mae: Mean absolute error in units of the target.
        rmse: Root mean squared error in units of the target.
        r2: Coefficient of determination; NaN if the target has no variance.
        num_images: Number of images.
    """

    name: str
    mae: float
    rmse: float
    r2: float
    num_images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RegressionScores:
    """Scores of a regression network.

    Attributes:
        r2: Mean R2 over the targets where it is defined.
        targets: Scores per target.
    """

    r2: float
    targets: tuple[TargetScores, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as plain values for JSON, NaN as None."""
        return dict(without_nan(asdict(self)))

    def overall(self) -> dict[str, float]:
        """Return the mean scores over targets by name, for logging."""
        count = len(self.targets)
        return {
            "r2": self.r2,
            "mae": sum(target.mae for target in self.targets) / count,
            "rmse": sum(target.rmse for target in self.targets) / count,
        }


class ClassificationMetrics(Metric):
    """Scores and targets collected over batches and processes.

    Args:
        names: Names of the K classes or targets.
        kind: Kind of label: single_label, multilabel or regression.
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
            scores: Class probabilities or predicted targets, [B, K].
            targets: Class indices, [B]; 0 and 1 per class (multilabel) or regression targets, [B, K].
        """
        self.scores.append(scores.detach().float())
        self.targets.append(targets.detach())

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return the scores and targets of all batches and processes."""
        return dim_zero_cat(self.scores), dim_zero_cat(self.targets)

    def summary(self, *, with_curves: bool = False) -> ClassificationScores | RegressionScores:
        """Compute the scores of all batches, for classes with precision-recall curves if requested."""
        scores, targets = self.compute()
        # torchmetrics drops the axes of a single value.
        scores = scores.reshape(-1, len(self.names))
        if self.kind == "regression":
            return _target_scores(scores, targets.reshape(scores.shape), self.names)
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


def _target_scores(values: Tensor, targets: Tensor, names: Sequence[str]) -> RegressionScores:
    found = []
    for index, name in enumerate(names):
        # float64, as squares of large targets lose small errors in float32.
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
