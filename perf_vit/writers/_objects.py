"""Table of objects to write: outlines, classes, scores and oriented box parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from affine import Affine

from perf_vit.errors import OutputError
from perf_vit.geometry.boxes import oriented_box_corners
from perf_vit.sources.pixel_size import pixel_lengths, polygon_areas
from perf_vit.types import Source

__all__ = ["ObjectTable", "tidy_polygons"]

# Names of the oriented box parameters in all formats.
_BOX_FIELDS = ("cx_px", "cy_px", "width_px", "height_px", "angle_rad")


@dataclass(frozen=True, slots=True)
class ObjectTable:
    """Objects in the form that all formats write.

    Attributes:
        polygons: Shapely polygons or multipolygons in source pixels, [n].
        labels: Class indices, [n].
        class_names: Name of each class.
        scores: Scores, [n]; None for objects without, such as the areas of a class map.
        oriented_boxes: Centre x, centre y, width, height in pixels and angle in radians, [n, 5]; None for other
            objects.
        areas: Areas, [n], and the name of their column, such as "area_m2".
    """

    polygons: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    scores: npt.NDArray[np.float64] | None
    oriented_boxes: npt.NDArray[np.float64] | None
    areas: tuple[str, npt.NDArray[np.float64]] | None = None

    @classmethod
    def make(cls, geometries: Any, scores: Any, labels: Any, class_names: Sequence[str]) -> ObjectTable:
        """Build the table from boxes, oriented boxes or polygons with classes and scores.

        Raises:
            OutputError: Array lengths differ, numbers are not finite, polygons are empty, or a label has no class name.
        """
        polygons, oriented_boxes = _outlines(geometries)
        labels = np.asarray(labels, np.int64)
        # Shortest decimal that represents the model's float32: 0.9, not 0.8999999761581421.
        scores = None if scores is None else np.array([float(str(score)) for score in np.asarray(scores)], float)
        if labels.shape != polygons.shape or (scores is not None and scores.shape != polygons.shape):
            got = f"{len(labels)} labels" + ("" if scores is None else f" and {len(scores)} scores")
            raise OutputError(f"expected a label and a score for each of {len(polygons)} objects, got {got}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
            raise OutputError(
                f"labels run from {labels.min()} to {labels.max()}, but there are {len(class_names)} class names, "
                f"for 0 to {len(class_names) - 1}: {', '.join(class_names)}"
            )
        finite = np.isfinite(shapely.bounds(polygons)).reshape(-1, 4).all(axis=1)
        finite &= True if scores is None else np.isfinite(scores)
        if not finite.all():
            raise OutputError(f"scores and coordinates must be finite; those of object {finite.argmin()} are not")
        return cls(polygons, labels, tuple(class_names), scores, oriented_boxes)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def measurements(self) -> dict[str, npt.NDArray[np.float64]]:
        """Return the measurements of all objects by name, [n] each, written as columns, measurements or keys."""
        found = {} if self.scores is None else {"score": self.scores}
        if self.areas is not None:
            found[self.areas[0]] = self.areas[1]
        if self.oriented_boxes is not None:
            found.update(zip(_BOX_FIELDS, self.oriented_boxes.T, strict=True))
        return found

    def with_areas(self, source: Source) -> ObjectTable:
        """Return the table with the areas of the objects on the ground, or in the slide."""
        areas, unit = polygon_areas(source, self.polygons)
        # More digits than any outline has.
        return replace(self, areas=(f"area_{unit}", np.array([float(f"{area:.6g}") for area in areas])))

    def measurements_of(self, index: int) -> dict[str, float]:
        """Return the measurements of one object by name."""
        return {name: float(values[index]) for name, values in self.measurements.items()}

    def placed(self, transform: Affine) -> npt.NDArray[Any]:
        """Return the polygons in the coordinates of a transform, [n]."""
        if len(self) == 0 or transform.is_identity:
            return self.polygons
        matrix = np.array([[transform.a, transform.d], [transform.b, transform.e]])
        moved: npt.NDArray[Any] = shapely.transform(self.polygons, lambda xy: xy @ matrix + (transform.c, transform.f))
        return moved


def _outlines(geometries: Any) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64] | None]:
    values = geometries if isinstance(geometries, np.ndarray) else np.array(list(geometries))
    if values.ndim == 2 and values.shape[1] == 4:
        return np.asarray(shapely.box(*values.astype(np.float64).T), object), None
    if values.ndim == 2 and values.shape[1] == 5:
        boxes = values.astype(np.float64)
        return np.asarray(shapely.polygons(oriented_box_corners(boxes)), object), boxes
    if values.ndim == 1 and set(shapely.get_type_id(values.astype(object)).tolist()) <= {3, 6}:
        return values.astype(object), None
    raise OutputError(
        "expected polygons [n], boxes_xyxy [n, 4] or oriented boxes [n, 5] as geometries, got "
        f"{values.dtype} {list(values.shape)}"
    )


def tidy_polygons(
    polygons: npt.NDArray[Any], source: Source, *, min_area: float = 0, simplify: float = 0
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Simplify polygons and tell which are large enough.

    Args:
        polygons: Shapely polygons or multipolygons in source pixels, [n].
        source: Scene or slide of the polygons.
        min_area: Smallest area, in square metres of rasters with a CRS, square micrometres of slides with a known pixel
            size, else pixels.
        simplify: Largest displacement of an outline, in metres, micrometres or pixels; 0 keeps all corners.

    Returns:
        Polygons, [n], and whether each is large enough before simplification, [n].
    """
    if len(polygons) == 0:
        return polygons, np.zeros(0, bool)
    kept = polygon_areas(source, polygons)[0] >= min_area if min_area > 0 else np.ones(len(polygons), bool)
    if simplify > 0:
        of_pixels = pixel_lengths(source, shapely.get_coordinates(shapely.centroid(polygons)))
        polygons = shapely.simplify(polygons, simplify / of_pixels, preserve_topology=True)
    return polygons, kept
