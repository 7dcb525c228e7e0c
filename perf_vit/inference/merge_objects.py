"""Joining the objects of overlapping windows: each once, none lost at a seam."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from perf_vit.errors import InputError
from perf_vit.geometry import Objects
from perf_vit.geometry.nms import IndexArray, Overlaps, greedy_nms
from perf_vit.geometry.objects import ObjectKind, object_bounds
from perf_vit.tiling import grid_windows
from perf_vit.types import BoolArray, Window

__all__ = ["ObjectStitcher"]

FloatArray = npt.NDArray[np.floating]

# An object whose bounds end this close to its window's edge is taken as cut by it.
_EDGE_PX = 1.0
# The part of a cut object that a whole one must cover to replace it.
_COVERED = 0.5


class ObjectStitcher:
    """Collect the objects of windows in any order, then give those of the scene.

    The cores of the windows, which end at the midlines of the overlaps, partition the extent. An object belongs to the
    window whose core holds its centre: whatever lies whole in a window and has its centre in another's core lies
    whole in that other window, too. So an object smaller than the overlap is seen whole by its owner, and is taken
    from there only. Beyond that rule:

    - Where two windows each place an object's centre in the other's core, and their outlines match, it is kept.
    - An object that is cut by its window's edge goes where a whole one of another window covers half of it.
    - Of objects of a class with IoU above the threshold, the one with the best score stays, whole ones first. Equal
      scores are decided by position, so neither the order of windows nor their batches matter.

    Memory is linear in objects.

    Args:
        extent: the part of the scene that the windows cover.
        window_size: side of a window, in pixels.
        overlap: pixels that neighbouring windows share.
        iou_threshold: of intersection over union.
    """

    def __init__(self, extent: Window, window_size: int, overlap: int, iou_threshold: float) -> None:
        windows = grid_windows(extent, window_size, overlap)
        self._extent = extent
        self._rows = _Axis(np.unique([window.row for window in windows]), window_size)
        self._cols = _Axis(np.unique([window.col for window in windows]), window_size)
        self._iou_threshold = iou_threshold
        self._parts: dict[int, _Candidates] = {}
        self._kind: ObjectKind | None = None

    def add(self, window: Window, objects: Objects, valid: BoolArray | None = None) -> Objects:
        """Take in a window's objects.

        Args:
            window: one of `grid_windows`, once.
            objects: in the scene's pixels.
            valid: where the source has data, [h, w]; objects with their centre elsewhere are left out. None for objects
                that an earlier call returned.

        Returns:
            The objects that may be among those of the scene.

        Raises:
            InputError: another kind of geometry than in an earlier window.
        """
        self._kind = self._kind or objects.kind
        if objects.kind != self._kind:
            raise InputError(f"expected {self._kind} from the model in every window, got {objects.kind}")
        bounds = objects.bounds()
        centers = (bounds[:, :2] + bounds[:, 2:]) / 2
        row, col = self._rows.index(window.row), self._cols.index(window.col)
        owner_rows, owner_cols = self._rows.owners(centers[:, 1]), self._cols.owners(centers[:, 0])
        part = _Candidates(
            geometry=objects.geometry,
            scores=objects.scores,
            labels=objects.labels,
            window=np.full(len(objects), row * len(self._cols) + col, np.int64),
            owner=owner_rows * len(self._cols) + owner_cols,
            cut=_cut(bounds, window, self._extent),
        )
        sizes = bounds[:, 2:] - bounds[:, :2]
        near = (self._cols.past_core(centers[:, 0], col) <= sizes[:, 0] / 2) & (
            self._rows.past_core(centers[:, 1], row) <= sizes[:, 1] / 2
        )
        wanted = part.owned | (near & ~part.cut)
        if valid is not None:
            wanted &= _holds(self._extent, window, centers, valid)
        part = self._parts[row * len(self._cols) + col] = part.take(wanted)
        return Objects(objects.kind, part.geometry, part.scores, part.labels)

    def finish(self) -> Objects:
        """The scene's objects, by falling score."""
        if self._kind is None:
            return Objects("boxes", np.zeros((0, 4)), np.zeros(0, np.float32), np.zeros(0, np.int32))
        parts = _Candidates.join([self._parts[index] for index in sorted(self._parts)])
        self._parts.clear()
        parts = parts.take(np.concatenate([np.flatnonzero(parts.owned), self._confirmed(parts)]))
        parts = parts.take(_ranks(self._kind, parts, tiers=parts.cut))
        overlaps = Overlaps(self._kind, parts.geometry)

        def replaces(shared: FloatArray, first: IndexArray, second: IndexArray) -> BoolArray:
            covered = parts.cut[second] & ~parts.cut[first] & (parts.window[first] != parts.window[second])
            covered &= shared >= _COVERED * overlaps.areas[second]
            same_class = parts.labels[first] == parts.labels[second]
            return same_class & (covered | self._match(overlaps, shared, first, second))

        parts = parts.take(np.flatnonzero(greedy_nms(overlaps, replaces) < 0))
        parts = parts.take(_ranks(self._kind, parts, tiers=np.zeros(len(parts), bool)))
        return Objects(self._kind, parts.geometry, parts.scores, parts.labels)

    def _confirmed(self, parts: _Candidates) -> IndexArray:
        """Objects that no window owns, as two windows each leave them to the other."""
        assert self._kind is not None
        indices = np.flatnonzero(~parts.owned)
        indices = indices[_ranks(self._kind, parts.take(indices), tiers=np.zeros(len(indices), bool))]
        strays = parts.take(indices)
        overlaps = Overlaps(self._kind, strays.geometry)

        def confirms(shared: FloatArray, first: IndexArray, second: IndexArray) -> BoolArray:
            left_to_it = (strays.owner[first] == strays.window[second]) | (strays.owner[second] == strays.window[first])
            same_class = strays.labels[first] == strays.labels[second]
            return left_to_it & same_class & self._match(overlaps, shared, first, second)

        by = greedy_nms(overlaps, confirms)
        return indices[np.unique(by[by >= 0])]

    def _match(self, overlaps: Overlaps, shared: FloatArray, first: IndexArray, second: IndexArray) -> BoolArray:
        union = overlaps.areas[first] + overlaps.areas[second] - shared
        return np.asarray(shared > self._iou_threshold * union)


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Objects with the window they come from, the window whose core holds their centre, and whether they are cut."""

    geometry: npt.NDArray[Any]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]
    window: IndexArray
    owner: IndexArray
    cut: BoolArray

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def owned(self) -> BoolArray:
        return self.window == self.owner

    def take(self, indices: npt.NDArray[Any]) -> Self:
        return type(self)(*(getattr(self, field.name)[indices] for field in fields(self)))

    @classmethod
    def join(cls, parts: list[Self]) -> Self:
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


class _Axis:
    """The windows' places along rows or columns, and the cores between the midlines of their overlaps."""

    def __init__(self, starts: npt.NDArray[Any], size: int) -> None:
        self._starts = starts
        midlines = (starts[1:] + starts[:-1] + size) / 2
        self._edges = np.concatenate([[-np.inf], midlines, [np.inf]])

    def __len__(self) -> int:
        return len(self._starts)

    def index(self, start: int) -> int:
        return int(np.searchsorted(self._starts, start))

    def owners(self, centers: FloatArray) -> IndexArray:
        """Index of the core that holds each centre."""
        return np.searchsorted(self._edges[1:-1], centers, side="right").astype(np.int64)

    def past_core(self, centers: FloatArray, index: int) -> FloatArray:
        """How far each centre lies outside a core, in pixels."""
        return np.maximum(np.maximum(self._edges[index] - centers, centers - self._edges[index + 1]), 0)


