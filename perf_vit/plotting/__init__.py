"""Pictures of imagery and class maps, and helpers for figures."""

from perf_vit.errors import extra

with extra("geo", __name__):
    from perf_vit.plotting.colors import colorize, default_colormap, thumbnail
    from perf_vit.plotting.pictures import (
        label_font,
        label_text,
        natural_bands,
        rgb_from,
        save_figure,
        save_png,
        tissue_picture,
    )

__all__ = [
    "colorize",
    "default_colormap",
    "label_font",
    "label_text",
    "natural_bands",
    "rgb_from",
    "save_figure",
    "save_png",
    "thumbnail",
    "tissue_picture",
]
