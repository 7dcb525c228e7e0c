"""Whole scenes through a model, window by window, in memory that doesn't know how tall the scene is."""

from perf_vit.errors import extra

with extra("geo", __name__):
    from perf_vit.inference.batch import (
        REPORT,
        InputReport,
        RunReport,
        attempt,
        check_report,
        in_turn,
        predict_many,
        reserve_report,
    )
    from perf_vit.inference.classification import ClassificationPredictor
    from perf_vit.inference.dense import Strip, StripMaker, TileModel, predict_strips
    from perf_vit.inference.dense_output import DenseOutput, class_map, class_output, class_probabilities
    from perf_vit.inference.detect import ObjectModel, predict_objects
    from perf_vit.inference.detection import DetectionPredictor
    from perf_vit.inference.inputs import MapInput, find_inputs, find_paths, is_one_file, resolve_one, scene_files
    from perf_vit.inference.merge_objects import ObjectStitcher
    from perf_vit.inference.options import (
        ClassificationPredictOptions,
        DetectionPredictOptions,
        OutputKind,
        PredictOptions,
        SegmentationPredictOptions,
        SlideClassificationPredictOptions,
        move_to_device,
        resolve_device,
    )
    from perf_vit.inference.predictor import InputPredictor, OnProgress, Predictor, ignore_progress
    from perf_vit.inference.ray import RayPool
    from perf_vit.inference.segmentation import SegmentationPredictor
    from perf_vit.inference.slide_classification import (
        SlideClassificationPredictor,
        attention_folder,
        attention_picture,
        embed_windows,
    )
    from perf_vit.inference.table_predictor import TablePredictor

__all__ = [
    "REPORT",
    "ClassificationPredictOptions",
    "ClassificationPredictor",
    "DenseOutput",
    "DetectionPredictOptions",
    "DetectionPredictor",
    "InputPredictor",
    "InputReport",
    "MapInput",
    "ObjectModel",
    "ObjectStitcher",
    "OnProgress",
    "OutputKind",
    "PredictOptions",
    "Predictor",
    "RayPool",
    "RunReport",
    "SegmentationPredictOptions",
    "SegmentationPredictor",
    "SlideClassificationPredictOptions",
    "SlideClassificationPredictor",
    "Strip",
    "StripMaker",
    "TablePredictor",
    "TileModel",
    "attempt",
    "attention_folder",
    "attention_picture",
    "check_report",
    "class_map",
    "class_output",
    "class_probabilities",
    "embed_windows",
    "find_inputs",
    "find_paths",
    "ignore_progress",
    "in_turn",
    "is_one_file",
    "move_to_device",
    "predict_many",
    "predict_objects",
    "predict_strips",
    "reserve_report",
    "resolve_device",
    "resolve_one",
    "scene_files",
]
