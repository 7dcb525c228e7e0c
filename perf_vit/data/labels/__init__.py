"""Labels of objects in the formats that data sets come in, read into one kind of record."""

from perf_vit.data.labels.crop import objects_in
from perf_vit.data.labels.finish import finish_index
from perf_vit.data.labels.masks import OutlineMasks
from perf_vit.data.labels.read import read_object_labels
from perf_vit.data.labels.records import ImageRecord, ObjectIndex
from perf_vit.data.labels.write import write_coco_labels

__all__ = [
    "ImageRecord",
    "ObjectIndex",
    "OutlineMasks",
    "finish_index",
    "objects_in",
    "read_object_labels",
    "write_coco_labels",
]
