"""Backbones; importing this package registers them with timm."""

from perf_vit.models.backbones.performer_vit import (
    PerformerVisionTransformer,
    performer_vit_base_patch16_224,
    performer_vit_small_patch16_224,
    performer_vit_tiny_patch16_224,
)

__all__ = [
    "PerformerVisionTransformer",
    "performer_vit_base_patch16_224",
    "performer_vit_small_patch16_224",
    "performer_vit_tiny_patch16_224",
]
