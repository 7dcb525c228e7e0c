"""Heads, which convert feature maps to outputs of a task; importing this package registers them."""

from perf_vit.models.heads.detection import DETECTION_HEADS, DetectionHead, register_detection_head
from perf_vit.models.heads.dpt import DPTHead
from perf_vit.models.heads.fcos import FCOSHead
from perf_vit.models.heads.full_resolution import FullResolutionHead
from perf_vit.models.heads.linear import LinearHead
from perf_vit.models.heads.oriented_fcos import OrientedFCOSHead
from perf_vit.models.heads.parts import SEGMENTATION_HEADS, GridPart, Reach, register_segmentation_head
from perf_vit.models.heads.rcnn import FasterRCNNHead, MaskRCNNHead
from perf_vit.models.heads.retinanet import RetinaNetHead
from perf_vit.models.heads.segformer import SegFormerHead
from perf_vit.models.heads.upernet import UPerNetHead

__all__ = [
    "DETECTION_HEADS",
    "SEGMENTATION_HEADS",
    "DPTHead",
    "DetectionHead",
    "FCOSHead",
    "FasterRCNNHead",
    "FullResolutionHead",
    "GridPart",
    "LinearHead",
    "MaskRCNNHead",
    "OrientedFCOSHead",
    "Reach",
    "RetinaNetHead",
    "SegFormerHead",
    "UPerNetHead",
    "register_detection_head",
    "register_segmentation_head",
]
