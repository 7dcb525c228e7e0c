"""What is known of a source without reading its pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rasterio

from perf_vit.sources._gdal import crs_name, open_dataset
from perf_vit.sources.slides import SlideSource
from perf_vit.types import Source

__all__ = ["SourceInfo", "describe_source"]


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """Facts about a source, as plain values.

    Attributes:
        path: as it was given.
        kind: "raster" or "slide".
        format: what it is stored as, GDAL's driver or OpenSlide's vendor; None for several files.
        height: rows.
        width: columns.
        dtype: of the pixels.
        band_names: one a band.
        num_colors: of the palette, 0 without one.
        nodata: value of missing pixels, None for none.
        mask: what hides pixels beside nodata, such as "band 4 (alpha)", None for nothing.
        crs: its short name, None where there is none.
        resolution_xy: width and height of a pixel in units of the CRS; None without CRS, and of a rotated raster the
            length of its pixels' sides.
        units: of the CRS, such as "metre".
        bounds_crs: (left, bottom, right, top) in the CRS.
        orientation: EXIF orientation, 1 to 8, that pixels are turned by when they are read; 1 for none.
        mpp: micrometres per pixel of a slide.
        levels: (height, width) of each level that the file holds, finest first.
        block_px: (height, width) of the pieces that the file is stored in.
        compression: its name, None for none or where nobody knows.
        file_bytes: size of the file, None of a folder or a URL.
    """

    path: str
    kind: str
    format: str | None
    height: int
    width: int
    dtype: str
    band_names: tuple[str, ...]
    num_colors: int
    nodata: float | None
    mask: str | None
    crs: str | None
    resolution_xy: tuple[float, float] | None
    units: str | None
    bounds_crs: tuple[float, float, float, float] | None
    orientation: int
    mpp: float | None
    levels: tuple[tuple[int, int], ...]
    block_px: tuple[int, int] | None
    compression: str | None
    file_bytes: int | None


def describe_source(source: Source) -> SourceInfo:
    """Look at the headers of a source.

    Args:
        source: from `perf_vit.open`.
    """
    stored: dict[str, Any]
    if isinstance(source, SlideSource):
        stored = {"kind": "slide", "format": source.format, "levels": source.levels}
    else:
        stored = {"kind": "raster", **_stored(source)}
    file = Path(source.path)
    facts = {"format": None, "levels": ((source.height, source.width),), "block_px": None, "compression": None}
    return SourceInfo(
        path=source.path,
        height=source.height,
        width=source.width,
        dtype=str(source.dtype),
        band_names=tuple(source.band_names),
        num_colors=len(source.colormap or ()),
        nodata=source.nodata,
        mask=getattr(source, "mask_name", None),
        orientation=getattr(source, "orientation", 1),
        mpp=source.mpp,
        file_bytes=file.stat().st_size if file.is_file() else None,
        **_place(source),
        **{**facts, **stored},
    )


def _place(source: Source) -> dict[str, Any]:
    if source.crs is None:
        return {"crs": None, "resolution_xy": None, "units": None, "bounds_crs": None}
    t = source.transform
    corners = [t @ (col, row) for col in (0, source.width) for row in (0, source.height)]
    xs, ys = zip(*corners, strict=True)
    return {
        "crs": crs_name(source.crs),
        "resolution_xy": ((t.a**2 + t.d**2) ** 0.5, (t.b**2 + t.e**2) ** 0.5),
        "units": "degree" if source.crs.is_geographic else source.crs.linear_units,
        "bounds_crs": (min(xs), min(ys), max(xs), max(ys)),
    }


def _stored(source: Source) -> dict[str, Any]:
    """Of one file; several have nothing in common that would be worth saying."""
    if len(getattr(source, "paths", [source.path])) > 1 or Path(source.path).is_dir():
        return {}
    with open_dataset(source.path) as dataset:
        reductions = dataset.overviews(1)
        compression = dataset.compression
        turned = slice(None, None, -1 if (source.height, source.width) != dataset.shape else 1)
        levels = ((-(-dataset.height // k), -(-dataset.width // k)) for k in (1, *reductions))
        return {
            "format": dataset.driver,
            "levels": tuple(level[turned] for level in levels),
            "block_px": dataset.block_shapes[0][turned],
            "compression": None if compression is None else rasterio.enums.Compression(compression).value,
        }
