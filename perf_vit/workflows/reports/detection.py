"""Evaluation of object detection: scores of boxes or masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from rich.table import Table

from perf_vit.metrics import (
    FROC_RATES,
    DetectionConfusion,
    DetectionMetrics,
    DetectionScores,
    Froc,
    OrientedAveragePrecision,
    PanopticQuality,
    RegisteredMetrics,
    plot_precision_recall,
    save_confusion_matrix,
)
from perf_vit.text import without_nan
from perf_vit.types import Detections, ObjectLabels
from perf_vit.workflows.progress import detection_table, digits, new_table
from perf_vit.workflows.task import Evaluation

__all__ = ["DetectionEvaluation"]


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

    def draw(self, path: str | Path) -> list[Path]:
        """Write precision-recall curves and the confusion matrix; see `Evaluation.draw`."""
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
