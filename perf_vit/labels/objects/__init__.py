"""Object labels: COCO, Pascal VOC, YOLO, DOTA, CSV, polygons and instance masks."""

# Importing a module of a format registers it.
from perf_vit.labels.objects import coco, csv, dota, instances, vector, voc, yolo  # noqa: F401
from perf_vit.labels.objects.coco import CocoImages, category_ids_by_name, default_category_ids, ids_of_classes
from perf_vit.labels.objects.masks import OutlineMasks, objects_in, outlines_of
from perf_vit.labels.objects.read import read_object_labels
from perf_vit.labels.objects.records import (
    LABEL_FORMATS,
    ImageRecord,
    LabelOptions,
    ObjectIndex,
    RawImage,
    RawLabels,
    RawObject,
    register_label_format,
)
from perf_vit.labels.objects.validate import validate_labels
from perf_vit.labels.objects.vector import PolygonFile

__all__ = [
    "LABEL_FORMATS",
    "CocoImages",
    "ImageRecord",
    "LabelOptions",
    "ObjectIndex",
    "OutlineMasks",
    "PolygonFile",
    "RawImage",
    "RawLabels",
    "RawObject",
    "category_ids_by_name",
    "default_category_ids",
    "ids_of_classes",
    "objects_in",
    "outlines_of",
    "read_object_labels",
    "register_label_format",
    "validate_labels",
]
