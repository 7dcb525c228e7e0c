"""Objects as a model gives them, in a tile's pixels, and as a scene holds them, in the scene's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import shapely

from perf_vit.ops.boxes import oriented_box_corners

__all__ = ["Detections", "ObjectKind", "Objects", "object_bounds", "object_polygons"]

ObjectKind = Literal["boxes", "oriented_boxes", "polygons"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Detections:
    """The objects of one tile, tensors or arrays, with exactly one kind of geometry.

    Attributes:
        scores: [n], higher is surer.
        labels: [n], class indices.
        boxes_xyxy: left, top, right, bottom in the tile's pixels, [n, 4].
        oriented_boxes: centre x, centre y, width, height in the tile's pixels and angle in radians, [n, 5]; width is
            at least height, and the angle lies in [-pi/2, pi/2).
        masks: which pixels of the tile each object covers, bool [n, h, w].
        polygons: n shapely polygons or multipolygons in the tile's pixels.
    """

    scores: Any
    labels: Any
    boxes_xyxy: Any = None
    oriented_boxes: Any = None
    masks: Any = None
    polygons: Any = None


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
