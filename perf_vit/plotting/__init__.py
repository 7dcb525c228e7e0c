"""Pictures of imagery and class maps, and helpers for figures."""

from perf_vit.plotting.colors import colorize, default_colormap
from perf_vit.plotting.pictures import lettered, lettering_font, natural_bands, rgb_from, save_figure, save_png

__all__ = [
    "colorize",
    "default_colormap",
    "lettered",
    "lettering_font",
    "natural_bands",
    "rgb_from",
    "save_figure",
    "save_png",
]
