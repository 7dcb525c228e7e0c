"""Objects as a scene holds them, in its pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import shapely

from perf_vit.geometry.boxes import oriented_box_corners

__all__ = ["ObjectKind", "Objects", "object_bounds", "object_polygons"]

ObjectKind = Literal["boxes", "oriented_boxes", "polygons"]


@dataclass(frozen=True, slots=True)
class Objects:
    """The objects of a scene, by falling score.

    Attributes:
        kind: what `geometry` holds.
        geometry: in the scene's pixels: `boxes` [n, 4] left, top, right, bottom; `oriented_boxes` [n, 5] centre x,
            centre y, width, height, angle in radians; `polygons` [n] shapely polygons.
        scores: [n] float32.
        labels: [n] int32, class indices.
    """

    kind: ObjectKind
    geometry: npt.NDArray[Any]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.scores)

    def bounds(self) -> npt.NDArray[np.float64]:
        """Upright boxes around the objects, [n, 4]."""
        return object_bounds(self.kind, self.geometry)

    def polygons(self) -> npt.NDArray[Any]:
        """The objects as shapely polygons, [n]."""
        return object_polygons(self.kind, self.geometry)


def object_bounds(kind: ObjectKind, geometry: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Upright boxes around objects, [n, 4]."""
    if kind == "boxes":
        return geometry
    if kind == "oriented_boxes":
        corners = oriented_box_corners(geometry)
        return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    return np.asarray(shapely.bounds(geometry), np.float64).reshape(-1, 4)


def object_polygons(kind: ObjectKind, geometry: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Objects as shapely polygons, [n]."""
    if kind == "boxes":
        return np.asarray(shapely.box(*geometry.T), object)
    if kind == "oriented_boxes":
        return np.asarray(shapely.polygons(oriented_box_corners(geometry)), object)
    return geometry
