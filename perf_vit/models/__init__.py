"""Networks: backbones registered with timm, heads, and both together with what prediction needs to know."""

from perf_vit.models.build import ModelConfig, build_segmenter
from perf_vit.models.checkpoint import CHECKPOINT_KEY, checkpoint_metadata, load_segmenter, restore_draw
from perf_vit.models.convert import performerize
from perf_vit.models.segmenter import Segmenter, SegmenterSpec

__all__ = [
    "CHECKPOINT_KEY",
    "ModelConfig",
    "Segmenter",
    "SegmenterSpec",
    "build_segmenter",
    "checkpoint_metadata",
    "load_segmenter",
    "performerize",
    "restore_draw",
]
