"""Whether labels and a raster can be laid on each other."""

from __future__ import annotations

from typing import Any

from rasterio.warp import transform_bounds

from perf_vit.errors import InputError
from perf_vit.io._gdal import crs_name
from perf_vit.io.raster import Bounds, RasterSource
from perf_vit.io.slide import SlideSource

__all__ = ["check_both_placed", "check_on_pixels", "check_on_slide", "check_overlap", "reproject_bounds"]


def check_both_placed(source: RasterSource, path: str, crs: Any) -> None:
    """Refuse labels or a raster without CRS.

    Raises:
        InputError: one of them has none.
    """
    if source.crs is None:
        raise InputError(
            f"{source.path} has no CRS, so labels in {crs_name(crs)} can't be placed on it; assign one with "
            f"rio edit-info --crs EPSG:CODE {source.path}"
        )
    if crs is None:
        raise InputError(
            f"labels {path} have no CRS, so they can't be placed on {source.path} ({crs_name(source.crs)}); assign one"
        )


def check_overlap(source: RasterSource, path: str, bounds: Bounds) -> None:
    """Refuse labels that lie wholly elsewhere.

    Args:
        source: the raster.
        path: the labels' name in errors.
        bounds: of the labels, in the raster's CRS.

    Raises:
        InputError: both don't meet.
    """
    left, bottom, right, top = source.bounds
    if bounds[0] < right and bounds[2] > left and bounds[1] < top and bounds[3] > bottom:
        return
    raise InputError(
        f"labels {path} don't overlap {source.path}: they cover {_span(bounds)}, the raster "
        f"{_span(source.bounds)} ({crs_name(source.crs)}); check their CRS or choose other labels"
    )


def check_on_slide(source: SlideSource, path: str, bounds: Bounds) -> None:
    """Refuse labels that lie wholly beside a slide.

    Args:
        source: the slide, at any size.
        path: the labels' name in errors.
        bounds: of the labels, in pixels of level 0.

    Raises:
        InputError: both don't meet.
    """
    height, width = source.levels[0]
    if bounds[0] < width and bounds[2] > 0 and bounds[1] < height and bounds[3] > 0:
        return
    raise InputError(
        f"labels {path} don't overlap {source.path}: they cover {_span(bounds)}, the slide {width} x {height} pixels "
        "of level 0; labels of slides are in these pixels, as QuPath exports them"
    )


def check_on_pixels(source: RasterSource, path: str, bounds: Bounds) -> None:
    """Refuse labels in pixels that lie wholly beside an image.

    Args:
        source: the image, without CRS.
        path: the labels' name in errors.
        bounds: of the labels, in pixels.

    Raises:
        InputError: both don't meet.
    """
    if bounds[0] < source.width and bounds[2] > 0 and bounds[1] < source.height and bounds[3] > 0:
        return
    raise InputError(
        f"labels {path} don't overlap {source.path}: they cover {_span(bounds)}, the image {source.width} x "
        f"{source.height} pixels; it has no CRS, so labels must be in its pixels, or assign it one"
    )


def reproject_bounds(bounds: Bounds, crs: Any, to_crs: Any) -> Bounds:
    """Bounds around a box of another CRS."""
    left, bottom, right, top = transform_bounds(crs, to_crs, *bounds)
    return left, bottom, right, top


def _span(bounds: Bounds) -> str:
    return f"x {bounds[0]:.8g} to {bounds[2]:.8g}, y {bounds[1]:.8g} to {bounds[3]:.8g}"
