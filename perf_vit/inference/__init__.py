"""Whole scenes through a model, window by window, in memory that doesn't know how tall the scene is."""

from perf_vit.inference.engine import Strip, TileModel, predict_strips
from perf_vit.inference.segment import class_map, class_probabilities, predict, segment_strips

__all__ = [
    "Strip",
    "TileModel",
    "class_map",
    "class_probabilities",
    "predict",
    "predict_strips",
    "segment_strips",
]
