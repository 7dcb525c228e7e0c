"""A model's detections, checked and turned into arrays of the scene's pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio.features
import shapely
import torch
from scipy import ndimage
from torch import Tensor

from perf_vit.errors import InputError
from perf_vit.inference.detections import ObjectKind, Objects
from perf_vit.types import Detections, Window

__all__ = ["scene_objects"]


def scene_objects(detections: Detections, window: Window, score_threshold: float) -> Objects:
    """The detections of a window whose score is at least the threshold, moved to the scene's pixels.

    Objects without area are left out.

    Args:
        detections: of the window's tile.
        window: where the tile lies in the scene.
        score_threshold: lowest score to keep.

    Raises:
        InputError: no or several geometries, shapes that don't go together, or coordinates that are not finite.
    """
    scores = _array(detections.scores).astype(np.float32)
    labels = _array(detections.labels).astype(np.int32)
    kind, given = _only_geometry(detections)
    _check(kind, given, scores, labels, window)
    kept = np.flatnonzero(scores >= score_threshold)
    geometry = _place(kind, given[kept], window)
    solid = _has_area(_kind_of(kind), geometry)
    kept = kept[solid]
    return Objects(_kind_of(kind), geometry[solid], scores[kept], labels[kept])


def _array(values: Any) -> npt.NDArray[Any]:
    if isinstance(values, Tensor):
        # numpy has no bfloat16.
        values = values.float() if values.dtype == torch.bfloat16 else values
        return np.asarray(values.detach().cpu().numpy())
    return np.asarray(values)


def _only_geometry(detections: Detections) -> tuple[str, npt.NDArray[Any]]:
    names = ("boxes_xyxy", "oriented_boxes", "masks", "polygons")
    given = [name for name in names if getattr(detections, name) is not None]
    if len(given) != 1:
        raise InputError(f"expected detections with one of {', '.join(names)}, got {', '.join(given) or 'none'}")
    values = getattr(detections, given[0])
    if given[0] != "polygons":
        return given[0], _array(values)
    polygons = np.empty(len(values), object)
    polygons[:] = list(values)
    return given[0], polygons


def _check(
    kind: str, geometry: npt.NDArray[Any], scores: npt.NDArray[Any], labels: npt.NDArray[Any], window: Window
) -> None:
    num = len(scores)
    expected = {"boxes_xyxy": (num, 4), "oriented_boxes": (num, 5), "masks": (num, *window.shape), "polygons": (num,)}
    if scores.shape != (num,) or labels.shape != (num,) or geometry.shape != expected[kind]:
        raise InputError(
            f"expected scores [n], labels [n] and {kind} {['n', *expected[kind][1:]]} of the same n, got "
            f"{list(scores.shape)}, {list(labels.shape)} and {list(geometry.shape)}"
        )
    if kind in {"boxes_xyxy", "oriented_boxes"} and not np.isfinite(geometry).all():
        raise InputError(f"{kind} of the window at row {window.row}, column {window.col} are not all finite numbers")


def _kind_of(name: str) -> ObjectKind:
    if name == "boxes_xyxy":
        return "boxes"
    return "oriented_boxes" if name == "oriented_boxes" else "polygons"


def _place(name: str, geometry: npt.NDArray[Any], window: Window) -> npt.NDArray[Any]:
    if name == "boxes_xyxy":
        return np.add(geometry, (window.col, window.row, window.col, window.row), dtype=np.float64)
    if name == "oriented_boxes":
        return np.add(geometry, (window.col, window.row, 0, 0, 0), dtype=np.float64)
    polygons = _outlines(geometry) if name == "masks" else _repaired(geometry)
    if len(polygons) == 0:
        return polygons
    moved: npt.NDArray[Any] = shapely.transform(polygons, lambda xy: np.add(xy, (window.col, window.row)))
    return moved


def _outlines(masks: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Masks [n, h, w] as polygons along the pixels' edges, [n]."""
    outlines = np.empty(len(masks), object)
    for index, mask in enumerate(masks):
        outlines[index] = _outline(mask.astype(np.uint8))
    return outlines


def _outline(mask: npt.NDArray[np.uint8]) -> Any:
    place = ndimage.find_objects(mask)
    if not place:
        return shapely.Polygon()
    rows, cols = place[0]
    part = mask[rows, cols]
    rings = [shape for shape, _ in rasterio.features.shapes(part, mask=part.astype(bool), connectivity=4)]
    parts = [shapely.Polygon(s["coordinates"][0], s["coordinates"][1:]) for s in rings]
    whole = parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)
    # Parts that meet at a corner make a valid multipolygon; a ring that touches itself there doesn't.
    whole = shapely.make_valid(whole, method="structure", keep_collapsed=False)
    return shapely.transform(whole, lambda xy: np.add(xy, (cols.start, rows.start)))


def _repaired(polygons: npt.NDArray[Any]) -> npt.NDArray[Any]:
    polygons = polygons.copy()
    broken = ~shapely.is_valid(polygons)
    polygons[broken] = shapely.make_valid(polygons[broken], method="structure", keep_collapsed=False)
    return polygons


def _has_area(kind: ObjectKind, geometry: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    if kind == "boxes":
        return np.asarray((geometry[:, 2:] > geometry[:, :2]).all(axis=1))
    if kind == "oriented_boxes":
        return np.asarray((geometry[:, 2:4] > 0).all(axis=1))
    return np.asarray(shapely.area(geometry) > 0)
