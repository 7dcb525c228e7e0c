"""Evaluations of the tasks: scores as rows, JSON, tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor

from perf_vit.metrics import (
    FROC_RATES,
    ClassificationScores,
    ClassScores,
    DetectionConfusion,
    DetectionMetrics,
    DetectionScores,
    Froc,
    OrientedAveragePrecision,
    PanopticQuality,
    RegisteredMetrics,
    RegressionScores,
    SegmentationCurves,
    class_scores,
    plot_precision_recall,
    save_confusion_matrix,
    save_precision_recall,
    segmentation_metrics,
)
from perf_vit.text import without_nan
from perf_vit.types import Detections, LabelArray, ObjectLabels
from perf_vit.workflows.progress import detection_table, digits, mean_over_present, new_table, score_table
from perf_vit.workflows.task import Evaluation

__all__ = ["ClassificationEvaluation", "DetectionEvaluation", "RegressionEvaluation", "SegmentationEvaluation"]


class SegmentationEvaluation(Evaluation):
    """Scores of the pixels of maps that are given part by part.

    Args:
        classes: Names, in the order of the class indices.
        multilabel: Whether a pixel may have several classes.
        title: What was scored against what.
        registered: Registered metrics.
    """

    pictures = ("", "_confusion")
    captions = MappingProxyType({"": "precision and recall", "_confusion": "confusion matrix"})

    def __init__(
        self,
        classes: Sequence[str],
        *,
        multilabel: bool = False,
        title: str = "scores",
        registered: RegisteredMetrics | None = None,
    ) -> None:
        super().__init__(title, registered)
        self.classes = tuple(classes)
        self.curves = SegmentationCurves(classes, multilabel=multilabel)
        self._metrics = segmentation_metrics(len(self.classes), multilabel=multilabel)

    def update(self, predicted: Tensor, probabilities: Any, labels: LabelArray) -> None:
        """Update with predictions and ground truth of a part.

        Args:
            predicted: Class indices, [H, W]; with `multilabel`, 0 and 1 per class, [K, H, W].
            probabilities: Class probabilities, [K, H, W].
            labels: Labels in the form of `predicted`; `IGNORE_INDEX` marks pixels to leave out.
        """
        truth = torch.from_numpy(labels).long()[None]
        self._metrics.update(predicted[None], truth)
        if self.registered is not None:
            self.registered.update(predicted[None], truth)
        self.curves.update(probabilities, labels)

    @cached_property
    def scores(self) -> list[ClassScores]:
        """Scores of each class; no further part can be added."""
        return class_scores(self._metrics, self.classes)

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row a class; see `Evaluation.table`."""
        return [asdict(each) for each in self.scores]

    @property
    def headline(self) -> dict[str, str]:
        """Means over the classes that occur."""
        means = {"mean IoU": "iou", "mean F1": "f1"}
        return {name: digits(mean_over_present(self.scores, key)) for name, key in means.items()}

    def builtin_tables(self) -> list[Table]:
        """All built-in scores for people."""
        return [score_table(self.scores, self.title)]

    def builtin_scores(self) -> dict[str, Any]:
        """All built-in scores as plain values of JSON, NaN as None."""
        means = {key: mean_over_present(self.scores, key) for key in ("iou", "f1", "precision", "recall")}
        return {"classes": [each.to_dict() for each in self.scores], "mean": means, **self.curves.to_dict()}

    def plot(self, path: str | Path) -> list[Path]:
        """Write precision-recall curves and, of classes that exclude each other, the confusion matrix."""
        curve, matrix = paths = self.picture_paths(path)
        self.curves.plot(curve)
        if self.curves.confusion is None:
            return paths[:1]
        save_confusion_matrix(self.curves.confusion, self.classes, matrix)
        return paths


