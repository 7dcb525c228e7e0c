"""Layers that timm models are built from."""

from perf_vit.layers.performer_attention import PerformerAttention, PerformerOptions

__all__ = ["PerformerAttention", "PerformerOptions"]
