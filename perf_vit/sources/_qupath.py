"""GeoJSON of QuPath, in the forms that its versions and programs around it write."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import geopandas as gpd
import shapely
import shapely.geometry

from perf_vit.errors import InputError

__all__ = ["FrameName", "class_name", "is_ignored_class", "is_qupath", "read_qupath"]

FrameName = Literal["QuPath", "level 0"]
"""Origin of coordinates in pixels of level 0: the upper left corner of what QuPath shows, or of the whole level."""

_SUFFIXES = (".geojson", ".json")

# Keys that QuPath writes (since 0.2), and members that GDAL doesn't read.
_MARKS = (b'"objectType"', b'"object_type"', b'"isLocked"', b'"colorRGB"', b'"PathAnnotationObject"', b'"frame"')
_COLLECTIONS = (b'"GeometryCollection"', b'"FeatureCollection"')

_GEOMETRIES = ("Point", "MultiPoint", "LineString", "MultiLineString", "Polygon", "MultiPolygon", "GeometryCollection")


def is_qupath(path: str) -> bool:
    """Return whether a file is GeoJSON of QuPath, by its name and keys: a list, or collections in collections, too.

    GeoJSON with a CRS is of a GIS.
    """
    if not path.lower().endswith(_SUFFIXES) or not Path(path).is_file() or Path(path).stat().st_size == 0:
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        if text[:64].removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            return True
        first = text.find(_COLLECTIONS[1])
        nested = first >= 0 and text.find(_COLLECTIONS[1], first + 1) >= 0
        return text.find(b'"crs"') < 0 and (nested or any(text.find(m) >= 0 for m in (*_MARKS, _COLLECTIONS[0])))


def read_qupath(path: str) -> Any:
    """Read the objects of a file as geopandas frame, in file order, children after their parents.

    The column `classification` is there whether or not objects have a class. `attrs["frame"]` names the frame of the
    coordinates: QuPath's, unless the file's member `frame` is "level 0".

    Raises:
        InputError: It isn't GeoJSON.
    """
    try:
        content = json.loads(Path(path).read_bytes())
        features = [each for each in _features(content) if _properties(each).get("objectType") != "root"]
    except OSError as error:
        raise InputError(f"can't open {path}: {str(error.strerror).lower()}") from error
    # RecursionError: collections in each other a thousand times.
    except (ValueError, RecursionError) as error:
        hint = "; COCO files label objects, for detectors" if path.lower().endswith(".json") else ""
        raise InputError(f"{path} is not GeoJSON: {error or 'it is too deep'}{hint}") from error
    names = dict.fromkeys(["classification", *(name for each in features for name in _properties(each))])
    columns = {name: [_properties(each).get(name) for each in features] for name in names if name != "geometry"}
    frame = gpd.GeoDataFrame(columns, geometry=[_shape(each.get("geometry")) for each in features], crs="EPSG:4326")
    frame.attrs["frame"] = _frame_of(content, path)
    return frame


def _features(content: Any) -> Iterator[dict[str, Any]]:
    """Yield the features of a collection, a list, a feature or a geometry, and those inside of them."""
    if isinstance(content, list):
        for each in content:
            yield from _features(each)
        return
    kind = content.get("type") if isinstance(content, dict) else None
    if kind == "FeatureCollection":
        yield from _features(content.get("features") or [])
    elif kind == "Feature":
        yield content
        for place in (content, _properties(content)):
            yield from _features(place.get("childObjects") or [])
    elif kind in _GEOMETRIES:
        yield {"geometry": content}
    else:
        got = f"type {kind!r}" if isinstance(content, dict) else repr(content)[:40]
        raise ValueError(f"expected features, collections of them or geometries, got {got}")


def _properties(feature: dict[str, Any]) -> dict[str, Any]:
    found = feature.get("properties")
    return found if isinstance(found, dict) else {}


def _shape(geometry: Any) -> Any:
    """Return a shapely geometry; None for no or an unusable one, such as a ring of two points."""
    if not isinstance(geometry, dict) or geometry.get("type") not in _GEOMETRIES:
        return None
    try:
        return shapely.geometry.shape(geometry)
    # Coordinates of other types or lengths raise many kinds of errors.
    except Exception:
        return None


def _frame_of(content: Any, path: str) -> FrameName:
    given = content.get("frame") if isinstance(content, dict) else None
    if given not in (None, "QuPath", "level 0"):
        raise InputError(f'frame of {path} must be "QuPath" or "level 0", got {given!r}; correct it or leave it out')
    return "level 0" if given == "level 0" else "QuPath"


def is_ignored_class(name: Any) -> bool:
    """Return whether a class is QuPath's `Ignore*`, "what should not be further measured", or derived from it."""
    return isinstance(name, str) and name.split(":")[0].strip() == "Ignore*"


def class_name(value: Any) -> Any:
    """Return the name of QuPath's classification, None for none; other values as they are.

    Args:
        value: Mapping with `name`, since QuPath 0.4 also `names` of a derived class, and a colour; or text of one.
    """
    found = value
    # Whether a JSON object comes as text depends on the version of pyogrio.
    if isinstance(value, str) and value.startswith("{"):
        try:
            found = json.loads(value)
        except ValueError:
            return value
    if not isinstance(found, dict):
        return value
    if isinstance(found.get("names"), list):
        return ": ".join(map(str, found["names"])) or None
    if "name" in found:
        return found["name"]
    return None if {"color", "colorRGB"} & set(found) else value
