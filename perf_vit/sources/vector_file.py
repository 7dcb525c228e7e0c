"""Reading and writing of vector files with any file name."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow.parquet
import pyogrio
import shapely
from pyogrio.errors import DataLayerError, DataSourceError

from perf_vit.errors import DataWarning, InputError, reason_line
from perf_vit.sources._asap import read_asap
from perf_vit.sources._gdal import reason_of
from perf_vit.sources._qupath import FrameName, class_name, is_qupath, read_qupath
from perf_vit.sources.files import PARQUET_SUFFIXES, is_asap, split_layer

__all__ = [
    "chosen_layer",
    "hashable_value",
    "is_annotations",
    "layer_name",
    "opens_as_vector",
    "read_annotations",
    "read_columns",
    "read_features",
    "reading_path",
    "slide_frame",
    "writing_path",
]

# pyogrio parses names as URLs: it drops the part after ";" and control characters, and "!" separates the path in an
# archive.
_URL_MARKS = frozenset(";!?\t\r\n")

# GDAL refuses a GeoPackage's layer whose name begins with one of these.
_NOT_FIRST = "`~!@#$%^&*()+-={}|[]\\:\";'<>?,./"


_OTHER_FILES = {
    ".json": "; COCO files label objects, for detectors",
    ".xml": "; of XML, annotations of ASAP are read, so export GeoJSON from other viewers",
}
"""Advice for files that are of none of the formats, by suffix."""


def layer_name(stem: str) -> str:
    """Return a layer name from a file name, without leading characters that GeoPackage doesn't allow."""
    return _unicode(stem).lstrip(_NOT_FIRST) or "objects"


