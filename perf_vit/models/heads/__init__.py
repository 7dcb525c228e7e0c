"""Heads: feature maps in, task outputs out."""

from perf_vit.models.heads.full_resolution import FullResolutionHead

__all__ = ["FullResolutionHead"]
