"""Whether a raster that is there is the one that would be written."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

import rasterio

from perf_vit.io._gdal import GDAL_ERRORS, plain_images_allowed
from perf_vit.io._ome_xml import parse_ome_tags, parse_ome_xml
from perf_vit.io.layout import RasterLayout
from perf_vit.io.ome_tiff import is_ome_tiff_name

__all__ = ["holds_layout"]


def holds_layout(path: Path, layout: RasterLayout, *, other_tags: Container[str] = ()) -> bool:
    """Whether a file is a raster of this size, these bands and these tags; its place and pixels are not looked at.

    Args:
        path: may be missing, or no raster at all.
        layout: what it is compared with.
        other_tags: names of tags that may differ.
    """
    try:
        with plain_images_allowed(), rasterio.open(path) as dataset:
            tags, names = dataset.tags(), dataset.descriptions
            if is_ome_tiff_name(path):
                # Its channels are pictures of their own, its tags part of the description.
                xml = tags.get("TIFFTAG_IMAGEDESCRIPTION", "")
                tags, names = parse_ome_tags(xml), parse_ome_xml(xml).channel_names
            same = (
                (dataset.height, dataset.width, len(names)) == (layout.height, layout.width, layout.num_bands)
                and set(dataset.dtypes) == {str(layout.dtype)}
                and (layout.band_names is None or names == tuple(layout.band_names))
            )
    except GDAL_ERRORS:
        return False
    return same and all(tags.get(name) == value for name, value in layout.tags.items() if name not in other_tags)
