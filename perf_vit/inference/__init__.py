"""Whole scenes through a model, window by window, in memory that doesn't know how tall the scene is."""

from perf_vit.inference.attention_picture import attention_picture
from perf_vit.inference.damage import DamagedPiece
from perf_vit.inference.dense import predict_map
from perf_vit.inference.dense_output import DenseOutput, OutputKind, class_map, class_output, class_probabilities
from perf_vit.inference.detections import Objects
from perf_vit.inference.embed import embed_windows
from perf_vit.inference.engine import Strip, TileModel, predict_strips
from perf_vit.inference.inputs import MapInput, find_inputs, find_paths, is_one_file, resolve_one, scene_files
from perf_vit.inference.journal import check_partial_folder
from perf_vit.inference.many import attempt, in_turn, predict_many
from perf_vit.inference.map_job import MapJob, MapResult, check_map_name, make_map, map_exists
from perf_vit.inference.objects import ObjectModel, predict_objects
from perf_vit.inference.ray_pool import RayPool
from perf_vit.inference.ray_rows import rows_in_pool
from perf_vit.inference.run_report import REPORT, InputReport, RunReport, check_report, reserve_report
from perf_vit.inference.segment import predict, segment_job, segment_strips
from perf_vit.inference.stitch_objects import ObjectStitcher
from perf_vit.types import Detections

__all__ = [
    "REPORT",
    "DamagedPiece",
    "DenseOutput",
    "Detections",
    "InputReport",
    "MapInput",
    "MapJob",
    "MapResult",
    "ObjectModel",
    "ObjectStitcher",
    "Objects",
    "OutputKind",
    "RayPool",
    "RunReport",
    "Strip",
    "TileModel",
    "attempt",
    "attention_picture",
    "check_map_name",
    "check_partial_folder",
    "check_report",
    "class_map",
    "class_output",
    "class_probabilities",
    "embed_windows",
    "find_inputs",
    "find_paths",
    "in_turn",
    "is_one_file",
    "make_map",
    "map_exists",
    "predict",
    "predict_many",
    "predict_map",
    "predict_objects",
    "predict_strips",
    "reserve_report",
    "resolve_one",
    "rows_in_pool",
    "scene_files",
    "segment_job",
    "segment_strips",
]
