"""Opening the inputs of one model: the same way in training, evaluation and prediction."""

from __future__ import annotations

from typing import Any

from perf_vit.sources.open import open_source
from perf_vit.sources.pixel_size import PixelSize
from perf_vit.sources.raster import RasterSource
from perf_vit.sources.slides import SlideSource
from perf_vit.types import InputOptions, InputPath

__all__ = ["merged_options", "open_input"]


def open_input(path: InputPath, options: InputOptions, **overrides: Any) -> RasterSource | SlideSource:
    """Open an input of a model.

    Args:
        path: What `open_source` opens.
        options: Those of the model.
        **overrides: Options of `open_source` that come before the model's; None counts as not given.

    Raises:
        InputError: The input can't be opened, or the options don't fit it.
    """
    return open_source(path, **merged_options(options, **overrides))


def merged_options(options: InputOptions, **overrides: Any) -> dict[str, Any]:
    """Keyword arguments of `open_source`.

    Args:
        options: Those of a model.
        **overrides: Options of `open_source` that come before the model's; None counts as not given.
    """
    resolution: float | PixelSize | None = options.resolution
    if options.resolution is not None and options.resolution_unit is not None:
        resolution = PixelSize(options.resolution, options.resolution_unit)
    given = {name: value for name, value in overrides.items() if value is not None}
    own = {
        "bands": options.bands,
        "nodata": options.nodata,
        "resolution": resolution,
        # A level is another way to choose the size of pixels.
        "mpp": None if "level" in given else options.mpp,
        "slide_mpp": options.slide_mpp,
        "tissue": options.tissue,
    }
    return {**{name: value for name, value in own.items() if value is not None}, **given}