@contextmanager
def writing_path(path: Path) -> Iterator[Path]:
    """Yield the path to write a single file at, which is moved to `path` when the block ends."""
    if _is_plain(str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        # The file itself is written next to `path`, on the same disk.
        made = Path(folder, "target", f"made{path.suffix}")
        made.parent.symlink_to(path.absolute().parent, target_is_directory=True)
        yield made
        os.replace(path.absolute().parent / made.name, path)


@contextmanager
def reading_path(path: str) -> Iterator[str]:
    """Yield a path at which GDAL can read a file and its side-car files; missing files stay unchanged."""
    if _is_plain(path) or not Path(path).is_file():
        yield path
        return
    source = Path(path).absolute()
    with tempfile.TemporaryDirectory() as folder:
        for each in source.parent.iterdir():
            if each.name.startswith(f"{source.stem}."):
                Path(folder, f"file{each.name[len(source.stem) :]}").symlink_to(each)
        yield str(Path(folder, f"file{source.suffix}"))


def _is_plain(path: str) -> bool:
    return not _URL_MARKS & set(path) and _unicode(path) == path == path.strip()


def _unicode(text: str) -> str:
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def opens_as_vector(path: str) -> bool:
    """Return whether a file with another suffix can be opened as a vector file."""
    try:
        with reading_path(split_layer(path)[0]) as file:
            return len(pyogrio.list_layers(file)) > 0
    except DataSourceError:
        return False


def read_features(path: str, attribute: str | None, *, required: bool = True) -> Any:
    """Read the geometries of a layer of a vector file and one of its columns, as geopandas frame.

    Args:
        path: Vector file; with several layers as `FILE|layername=LAYER`.
        attribute: Column to read; not required for a file without features.
        required: Whether the column must be there; otherwise a missing one is None for all features.

    Raises:
        InputError: The file can't be read, has several layers and none is given, or lacks the layer or column.
    """
    try:
        with warnings.catch_warnings():
            # The error below reports damaged files once.
            warnings.simplefilter("ignore", RuntimeWarning)
            frame = _read(path, attribute, required=required)
    except (DataSourceError, DataLayerError) as error:
        # GDAL appends advice for programmers.
        reason = reason_of(error).split("; It might")[0]
        hint = _OTHER_FILES.get(Path(split_layer(path)[0]).suffix.lower(), "")
        raise InputError(f"can't open {path} as a vector file: {reason}{hint}") from error
    if attribute is not None and attribute not in frame and not required:
        frame[attribute] = None
    if attribute is not None and attribute in frame:
        frame[attribute] = frame[attribute].map(lambda value: hashable_value(class_name(value))).astype(object)
    return _areas_of(_without_shapeless(frame, path), path)


def is_annotations(path: str) -> bool:
    """Return whether a file is of QuPath or ASAP."""
    return is_qupath(path) or is_asap(path)


def read_annotations(path: str) -> Any:
    """Read a file of QuPath or ASAP with all columns, as geopandas frame; None for other files.

    `attrs["frame"]` of the frame is the `FrameName` of the coordinates.

    Raises:
        InputError: The file can't be read.
    """
    if is_qupath(path):
        return read_qupath(path)
    return read_asap(path) if is_asap(path) else None


def _columns_of(frame: Any) -> list[str]:
    return [str(name) for name in frame.columns if name != frame.geometry.name]


def slide_frame(frame: Any) -> FrameName:
    """Return the frame of the coordinates of `read_features` on a slide; QuPath's, unless the file says otherwise."""
    found: FrameName = frame.attrs.get("frame", "QuPath")
    return found


def read_columns(path: str) -> list[str]:
    """Return the names of the columns of a vector file's layer, without the geometry.

    Raises:
        InputError: The file can't be read, or has several layers and none is given.
    """
    file, layer = split_layer(path)
    if (frame := read_annotations(file)) is not None:
        return _columns_of(frame)
    try:
        with reading_path(file) as found:
            if Path(file).suffix.lower() in PARQUET_SUFFIXES:
                fields = pyarrow.parquet.read_metadata(found).schema.to_arrow_schema()
                geometry = json.loads((fields.metadata or {}).get(b"geo", b"{}")).get("primary_column", "geometry")
                return [name for name in fields.names if name != geometry]
            layers = [str(name) for name, kind in pyogrio.list_layers(found) if kind is not None]
            names: list[str] = pyogrio.read_info(found, layer=chosen_layer(file, layers, layer))["fields"].tolist()
            return names
    except (DataSourceError, DataLayerError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"can't open {path} as a vector file: {reason_line(error)}") from error


def _read(path: str, attribute: str | None, *, required: bool) -> Any:
    file, layer = split_layer(path)
    if (frame := read_annotations(file)) is not None:
        wanted = _column(path, _columns_of(frame), len(frame), attribute, required)
        return frame[[*wanted, frame.geometry.name]]
    if Path(file).suffix.lower() in PARQUET_SUFFIXES:
        return _read_parquet(path, attribute, required=required)
    with reading_path(file) as found:
        layers = [str(name) for name, kind in pyogrio.list_layers(found) if kind is not None]
        layer = chosen_layer(file, layers, layer)
        info = pyogrio.read_info(found, layer=layer, force_feature_count=True)
        wanted = _column(path, info["fields"].tolist(), info["features"], attribute, required)
        # Invalid rings shouldn't prevent reading the rest.
        return gpd.read_file(found, layer=layer, engine="pyogrio", columns=wanted, on_invalid="ignore")


def _read_parquet(path: str, attribute: str | None, *, required: bool) -> Any:
    try:
        with reading_path(path) as found:
            file = pyarrow.parquet.read_metadata(found)
            geo = (file.metadata or {}).get(b"geo")
            if geo is None:
                raise InputError(f"{path} is a Parquet file without geometries; write it as GeoParquet")
            geometry = json.loads(geo)["primary_column"]
            fields = [name for name in file.schema.to_arrow_schema().names if name != geometry]
            wanted = _column(path, fields, file.num_rows, attribute, required)
            return gpd.read_parquet(found, columns=[*wanted, geometry]).reset_index(drop=True)
    except (OSError, KeyError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"can't open {path} as GeoParquet: {reason_line(error)}") from error


def _column(path: str, columns: list[str], num_features: int, attribute: str | None, required: bool) -> list[str]:
    """Return the columns to read, i.e. the attribute, if any."""
    if attribute is None or num_features == 0:
        # A GeoJSON file without features has no columns.
        return []
    if attribute not in columns and not required:
        return []
    if attribute not in columns:
        raise InputError(f"attribute {attribute!r} is not a column of {path}; columns: {', '.join(columns) or '-'}")
    return [attribute]


def chosen_layer(file: str, layers: list[str], layer: str | None) -> str:
    """Return the given layer, or the only one."""
    if layer in layers:
        return str(layer)
    if layer is not None:
        raise InputError(f"{file} has no layer {layer}; its layers are {', '.join(layers) or 'none'}")
    if len(layers) != 1:
        hint = f"; choose one as '{file}|layername={layers[0]}'" if layers else ""
        raise InputError(f"expected one layer of polygons in {file}, got {', '.join(layers) or 'none'}{hint}")
    return layers[0]


def _areas_of(frame: Any, path: str) -> Any:
    """Reduce collections to their polygons, and leave out points and lines of viewers' files, which hold both."""
    shapes = frame.geometry.to_numpy().copy()
    mixed = np.flatnonzero(shapely.get_type_id(shapes) == shapely.GeometryType.GEOMETRYCOLLECTION)
    for index in mixed.tolist():
        parts = shapely.get_parts(shapely.get_parts(shapes[index]))
        polygons = parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON]
        shapes[index] = shapely.multipolygons(polygons) if len(polygons) else shapes[index]
    areas = np.isin(shapely.get_type_id(shapes), (shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON))
    if len(mixed):
        frame = frame.set_geometry(gpd.GeoSeries(shapes, index=frame.index, crs=frame.crs))
    if areas.all() or not areas.any() or "frame" not in frame.attrs:
        return frame
    warnings.warn(
        f"{(~areas).sum()} of {len(areas)} objects of {path} are points or lines and are left out, the first is "
        f"number {frame.index[int(np.argmin(areas))] + 1}",
        DataWarning,
        stacklevel=4,
    )
    return frame[areas]


def _without_shapeless(frame: Any, path: str) -> Any:
    """Remove features without usable geometry, such as null geometries and outlines with too few points."""
    shapeless = np.array(frame.geometry.isna() | frame.geometry.is_empty)
    coordinates, owners = shapely.get_coordinates(frame.geometry.to_numpy(), return_index=True)
    shapeless[owners[~np.isfinite(coordinates).all(axis=1)]] = True
    if not shapeless.any():
        return frame
    warnings.warn(
        f"{shapeless.sum()} of {len(frame)} features of {path} have no usable geometry and are left out, the first is "
        f"number {int(np.argmax(shapeless)) + 1}",
        DataWarning,
        stacklevel=4,
    )
    return frame[~shapeless]


def hashable_value(value: Any) -> Any:
    """Return a value of a column, as text if it is a list or mapping, which can't be counted or compared."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return value if isinstance(value, Hashable) else str(value)
