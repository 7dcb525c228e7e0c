"""Whole-slide images: pyramids read at any magnification, and their tissue."""

from perf_vit.sources.slides.pyramid import Level, PyramidReader
from perf_vit.sources.slides.slide import SlideSource

__all__ = ["Level", "PyramidReader", "SlideSource"]
