"""Layers that timm models are built from."""

from perf_vit.layers.configure import configure_attention
from perf_vit.layers.draws import current_draw, redraw_projections
from perf_vit.layers.performer_attention import PerformerAttention, PerformerOptions

__all__ = [
    "PerformerAttention",
    "PerformerOptions",
    "configure_attention",
    "current_draw",
    "redraw_projections",
]
