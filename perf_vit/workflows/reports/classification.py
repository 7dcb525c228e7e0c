"""Evaluations of classification and regression: scores of images or slides."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from rich.table import Table

from perf_vit.metrics import (
    ClassificationScores,
    RegisteredMetrics,
    RegressionScores,
    save_confusion_matrix,
    save_precision_recall,
)
from perf_vit.workflows.progress import digits, new_table
from perf_vit.workflows.task import Evaluation

__all__ = ["ClassificationEvaluation", "RegressionEvaluation"]

Scores = TypeVar("Scores", ClassificationScores, RegressionScores)


class _MeasuredEvaluation(Evaluation, Generic[Scores]):
    """Scores that were measured elsewhere.

    Args:
        scores: Measured scores.
        title: What was scored against what.
        registered: Registered metrics, updated with all inputs.
    """

    def __init__(self, scores: Scores, *, title: str = "scores", registered: RegisteredMetrics | None = None) -> None:
        super().__init__(title, registered)
        self.scores: Scores = scores

    def builtin_scores(self) -> dict[str, Any]:
        """All built-in scores as plain values of JSON, NaN as None."""
        return self.scores.to_dict()


class ClassificationEvaluation(_MeasuredEvaluation[ClassificationScores]):
    """Scores of a classifier on images or slides.

    Args:
        scores: Measured scores.
        title: What was scored against what.
        registered: Registered metrics, updated with all inputs.
    """

    pictures = ("", "_precision_recall")
    captions = MappingProxyType({"": "confusion matrix", "_precision_recall": "precision and recall"})

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

    def draw(self, path: str | Path) -> list[Path]:
        """Write the confusion matrix and precision-recall curves; see `Evaluation.draw`."""
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


class RegressionEvaluation(_MeasuredEvaluation[RegressionScores]):
    """Errors of a regression network on images.

    Args:
        scores: Measured errors.
        title: What was scored against what.
        registered: Registered metrics, updated with all inputs.
    """

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

    def draw(self, path: str | Path) -> list[Path]:
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
