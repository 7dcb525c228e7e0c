"""Objects as tables with a CRS: GeoPackage, GeoParquet, GeoJSON."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import geopandas as gpd
import numpy as np
import pyogrio
from affine import Affine
from pyogrio.errors import DataLayerError, DataSourceError, FeatureError

from perf_vit.sources.vector_file import layer_name, writing_path
from perf_vit.writers._objects import ObjectTable

__all__ = ["write_gis"]

# GeoPackages store the time of their last change; a fixed one makes files reproducible.
_EPOCH = "1970-01-01T00:00:00.000Z"


def write_gis(
    path: Path,
    table: ObjectTable,
    kind: Literal["gpkg", "geoparquet", "geojson"],
    *,
    layer: str,
    crs: Any,
    transform: Affine,
) -> None:
    """Write objects in map coordinates, GeoJSON in longitude and latitude.

    Args:
        path: Output file.
        table: Objects.
        kind: File format.
        layer: Layer name of a GeoPackage.
        crs: CRS of the source.
        transform: Transform from pixels (column, row) to CRS coordinates.

    Raises:
        OSError: The file can't be written, e.g. because the disk is full.
    """
    frame = gpd.GeoDataFrame(_columns(table), geometry=table.placed(transform), crs=crs.to_wkt())
    if kind == "geoparquet":
        with writing_path(path) as made:
            frame.to_parquet(made, index=False)
        return
    options: dict[str, Any] = {"driver": "GPKG", "layer": layer_name(layer)}
    if kind == "geojson":
        # RFC7946 reprojects to EPSG:4326 and orients rings; its 7 decimals are about a centimetre.
        options = {"driver": "GeoJSON", "RFC7946": "YES", "layer": layer_name(layer)}
    try:
        with _fixed_date(), writing_path(path) as made:
            pyogrio.write_dataframe(frame, made, **options)
            if not _is_complete(made, kind):
                raise OSError(f"{path.name} was cut while it was written; the disk may be full")
    except (DataSourceError, DataLayerError, FeatureError) as error:
        raise OSError(str(error)) from error


def _is_complete(path: Path, kind: str) -> bool:
    """Return whether a file is complete: on a full disk GDAL writes part of it without an error."""
    if kind == "geojson":
        with path.open("rb") as file:
            file.seek(-min(path.stat().st_size, 16), os.SEEK_END)
            return file.read().rstrip().endswith(b"]\n}")
    try:
        with closing(sqlite3.connect(path)) as database:
            # The spatial index is written last.
            last = database.execute("SELECT 1 FROM sqlite_master WHERE name LIKE 'rtree_%'").fetchone()
            return last is not None and database.execute("PRAGMA quick_check").fetchone() == ("ok",)
    except sqlite3.Error:
        return False


def _columns(table: ObjectTable) -> dict[str, Any]:
    names = np.array(table.class_names, object)
    return {"class": names[table.labels], "label": table.labels.astype(np.int32), **table.measurements}


@contextmanager
def _fixed_date() -> Iterator[None]:
    before = pyogrio.get_gdal_config_option("OGR_CURRENT_DATE")
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": _EPOCH})
    try:
        yield
    finally:
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": before})