def _cut(bounds: FloatArray, window: Window, extent: Window) -> BoolArray:
    """Which bounds end at an edge of the window beyond which the extent goes on."""
    cut = np.zeros(len(bounds), bool)
    for low, start, first in ((0, window.col, extent.col), (1, window.row, extent.row)):
        if start > first:
            cut |= bounds[:, low] < start + _EDGE_PX
    for high, stop, last in ((2, window.col_stop, extent.col_stop), (3, window.row_stop, extent.row_stop)):
        if stop < last:
            cut |= bounds[:, high] > stop - _EDGE_PX
    return cut


def _holds(extent: Window, window: Window, centers: FloatArray, valid: BoolArray) -> BoolArray:
    """Which centres lie on valid pixels of the window and the extent."""
    shared = window.intersect(extent)
    assert shared is not None
    low, high = (shared.col, shared.row), (shared.col_stop, shared.row_stop)
    inside: BoolArray = np.all((centers >= low) & (centers < high), axis=1)
    cols, rows = np.floor(centers[inside]).astype(np.int64).T - ((window.col,), (window.row,))
    inside[inside] = valid[rows, cols]
    return inside


def _ranks(kind: ObjectKind, parts: _Candidates, tiers: BoolArray) -> IndexArray:
    """Order by tier, falling score and position; objects alike in all of these stay in the order of windows."""
    left, top, right, bottom = object_bounds(kind, parts.geometry).T
    return np.lexsort((right, bottom, left, top, -parts.scores, tiers))
