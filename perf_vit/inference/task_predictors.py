"""Prediction of one input in one call."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from perf_vit.errors import OptionError
from perf_vit.inference.classification import ClassificationPredictor
from perf_vit.inference.detection import DetectionPredictor
from perf_vit.inference.jobs import JobResult
from perf_vit.inference.options import (
    ClassificationPredictOptions,
    DetectionPredictOptions,
    PredictOptions,
    SegmentationPredictOptions,
    SlideClassificationPredictOptions,
)
from perf_vit.inference.predictor import OnProgress, ignore_progress
from perf_vit.inference.segmentation import SegmentationPredictor
from perf_vit.inference.slide_classification import SlideClassificationPredictor

__all__ = ["PREDICTORS", "TaskPredictor", "predict"]


@dataclass(frozen=True, slots=True)
class TaskPredictor:
    """How a task predicts.

    Attributes:
        predictor: Class of its predictor.
        options: Class of its options.
    """

    predictor: type[Any]
    options: type[PredictOptions]

    def make(self, model: Any, **options: Any) -> Any:
        """A predictor.

        Args:
            model: A model, or the path of a checkpoint.
            **options: Options of the task.

        Raises:
            OptionError: The task has no such option, or it takes no such value.
        """
        known = [each.name for each in fields(self.options)]
        for name in options.keys() - set(known):
            close = difflib.get_close_matches(name, known, 1)
            raise OptionError(f"{name} is no option here, {f'did you mean {close[0]}?' if close else ', '.join(known)}")
        return self.predictor(model, self.options(**options))


PREDICTORS = {
    "segmentation": TaskPredictor(SegmentationPredictor, SegmentationPredictOptions),
    "detection": TaskPredictor(DetectionPredictor, DetectionPredictOptions),
    "classification": TaskPredictor(ClassificationPredictor, ClassificationPredictOptions),
    "regression": TaskPredictor(ClassificationPredictor, ClassificationPredictOptions),
    "slide_classification": TaskPredictor(SlideClassificationPredictor, SlideClassificationPredictOptions),
}
"""How each task predicts, by the name of the task."""


def predict(
    model: Any, source: Any, out: str | Path, *, on_progress: OnProgress = ignore_progress, **options: Any
) -> JobResult:
    """Predict a whole input and write the outputs of the model's task.

    Segmentation writes a georeferenced map, .tif; detection the objects, .gpkg, .geojson, .parquet or COCO's .json;
    classification, regression and slide classification a table, .csv. Outputs appear under their names when they are
    complete; an interrupted call goes on where it was.

    Args:
        model: Model of `perf_vit.load_segmenter` and the like.
        source: Path, URL or several files of one scene, read as the model was trained; or a source of
            `perf_vit.open_source`. A table takes several paths.
        out: Path of the main output; missing folders are made.
        on_progress: Called with (windows done, windows in all); of tables, with inputs.
        **options: Fields of the options of the task, such as `SegmentationPredictOptions`.

    Returns:
        What became of it.

    Raises:
        BusyError: Another process writes the output.
        InputError: The input can't be read, or doesn't fit the model.
        OptionError: The task has no such option, or it takes no such value.
        OutputError: The output can't be written, or is another file without `overwrite`.
    """
    return PREDICTORS[model.task].make(model, **options).run(source, out, on_progress=on_progress)