class ClassificationEvaluation(Evaluation):
    """Scores of a classifier on images or slides.

    Args:
        scores: Measured scores.
        title: What was scored against what.
        registered: Registered metrics, updated with all inputs.
    """

    pictures = ("", "_precision_recall")
    captions = MappingProxyType({"": "confusion matrix", "_precision_recall": "precision and recall"})

    def __init__(
        self, scores: ClassificationScores, *, title: str = "scores", registered: RegisteredMetrics | None = None
    ) -> None:
        super().__init__(title, registered)
        self.scores = scores

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row a class; see `Evaluation.table`."""
        return [asdict(each) for each in self.scores.classes]

    @property
    def headline(self) -> dict[str, str]:
        """Accuracy, and means over classes."""
        return {"accuracy": digits(self.scores.accuracy), "mean F1": digits(self.scores.f1)}

    def builtin_tables(self) -> list[Table]:
        """All built-in scores for people."""
        return [_classes(self.scores, self.title)]

    def builtin_scores(self) -> dict[str, Any]:
        """All built-in scores as plain values of JSON, NaN as None."""
        return self.scores.to_dict()

    def plot(self, path: str | Path) -> list[Path]:
        """Write the confusion matrix and precision-recall curves; see `Evaluation.plot`."""
        scores = self.scores
        names, written = [each.name for each in scores.classes], []
        matrix, curves = self.picture_paths(path)
        if scores.confusion is not None:
            save_confusion_matrix(scores.confusion, names, matrix)
            written.append(matrix)
        if scores.precision_recall is not None:
            areas = [each.average_precision for each in scores.classes]
            save_precision_recall(names, scores.precision_recall, areas, curves, "images, class against others")
            written.append(curves)
        return written


class RegressionEvaluation(Evaluation):
    """Errors of a regression network on images.

    Args:
        scores: Measured errors.
        title: What was scored against what.
        registered: Registered metrics, updated with all inputs.
    """

    def __init__(
        self, scores: RegressionScores, *, title: str = "scores", registered: RegisteredMetrics | None = None
    ) -> None:
        super().__init__(title, registered)
        self.scores = scores

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row a target; see `Evaluation.table`."""
        return [asdict(each) for each in self.scores.targets]

    @property
    def headline(self) -> dict[str, str]:
        """Mean absolute error of each target."""
        return {f"MAE of {each.name}": f"{each.mae:.4g}" for each in self.scores.targets[:4]}

    def builtin_tables(self) -> list[Table]:
        """All built-in errors for people."""
        return [_targets(self.scores, self.title)]

    def builtin_scores(self) -> dict[str, Any]:
        """All built-in errors as plain values of JSON, NaN as None."""
        return self.scores.to_dict()

    def plot(self, path: str | Path) -> list[Path]:
        """Write nothing: there are no pictures of regression."""
        return []


def _classes(scores: ClassificationScores, title: str) -> Table:
    columns = ("class", "F1", "precision", "recall", "AUROC", "AP", "images")
    table = new_table(f"{title}: accuracy {digits(scores.accuracy)}", columns)
    for each in scores.classes:
        values = (each.f1, each.precision, each.recall, each.auroc, each.average_precision)
        table.add_row(each.name, *map(digits, values), f"{each.num_images:,}")
    table.add_section()
    total = sum(each.num_images for each in scores.classes)
    table.add_row("mean", digits(scores.f1), "", "", digits(scores.auroc), "", f"{total:,}")
    return table


def _targets(scores: RegressionScores, title: str) -> Table:
    table = new_table(title, ("number", "MAE", "RMSE", "R2", "images"))
    for each in scores.targets:
        table.add_row(each.name, f"{each.mae:.4g}", f"{each.rmse:.4g}", digits(each.r2), f"{each.num_images:,}")
    return table


_BACKGROUND = "background"


