"""Whole-slide images: pyramids read at any magnification, and their tissue."""

# Importing a module of a format registers its readers.
from perf_vit.sources.slides import ome_zarr, openslide, tiff  # noqa: F401
from perf_vit.sources.slides.pyramid import Level, PyramidReader
from perf_vit.sources.slides.slide import SlideSource

__all__ = ["Level", "PyramidReader", "SlideSource"]
