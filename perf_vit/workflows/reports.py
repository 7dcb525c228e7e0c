"""Scores as JSON, tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from perf_vit.files import write_json
from perf_vit.metrics import (
    FROC_RATES,
    ClassificationScores,
    DetectionConfusion,
    DetectionMetrics,
    DetectionScores,
    Froc,
    OrientedAveragePrecision,
    PanopticQuality,
    RegressionScores,
    plot_precision_recall,
    save_confusion_matrix,
    save_precision_recall,
)
from perf_vit.text import without_nan
from perf_vit.types import Detections, ObjectLabels
from perf_vit.workflows.progress import detection_table, digits, new_table

__all__ = ["DetectionReport", "image_tables", "score_files", "write_image_report"]

_PICTURES = {
    "segmentation": ("", "_confusion"),
    "detection": ("", "_confusion"),
    "classification": ("", "_precision_recall"),
    "slide_classification": ("", "_precision_recall"),
    "regression": (),
}
"""What the names of pictures end in, by the task of the checkpoint's network."""


def score_files(path: Path, task: str) -> list[Path]:
    """The JSON file of scores, and the pictures beside it, some of which a model may have no scores for.

    Args:
        path: of the JSON file.
        task: of the checkpoint's network.
    """
    return [path, *(path.with_name(f"{path.stem}{ending}.png") for ending in _PICTURES[task])]


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


_BACKGROUND = "background"


class DetectionReport:
    """The scores of a detector on images given one by one.

    Args:
        classes: names, in the order of the class indices.
        kind: of geometry that is compared.
        score_threshold: of the confusion matrix and of panoptic quality: what `perf-vit predict` would give.
    """

    def __init__(
        self,
        classes: Sequence[str],
        kind: Literal["boxes", "oriented_boxes", "masks"],
        *,
        score_threshold: float,
    ) -> None:
        self.classes = tuple(classes)
        self.score_threshold = score_threshold
        self._precision = DetectionMetrics(classes, kind)
        self._froc = Froc(len(classes))
        self._confusion = DetectionConfusion(len(classes), kind, score_threshold=score_threshold)
        self._panoptic = PanopticQuality(len(classes), score_threshold) if kind == "masks" else None
        self._dota = OrientedAveragePrecision(len(classes), (0.5,)) if kind == "oriented_boxes" else None

    def update(self, found: Detections, truth: ObjectLabels) -> None:
        """Take up an image.

        Raises:
            InputError: another kind of geometry.
        """
        for metric in (self._precision, self._froc, self._confusion, self._panoptic, self._dota):
            if metric is not None:
                metric.update([found], [truth])

    @cached_property
    def scores(self) -> DetectionScores:
        """Average precision and what goes with it; no image can be taken up any more."""
        return self._precision.compute()

    def tables(self, title: str) -> list[Table]:
        """All scores for people."""
        return [
            *detection_table(self.scores, title),
            *([self._dota_table()] if self._dota is not None else []),
            self._froc_table(),
            *([self._panoptic_table()] if self._panoptic is not None else []),
            self._confusion_table(),
        ]

    def to_dict(self) -> dict[str, Any]:
        """All scores as plain values of JSON, NaN as None."""
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

    def write(self, path: Path) -> None:
        """Write the scores as JSON, and beside them precision-recall curves and the confusion matrix as pictures.

        Raises:
            OutputError: nothing can be written there.
        """
        _, curve, matrix = score_files(path, "detection")
        write_json(path, self.to_dict())
        plot_precision_recall(self.scores, curve)
        save_confusion_matrix(self._confusion.matrix, [*self.classes, _BACKGROUND], matrix)

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
