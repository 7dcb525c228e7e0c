"""Heads: feature maps in, task outputs out."""

from perf_vit.models.heads.detection import DetectionHead
from perf_vit.models.heads.dpt import DPTHead
from perf_vit.models.heads.full_resolution import FullResolutionHead
from perf_vit.models.heads.linear import LinearHead
from perf_vit.models.heads.oriented_fcos import OrientedFCOSHead
from perf_vit.models.heads.segformer import SegFormerHead
from perf_vit.models.heads.upernet import UPerNetHead

__all__ = [
    "DPTHead",
    "DetectionHead",
    "FullResolutionHead",
    "LinearHead",
    "OrientedFCOSHead",
    "SegFormerHead",
    "UPerNetHead",
]
