"""QuPath GeoJSON of objects, in pixels of the slide's level 0."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from affine import Affine

from perf_vit.plotting import default_colormap
from perf_vit.text import to_json
from perf_vit.writers._objects import ObjectTable

__all__ = ["write_qupath"]

_NAMESPACE = uuid.UUID("6d0b8a0e-6d1c-5d0e-9f43-2c5f3ac0e9b1")
_DECIMALS = 2


def write_qupath(
    path: Path, table: ObjectTable, *, object_type: str, scale: Affine, background: int | None = None
) -> None:
    """Write a FeatureCollection, feature by feature.

    Args:
        path: Output file.
        table: Objects.
        object_type: "detection" or "annotation".
        scale: Transform from source pixels to pixels of level 0.
        background: Index of the background class; None for none.
    """
    colors = default_colormap(len(table.class_names), background)
    classes = [
        {"name": name, "color": list(map(int, colors[index][:3]))} for index, name in enumerate(table.class_names)
    ]
    with path.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for index, polygon in enumerate(table.placed(scale)):
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
