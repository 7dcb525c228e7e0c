"""Objects as tables with a CRS: GeoPackage, GeoParquet, GeoJSON; QuPath GeoJSON, in the coordinates of QuPath."""

from __future__ import annotations

import os
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import geopandas as gpd
import numpy as np
import pyogrio
import shapely
from affine import Affine
from pyogrio.errors import DataLayerError, DataSourceError, FeatureError

from perf_vit.plotting import default_colormap
from perf_vit.plotting.colors import on_light_color
from perf_vit.sources.slides.frame import SlideFrame
from perf_vit.sources.vector_file import layer_name, writing_path
from perf_vit.text import to_json
from perf_vit.writers._objects import ObjectTable

__all__ = ["write_gis", "write_qupath"]

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


# GDAL's options are those of all threads.
_DATE_LOCK = Lock()


@contextmanager
def _fixed_date() -> Iterator[None]:
    with _DATE_LOCK:
        before = pyogrio.get_gdal_config_option("OGR_CURRENT_DATE")
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": _EPOCH})
        try:
            yield
        finally:
            pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": before})


_NAMESPACE = uuid.UUID("6d0b8a0e-6d1c-5d0e-9f43-2c5f3ac0e9b1")
_DECIMALS = 2


def write_qupath(
    path: Path, table: ObjectTable, *, object_type: str, frame: SlideFrame | None, background: int | None = None
) -> None:
    """Write a FeatureCollection, feature by feature.

    Args:
        path: Output file.
        table: Objects.
        object_type: "detection" or "annotation".
        frame: Coordinates of the slide, which the file names; None for rasters, whose pixels are written.
        background: Index of the background class; None for none.
    """
    colors = default_colormap(len(table.class_names), background)
    classes = [{"name": name, "color": on_light_color(colors[index])} for index, name in enumerate(table.class_names)]
    place = Affine.identity() if frame is None else frame.to_qupath
    named = "" if frame is None else to_json(frame.described())[1:-1] + ", "
    with path.open("w", encoding="utf-8") as file:
        file.write(f'{{"type": "FeatureCollection", {named}"features": [')
        for index, polygon in enumerate(table.placed(place)):
            properties: dict[str, Any] = {
                "objectType": object_type,
                "classification": classes[table.labels[index]],
                "measurements": table.measurements_of(index),
            }
            file.write(",\n" if index else "\n")
            file.write(to_json(_feature(index, polygon, properties)))
        file.write("\n]}\n")


def _feature(index: int, polygon: Any, properties: dict[str, Any]) -> dict[str, Any]:
    geometry = shapely.geometry.mapping(shapely.transform(polygon, lambda xy: np.round(xy, _DECIMALS)))
    # QuPath requires a UUID; derived from index and content, it is reproducible.
    content = to_json([index, geometry, properties])
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_NAMESPACE, content)),
        "geometry": geometry,
        "properties": properties,
    }
