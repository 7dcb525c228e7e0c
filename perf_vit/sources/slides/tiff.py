"""OME-TIFF slides."""

from __future__ import annotations

from perf_vit.errors import parsing
from perf_vit.sources._gdal import check_exists, check_name
from perf_vit.sources.files import register_source
from perf_vit.sources.slides.arrays import ArrayReader, OpenArrays
from perf_vit.sources.slides.ome_xml import OmeImage, parse_ome_xml
from perf_vit.sources.slides.openslide import import_slide_library

__all__ = ["open_ome_tiff"]

# ExtraSamples: premultiplied and straight alpha.
_ALPHA_SAMPLES = {1, 2}


@register_source(".ome.tif", ".ome.tiff", ".ome.tf2", ".ome.tf8", ".ome.btf")
def open_ome_tiff(path: str) -> ArrayReader:
    """Open the first image of an OME-TIFF; others, such as labels, are never read.

    Raises:
        InputError: The file can't be opened, or isn't a single image.
    """
    return ArrayReader(path, _open_tiff, "ome-tiff")


def _open_tiff(path: str) -> OpenArrays:
    tifffile = import_slide_library("tifffile", path)
    zarr = import_slide_library("zarr", path)
    check_name(path)
    check_exists(path)
    with parsing(path, "an OME-TIFF"):
        tiff = tifffile.TiffFile(path)
        series = tiff.series[0]
        arrays = [zarr.open(series.aszarr(level=level), mode="r") for level in range(len(series.levels))]
        found = next(iter(parse_ome_xml(tiff.ome_metadata or "")), OmeImage())
        samples = {int(kind) for kind in series.keyframe.extrasamples}
        has_alpha = bool(samples & _ALPHA_SAMPLES)
        return OpenArrays(
            arrays, series.axes, found.mpp_yx, found.channel_names, tiff.close, has_alpha, found.objective_power
        )
