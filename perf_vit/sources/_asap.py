"""Annotations of ASAP, an XML file, as published with CAMELYON16 and CAMELYON17."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import shapely

from perf_vit.errors import InputError

__all__ = ["read_asap"]

# Groups of CAMELYON16 whose areas are cut out of the others, and other names of its class.
_EXCLUDED = frozenset({"_2", "Exclusion"})
_TUMOR = frozenset({"_0", "_1"})

_AREAS = frozenset({"Polygon", "Spline", "Rectangle"})


def read_asap(path: str) -> Any:
    """Read the annotations of a file as geopandas frame, in file order and in pixels of level 0.

    The column `classification` is the group, None for none; `name` and `type` are those of ASAP. Areas of the groups
    `Exclusion` and `_2` are cut out of all others. `_0` and `_1` are `Tumor`, as CAMELYON16 has them. Splines are taken
    through their points as polygons.

    Raises:
        InputError: The file is damaged.
    """
    try:
        annotations = list(ET.parse(path).getroot().iter("Annotation"))
        shapes = np.array([_shape(each) for each in annotations], object)
    except OSError as error:
        raise InputError(f"can't open {path}: {str(error.strerror).lower()}") from error
    except (ET.ParseError, ValueError) as error:
        raise InputError(f"can't read {path} as annotations of ASAP: {error}; it may be damaged") from error
    groups = [each.get("PartOfGroup", "None") for each in annotations]
    excluded = np.array([group in _EXCLUDED for group in groups], bool)
    columns = {
        "classification": [_class_of(group) for group in groups],
        "name": [each.get("Name") for each in annotations],
        "type": [each.get("Type") for each in annotations],
    }
    frame = gpd.GeoDataFrame(columns, geometry=_without(shapes, excluded))[~excluded]
    frame.attrs["frame"] = "level 0"
    return frame


def _shape(annotation: ET.Element) -> Any:
    corners = sorted(annotation.iter("Coordinate"), key=lambda corner: float(corner.get("Order", 0)))
    xy = [(_number(corner, "X"), _number(corner, "Y")) for corner in corners]
    if annotation.get("Type") not in _AREAS:
        return shapely.MultiPoint(xy)
    if annotation.get("Type") == "Rectangle" and len(xy) == 2:
        (left, top), (right, bottom) = xy
        return shapely.box(left, top, right, bottom)
    # Outlines drawn by hand cross themselves.
    return shapely.make_valid(shapely.Polygon(xy), method="structure", keep_collapsed=False) if len(xy) > 2 else None


def _number(corner: ET.Element, axis: str) -> float:
    # Some systems write a comma.
    value = float(corner.get(axis, "nan").replace(",", "."))
    if not math.isfinite(value):
        raise ValueError(f"a coordinate has {axis}={corner.get(axis)!r}")
    return value


def _class_of(group: str) -> str | None:
    return "Tumor" if group in _TUMOR else None if group == "None" else group


def _without(shapes: npt.NDArray[Any], excluded: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """Cut the excluded areas out of the areas of the others."""
    areas = np.isin(shapely.get_type_id(shapes), (3, 6))
    cut = shapely.union_all(shapes[excluded & areas])
    near = areas & ~excluded & shapely.intersects(shapes, cut)
    found = shapes.copy()
    found[near] = shapely.difference(shapes[near], cut)
    return found
