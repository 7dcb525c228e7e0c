"""Heads: feature maps in, task outputs out."""

from perf_vit.models.heads.full_resolution import FullResolutionHead
from perf_vit.models.heads.linear import LinearHead

__all__ = ["FullResolutionHead", "LinearHead"]