class DetectionEvaluation(Evaluation):
    """Scores of a detector on images given one by one.

    Args:
        classes: Names, in the order of the class indices.
        kind: Kind of geometry that is compared.
        score_threshold: Lowest score in the confusion matrix and panoptic quality: the default of predictions.
        title: What was scored against what.
        registered: Registered metrics.
    """

    pictures = ("", "_confusion")
    captions = MappingProxyType({"": "precision and recall", "_confusion": "confusion matrix"})

    def __init__(
        self,
        classes: Sequence[str],
        kind: Literal["boxes", "oriented_boxes", "masks"],
        *,
        score_threshold: float,
        title: str = "scores",
        registered: RegisteredMetrics | None = None,
    ) -> None:
        super().__init__(title, registered)
        self.classes = tuple(classes)
        self.score_threshold = score_threshold
        self._precision = DetectionMetrics(classes, kind)
        self._froc = Froc(len(classes))
        self._confusion = DetectionConfusion(len(classes), kind, score_threshold=score_threshold)
        self._panoptic = PanopticQuality(len(classes), score_threshold) if kind == "masks" else None
        self._dota = OrientedAveragePrecision(len(classes), (0.5,)) if kind == "oriented_boxes" else None

    def update(self, found: Detections, truth: ObjectLabels) -> None:
        """Update with predictions and ground truth of an image.

        Raises:
            InputError: They have another kind of geometry.
        """
        for metric in (self._precision, self._froc, self._confusion, self._panoptic, self._dota, self.registered):
            if metric is not None:
                metric.update([found], [truth])

    @cached_property
    def scores(self) -> DetectionScores:
        """Average precision and what goes with it; no further image can be added."""
        return self._precision.compute()

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row a class; see `Evaluation.table`."""
        names = ("name", "ap", "ap50", "f1", "precision", "recall", "threshold", "num_objects")
        return [{name: getattr(each, name) for name in names} for each in self.scores.classes]

    @property
    def headline(self) -> dict[str, str]:
        """Average precision over classes."""
        return {"AP": digits(self.scores.ap), "AP50": digits(self.scores.ap50)}

    def builtin_tables(self) -> list[Table]:
        """All built-in scores for people."""
        return [
            *detection_table(self.scores, self.title),
            *([self._dota_table()] if self._dota is not None else []),
            self._froc_table(),
            *([self._panoptic_table()] if self._panoptic is not None else []),
            self._confusion_table(),
        ]

    def builtin_scores(self) -> dict[str, Any]:
        """All built-in scores as plain values of JSON, NaN as None."""
        froc = dict(zip(self.classes, self._froc.compute(), strict=True))
        content = {
            **self.scores.to_dict(),
            "froc": {"false_positives_per_image": list(FROC_RATES), "classes": froc},
            "score_threshold": self.score_threshold,
            "confusion": {"classes": [*self.classes, _BACKGROUND], "matrix": self._confusion.matrix.tolist()},
        }
        if self._panoptic is not None:
            mean, each = self._panoptic.compute()
            named = {name: asdict(scores) for name, scores in zip(self.classes, each, strict=True)}
            content["panoptic"] = {**asdict(mean), "classes": named}
        if self._dota is not None:
            content["dota"] = self._dota_scores()
        return without_nan(content)

    def plot(self, path: str | Path) -> list[Path]:
        """Write precision-recall curves and the confusion matrix; see `Evaluation.plot`."""
        curve, matrix = paths = self.picture_paths(path)
        plot_precision_recall(self.scores, curve)
        save_confusion_matrix(self._confusion.matrix, [*self.classes, _BACKGROUND], matrix)
        return paths

    def _froc_table(self) -> Table:
        columns = ("class", *(f"{rate:g}" for rate in FROC_RATES), "mean")
        table = new_table("sensitivity by false positives an image", columns)
        for name, values in zip(self.classes, self._froc.compute(), strict=True):
            table.add_row(name, *map(digits, (*values["sensitivity"], values["mean"])))
        return table

    def _dota_scores(self) -> dict[str, Any]:
        """AP at an IoU of .5, over 11 recalls and as an area: the means and, under "classes", each class's."""
        assert self._dota is not None
        found = self._dota.compute()
        keys = {"ap50_voc07": "map_50_voc07", "ap50_area": "map_50"}
        # torchmetrics makes a number of the values of a single class.
        each = zip(*(found[f"{key}_per_class"].reshape(-1).tolist() for key in keys.values()), strict=True)
        return {
            **{name: found[key].item() for name, key in keys.items()},
            "classes": {
                name: dict(zip(keys, values, strict=True)) for name, values in zip(self.classes, each, strict=True)
            },
        }

    def _dota_table(self) -> Table:
        scores = self._dota_scores()
        table = new_table("AP50 by DOTA's rules", ("class", "VOC07, 11 recalls", "area"))
        for name, values in (*scores["classes"].items(), ("mean", scores)):
            table.add_row(name, digits(values["ap50_voc07"]), digits(values["ap50_area"]))
        return table

    def _panoptic_table(self) -> Table:
        assert self._panoptic is not None
        mean, each = self._panoptic.compute()
        title = f"panoptic quality, scores from {self.score_threshold:.2f}"
        table = new_table(title, ("class", "PQ", "SQ", "RQ"))
        for name, scores in zip((*self.classes, "mean"), (*each, mean), strict=True):
            table.add_row(name, *map(digits, (scores.pq, scores.sq, scores.rq)))
        return table

    def _confusion_table(self) -> Table:
        title = f"true class by predicted class, scores from {self.score_threshold:.2f}, IoU from .5"
        names = [*self.classes, _BACKGROUND]
        table = new_table(title, ("true", *names))
        for name, counts in zip(names, self._confusion.matrix.tolist(), strict=True):
            table.add_row(name, *(f"{count:,}" for count in counts))
        return table
