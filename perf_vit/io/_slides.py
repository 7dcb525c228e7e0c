"""Which files are slides, and what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perf_vit.errors import InputError, PerfVitError
from perf_vit.io._gdal import open_dataset
from perf_vit.io._openslide import OpenSlideReader, slide_format
from perf_vit.io._pyramid import PyramidReader
from perf_vit.io.image_files import SLIDE_SUFFIXES
from perf_vit.io.slide import SlideSource
from perf_vit.io.slide_array import is_multiscale, open_ome_tiff, open_ome_zarr

__all__ = ["is_slide", "open_slide"]

_OME_TIFF_SUFFIXES = (".ome.tif", ".ome.tiff", ".ome.tf2", ".ome.tf8", ".ome.btf")


def is_slide(path: str, *, asked: bool | None) -> bool:
    """Whether a path is read as a slide.

    Args:
        path: what to open.
        asked: whether options of slides were given, so that a plain tiled TIFF counts as one, or options of rasters,
            so that it doesn't; None for neither.
    """
    name = path.lower()
    if _is_ome_tiff(path) or _is_ome_zarr(path) or Path(name).suffix in SLIDE_SUFFIXES:
        return True
    if Path(name).suffix not in {".tif", ".tiff"} or not Path(path).is_file():
        return False
    return _is_slide_tiff(path, asked)


def open_slide(
    path: str, *, bands: Sequence[int | str] | None = None, icc: str | None = None, **options: Any
) -> SlideSource:
    """Open a slide with what reads its format.

    Args:
        path: the slide.
        bands: names or 1-based numbers of channels.
        icc: "srgb" or None.
        **options: of `SlideSource`.

    Raises:
        InputError: it can't be opened, or an option doesn't fit it.
    """
    if icc not in (None, "srgb"):
        raise InputError(f'icc must be "srgb" or None, got {icc!r}')
    if "tissue" in options:
        options["tissue"] = str(options["tissue"])
    return SlideSource(path, _reader(path, icc), bands=bands, **options)


def _reader(path: str, icc: str | None) -> PyramidReader:
    if not (_is_ome_tiff(path) or _is_ome_zarr(path)):
        return OpenSlideReader(path, to_srgb=icc is not None)
    if icc is not None:
        raise InputError(f"icc is for slides that OpenSlide reads, and {path} is not one; leave it out")
    return open_ome_tiff(path) if _is_ome_tiff(path) else open_ome_zarr(path)


def _is_ome_tiff(path: str) -> bool:
    return path.lower().endswith(_OME_TIFF_SUFFIXES)


def _is_ome_zarr(path: str) -> bool:
    return path.lower().rstrip("/").endswith(".ome.zarr") or (
        path.rstrip("/").endswith(".zarr") and is_multiscale(path)
    )


def _is_slide_tiff(path: str, asked: bool | None) -> bool:
    """Scanners' TIFFs are slides; of other tiled ones those without a place on Earth that look like one."""
    found = slide_format(path)
    if found is None or found != "generic-tiff":
        return found is not None
    try:
        dataset = open_dataset(path)
    except PerfVitError:
        return True
    with dataset:
        if dataset.crs is not None or not dataset.transform.is_identity or dataset.gcps[0] or dataset.rpcs:
            return False
        is_pyramid_of_colours = dataset.count in (3, 4) and set(dataset.dtypes) == {"uint8"} and dataset.overviews(1)
        return bool(is_pyramid_of_colours) if asked is None else asked
