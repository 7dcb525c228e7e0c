"""OME-TIFF slides, and tiled TIFFs of other pixels than 8-bit colours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from perf_vit.errors import parsing
from perf_vit.sources._gdal import check_exists, check_name
from perf_vit.sources.files import register_source
from perf_vit.sources.slides.arrays import ArrayReader, OpenArrays
from perf_vit.sources.slides.main_image import StoredImage, choose_image
from perf_vit.sources.slides.ome_xml import OmeImage, parse_ome_xml
from perf_vit.sources.slides.openslide import import_slide_library

__all__ = ["holds_colours", "open_array_tiff", "open_ome_tiff"]

# ExtraSamples: premultiplied and straight alpha.
_ALPHA_SAMPLES = {1, 2}

# PhotometricInterpretation: RGB, palette, YCbCr, CIELab, ICCLab.
_PALETTE, _COLOURS = 3, {2, 6, 8, 9}

# ResolutionUnit: micrometres in an inch, centimetre, millimetre, micrometre.
_MICROMETRES = {2: 25_400.0, 3: 10_000.0, 4: 1000.0, 5: 1.0}

_APERIO = re.compile(r"\|\s*(MPP|AppMag)\s*=\s*([\d.]+)")

_MAGIC = (b"II*\0", b"II+\0", b"MM\0*", b"MM\0+")


@register_source(".ome.tif", ".ome.tiff", ".ome.tf2", ".ome.tf8", ".ome.btf")
def open_ome_tiff(path: str) -> ArrayReader:
    """Open the main image of an OME-TIFF; label and macro images are never read.

    Raises:
        InputError: The file can't be opened, or isn't a single image.
    """
    return ArrayReader(path, _open_tiff, "ome-tiff")


def open_array_tiff(path: str) -> ArrayReader:
    """Open the main image of any TIFF with the values that it holds.

    Raises:
        InputError: The file can't be opened, or isn't a single image.
    """
    return ArrayReader(path, _open_tiff, "tiff")


def holds_colours(path: str) -> bool:
    """Return whether OpenSlide keeps the values of a file: a TIFF of 8-bit colours, or no TIFF."""
    try:
        with open(path, "rb") as file:
            is_tiff = file.read(4) in _MAGIC
    except OSError:
        return True
    if not is_tiff:
        return True
    tifffile = import_slide_library("tifffile", path)
    with parsing(path, "a TIFF"), tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        kind = int(page.photometric)
        return page.dtype == "uint8" and (kind == _PALETTE or (kind in _COLOURS and page.samplesperpixel in (3, 4)))


def _open_tiff(path: str) -> OpenArrays:
    tifffile = import_slide_library("tifffile", path)
    zarr = import_slide_library("zarr", path)
    check_name(path)
    check_exists(path)
    with parsing(path, "an OME-TIFF" if path.lower().rsplit(".", 2)[-2] == "ome" else "a TIFF"):
        tiff = tifffile.TiffFile(path)
        stored = [_stored(each) for each in tiff.series]
        index = choose_image(path, stored)
        series, page = tiff.series[index], tiff.series[index].keyframe
        arrays = [zarr.open(series.aszarr(level=level), mode="r") for level in range(len(series.levels))]
        is_colour, found = int(page.photometric) in _COLOURS, _metadata(tiff, page, stored, index)
        return OpenArrays(
            arrays=arrays,
            axes=series.axes if is_colour or "C" in series.axes else series.axes.replace("S", "C"),
            mpp_yx=found.mpp_yx,
            names=found.channel_names,
            close=tiff.close,
            alpha=_alpha(page),
            objective_power=found.objective_power,
        )


def _alpha(page: Any) -> int | None:
    """Return the index of the sample of a pixel that is opacity, or None."""
    kinds = [int(kind) for kind in page.extrasamples]
    first = page.samplesperpixel - len(kinds)
    return next((first + index for index, kind in enumerate(kinds) if kind in _ALPHA_SAMPLES), None)


def _stored(series: Any) -> StoredImage:
    sizes = dict(zip(series.axes, series.shape, strict=True))
    return StoredImage(series.name, (sizes.get("Y", 1), sizes.get("X", 1)))


def _metadata(tiff: Any, page: Any, stored: Sequence[StoredImage], index: int) -> OmeImage:
    """Return the OME-XML of an image; of other TIFFs what Aperio's description and the resolution tags state."""
    if tiff.ome_metadata is None:
        return _plain_metadata(page)
    images = parse_ome_xml(tiff.ome_metadata)
    if len(images) == len(stored):
        return images[index]
    # The XML may list images that are in other files.
    wanted = stored[index]
    alike = (image for image in images if (image.name, image.size_yx) == (wanted.name, wanted.size_yx))
    return next(alike, OmeImage())


def _plain_metadata(page: Any) -> OmeImage:
    aperio = {name: float(value) for name, value in _APERIO.findall(page.description)} if page.is_svs else {}
    mpp_yx = (aperio["MPP"],) * 2 if "MPP" in aperio else None if page.is_svs else _mpp_of_tags(page)
    return OmeImage(mpp_yx=mpp_yx, objective_power=aperio.get("AppMag"))


def _mpp_of_tags(page: Any) -> tuple[float, float] | None:
    unit = _MICROMETRES.get(int(page.resolutionunit))
    if unit is None or not {"XResolution", "YResolution"} <= {tag.name for tag in page.tags}:
        return None
    x, y = page.resolution
    return (unit / y, unit / x) if x > 0 and y > 0 else None
