"""Whole scenes through a model, window by window, in memory that doesn't know how tall the scene is."""

from perf_vit.inference.dense import predict_map
from perf_vit.inference.dense_output import DenseOutput, OutputKind, class_map, class_output, class_probabilities
from perf_vit.inference.detections import Objects
from perf_vit.inference.engine import Strip, TileModel, predict_strips
from perf_vit.inference.objects import ObjectModel, predict_objects
from perf_vit.inference.segment import predict, segment_strips
from perf_vit.inference.stitch_objects import ObjectStitcher
from perf_vit.types import Detections

__all__ = [
    "DenseOutput",
    "Detections",
    "ObjectModel",
    "ObjectStitcher",
    "Objects",
    "OutputKind",
    "Strip",
    "TileModel",
    "class_map",
    "class_output",
    "class_probabilities",
    "predict",
    "predict_map",
    "predict_objects",
    "predict_strips",
    "segment_strips",
]
