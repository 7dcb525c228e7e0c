"""Scores of networks for whole images and slides, as tables and files."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from perf_vit.cli.console import digits, new_table
from perf_vit.cli.score_files import score_files
from perf_vit.io import write_json
from perf_vit.tasks import ClassificationScores, RegressionScores, save_confusion_matrix, save_precision_recall

__all__ = ["image_tables", "write_image_report"]


def image_tables(scores: ClassificationScores | RegressionScores, title: str) -> list[Table]:
    """One row a class or number, and what they come to."""
    return [_classes(scores, title) if isinstance(scores, ClassificationScores) else _numbers(scores, title)]


def write_image_report(scores: ClassificationScores | RegressionScores, path: Path) -> None:
    """Scores as JSON, and beside it as .png the confusion matrix and precision-recall curves, where there are any.

    Raises:
        OutputError: they can't be written there.
    """
    write_json(path, scores.to_dict())
    if isinstance(scores, ClassificationScores):
        _draw(scores, path)


def _draw(scores: ClassificationScores, path: Path) -> None:
    names = [each.name for each in scores.classes]
    _, matrix, curves = score_files(path, "classification")
    if scores.confusion is not None:
        save_confusion_matrix(scores.confusion, names, matrix)
    if scores.precision_recall is not None:
        areas = [each.average_precision for each in scores.classes]
        save_precision_recall(names, scores.precision_recall, areas, curves, "images, class against others")


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


def _numbers(scores: RegressionScores, title: str) -> Table:
    table = new_table(title, ("number", "MAE", "RMSE", "R2", "images"))
    for each in scores.targets:
        table.add_row(each.name, f"{each.mae:.4g}", f"{each.rmse:.4g}", digits(each.r2), f"{each.num_images:,}")
    return table
