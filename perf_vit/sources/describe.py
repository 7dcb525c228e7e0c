"""Description of a source from its headers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import pyogrio
import rasterio
from pyogrio.errors import DataLayerError, DataSourceError

from perf_vit.errors import InputError, reason_line
from perf_vit.sources._gdal import crs_name, open_dataset, reason_of
from perf_vit.sources._qupath import class_name
from perf_vit.sources.files import GEOTIFF_SUFFIXES, PARQUET_SUFFIXES, split_layer
from perf_vit.sources.slides import SlideSource
from perf_vit.sources.slides.ome_xml import parse_ome_tags
from perf_vit.sources.vector_file import (
    chosen_layer,
    hashable_value,
    is_annotations,
    opens_as_vector,
    read_annotations,
    reading_path,
)
from perf_vit.types import Source

__all__ = ["SEAM_TAG", "SourceInfo", "describe_source", "describe_vector", "is_vector", "seam_disagreement_of"]

SEAM_TAG = "PERF_VIT_SEAM_DISAGREEMENT"
"""Tag of a map: share of its pixels on which overlapping windows disagree."""

# Columns with more values are only named.
_MAX_VALUES = 20


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """Description of a source, as plain values.

    Attributes:
        path: Path as given.
        kind: "raster" or "slide".
        format: GDAL driver or OpenSlide vendor; None for several files.
        height: Number of rows.
        width: Number of columns.
        dtype: Data type of the pixels.
        band_names: Name of each band.
        num_colors: Number of palette colours; 0 without a palette.
        nodata: Value of missing pixels, or None.
        mask: Mask in addition to nodata, such as "band 4 (alpha)", or None.
        crs: Short name of the CRS, or None.
        resolution_xy: Pixel width and height in CRS units, along the pixel's sides in rotated rasters; None without
            CRS.
        units: Unit of the CRS, such as "metre".
        bounds_crs: Bounds (left, bottom, right, top) in the CRS.
        orientation: EXIF orientation applied while reading, 1 to 8; 1 for none.
        mpp: Micrometres per pixel of a slide.
        levels: Size (height, width) of each level in the file, finest first.
        bounds_level0_px: Left, top, right and bottom of the scanned area of a slide, which QuPath shows, in pixels of
            level 0; None for all of it.
        block_px: Size (height, width) of the blocks in the file.
        compression: Name of the compression; None if there is none or it is unknown.
        file_bytes: File size in bytes; None for a folder or URL.
        seam_disagreement: Share of the pixels of a map under several windows on which these disagree; None for other
            files and for maps of windows without overlap.
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
    bounds_level0_px: tuple[int, int, int, int] | None
    block_px: tuple[int, int] | None
    compression: str | None
    file_bytes: int | None
    seam_disagreement: float | None = None


def describe_source(source: Source) -> SourceInfo:
    """Describe a source from its headers, without reading pixels.

    Args:
        source: Source from `perf_vit.open`.
    """
    stored: dict[str, Any]
    if isinstance(source, SlideSource):
        bounds = source.frame.bounds
        corners = (
            None if bounds.shape == source.levels[0] else (bounds.col, bounds.row, bounds.col_stop, bounds.row_stop)
        )
        stored = {"kind": "slide", "format": source.format, "levels": source.levels, "bounds_level0_px": corners}
    else:
        stored = {"kind": "raster", **_stored(source)}
    file = Path(source.path)
    facts: dict[str, Any] = dict.fromkeys(("format", "block_px", "compression", "bounds_level0_px"))
    facts["levels"] = ((source.height, source.width),)
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
        seam_disagreement=seam_disagreement_of(file) if file.is_file() else None,
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
    """Describe the storage of a single file; nothing for several files."""
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


def seam_disagreement_of(path: Path) -> float | None:
    """Return the seam disagreement in the tags of a map, a GeoTIFF or an OME-TIFF; None for a file without it.

    Raises:
        InputError: The file can't be opened.
    """
    if not path.name.lower().endswith(GEOTIFF_SUFFIXES):
        return None
    with open_dataset(str(path)) as dataset:
        tags = dataset.tags()
    if SEAM_TAG not in tags:
        tags = parse_ome_tags(tags.get("TIFFTAG_IMAGEDESCRIPTION", ""))
    try:
        return float(tags[SEAM_TAG])
    except (KeyError, ValueError):
        return None


def is_vector(path: str) -> bool:
    """Return whether a file with the suffix of a vector format holds geometries, and not a raster."""
    return Path(path).suffix.lower() in PARQUET_SUFFIXES or is_annotations(path) or opens_as_vector(path)


def describe_vector(path: str) -> dict[str, Any]:
    """Describe the features and columns of a vector file as plain values, with the values of columns that have few.

    Raises:
        InputError: The file can't be read, or has several layers and none is given.
    """
    frame = _read_table(path)
    columns = [name for name in frame.columns if name != frame.geometry.name]
    values = {name: _counted(frame[name]) for name in columns}
    few = {name: found for name, found in values.items() if len(found) <= _MAX_VALUES}
    bounds = [float(f"{value:.8g}") for value in frame.total_bounds] if len(frame) else None
    return {
        "features": len(frame),
        "geometry": dict(Counter(frame.geom_type.dropna())),
        "CRS": None if frame.crs is None else crs_name(frame.crs),
        "bounds_crs": bounds,
        "columns": columns,
        **{f"values of {name}": {str(key): int(num) for key, num in found.items()} for name, found in few.items()},
    }


def _counted(column: Any) -> dict[Any, int]:
    comparable = column.map(hashable_value) if column.dtype == object else column
    found: dict[Any, int] = comparable.value_counts(dropna=False).to_dict()
    return found


def _read_table(path: str) -> Any:
    """Read a layer of a vector file with all its columns, as geopandas frame.

    Raises:
        InputError: The file can't be read, or has several layers and none is given.
    """
    if (frame := read_annotations(split_layer(path)[0])) is not None:
        frame["classification"] = frame["classification"].map(class_name)
        return frame
    if Path(path).suffix.lower() in PARQUET_SUFFIXES:
        with reading_path(path) as found:
            try:
                return gpd.read_parquet(found)
            except (ValueError, OSError) as error:
                raise InputError(f"can't open {path} as GeoParquet: {reason_line(error)}") from error
    file, layer = split_layer(path)
    try:
        with reading_path(file) as found:
            layers = [str(name) for name, kind in pyogrio.list_layers(found) if kind is not None]
            return gpd.read_file(found, layer=chosen_layer(file, layers, layer), engine="pyogrio", on_invalid="ignore")
    except (DataSourceError, DataLayerError) as error:
        raise InputError(f"can't open {path} as a vector file: {reason_of(error)}") from error
