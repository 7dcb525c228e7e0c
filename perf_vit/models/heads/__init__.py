"""Heads: feature maps in, task outputs out."""

from perf_vit.models.heads.detection import DetectionHead
from perf_vit.models.heads.fcos import FCOSHead
from perf_vit.models.heads.full_resolution import FullResolutionHead
from perf_vit.models.heads.linear import LinearHead
from perf_vit.models.heads.rcnn import FasterRCNNHead, MaskRCNNHead
from perf_vit.models.heads.retinanet import RetinaNetHead

__all__ = [
    "DetectionHead",
    "FCOSHead",
    "FasterRCNNHead",
    "FullResolutionHead",
    "LinearHead",
    "MaskRCNNHead",
    "RetinaNetHead",
]
