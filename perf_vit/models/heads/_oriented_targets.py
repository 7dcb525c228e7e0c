"""Which location of which feature map learns which oriented object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Locations", "assign_objects", "centerness_targets", "ignored_locations", "make_locations"]

# A level takes objects whose long side is at most 16 strides, as in FCOS: 128 pixels at stride 8.
_LONGEST_IN_STRIDES = 16
_CENTER_RADIUS_IN_STRIDES = 1.5
# A turned square of this half side always holds a point of the grid, however small the object is.
_LEAST_REACH_IN_STRIDES = 1 / math.sqrt(2)
_CELLS_AROUND = 3


@dataclass(frozen=True, slots=True)
class Locations:
    """The cells of all feature maps, level after level, row by row.

    Attributes:
        points: x and y of each cell's centre in pixels, [L, 2].
        strides: pixels a cell, [L].
        level_sizes: rows and columns of each level.
        level_strides: pixels a cell of each level.
    """

    points: Tensor
    strides: Tensor
    level_sizes: tuple[tuple[int, int], ...]
    level_strides: tuple[int, ...]

    @property
    def size_xy(self) -> tuple[int, int]:
        """Width and height of the image, in pixels."""
        rows, columns = self.level_sizes[0]
        return columns * self.level_strides[0], rows * self.level_strides[0]

    @property
    def level_lengths(self) -> list[int]:
        """Cells of each level."""
        return [rows * columns for rows, columns in self.level_sizes]


def make_locations(level_sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device) -> Locations:
    """Cells of feature maps of these sizes and strides."""
    points, per_cell = [], []
    for (rows, columns), stride in zip(level_sizes, strides, strict=True):
        row, column = (torch.arange(size, device=device) + 0.5 for size in (rows, columns))
        y, x = torch.meshgrid(row * stride, column * stride, indexing="ij")
        points.append(torch.stack([x, y], -1).flatten(0, 1))
        per_cell.append(points[-1].new_full((rows * columns,), stride))
    return Locations(torch.cat(points), torch.cat(per_cell), tuple(level_sizes), tuple(strides))


def assign_objects(oriented_boxes: Tensor, locations: Locations) -> Tensor:
    """The object that each location learns.

    An object belongs to one level by its long side, and there to the locations in the part of its box within 1.5
    strides of its centre (FCOS with centre sampling), or else nearest to its centre, so that ships thinner than a cell
    are learnt too. Of several objects at a location, the smallest wins.

    Args:
        oriented_boxes: width >= height, [n, 5].
        locations: of L cells.

    Returns:
        Indices of objects, -1 for background, [L]. Time and memory grow with L + n, not with L x n.
    """
    order = oriented_boxes[:, 2:4].prod(-1).argsort(stable=True)
    boxes = oriented_boxes[order]
    borders = boxes.new_tensor([_LONGEST_IN_STRIDES * stride for stride in locations.level_strides[:-1]])
    levels = torch.bucketize(boxes[:, 2].contiguous(), borders)
    first = torch.full((len(locations.points),), len(boxes), device=boxes.device)
    start = 0
    for level, (size, stride) in enumerate(zip(locations.level_sizes, locations.level_strides, strict=True)):
        ranks = (levels == level).nonzero()[:, 0]
        object_index, cell = _cells_near_centers(boxes[ranks], size, stride)
        first.scatter_reduce_(0, start + cell, ranks[object_index], "amin")
        start += size[0] * size[1]
    return torch.cat([order, order.new_full((1,), -1)])[first]


def _cells_near_centers(boxes: Tensor, size: tuple[int, int], stride: int) -> tuple[Tensor, Tensor]:
    """Pairs of object and cell of a level, where the cell is in the object's centre region."""
    steps = torch.arange(-_CELLS_AROUND, _CELLS_AROUND + 1, device=boxes.device)
    around = torch.cartesian_prod(steps, steps)
    cells = (boxes[:, None, :2] / stride).floor().long() + around
    reach = boxes[:, None, 2:4].div(2).clamp(max=_CENTER_RADIUS_IN_STRIDES * stride)
    offsets = _in_frames((cells + 0.5) * stride, boxes[:, None])
    near = (offsets.abs() <= reach.clamp(min=_LEAST_REACH_IN_STRIDES * stride)).all(-1)
    column, row = cells.unbind(-1)
    near &= (column >= 0) & (column < size[1]) & (row >= 0) & (row < size[0])
    return near.nonzero()[:, 0], (row * size[1] + column)[near]


def centerness_targets(points: Tensor, strides: Tensor, oriented_boxes: Tensor) -> Tensor:
    """How central each point lies in its object (FCOS, eq. 3), in the object's frame.

    Objects narrower than two cells count as two cells wide, or no location would be central to them.

    Args:
        points: [p, 2].
        strides: of the points' cells, [p].
        oriented_boxes: the points' objects, [p, 5].

    Returns:
        0 at the border to 1 in the centre, [p].
    """
    offsets = _in_frames(points, oriented_boxes).abs()
    half_sides = torch.maximum(oriented_boxes[:, 2:4] / 2, strides[:, None])
    return ((half_sides - offsets).clamp(min=0) / (half_sides + offsets)).prod(-1).sqrt()


def ignored_locations(oriented_boxes: Tensor, locations: Locations) -> Tensor:
    """Which locations of any level lie inside one of these boxes, [L] bool."""
    levels = []
    oriented_boxes = oriented_boxes.cpu()
    for (rows, columns), stride in zip(locations.level_sizes, locations.level_strides, strict=True):
        inside = torch.zeros(rows, columns, dtype=torch.bool)
        for box, radius in zip(oriented_boxes, (oriented_boxes[:, 2:4].norm(dim=-1) / 2).tolist(), strict=True):
            x, y = box[:2].tolist()
            span_y, span_x = _cells_within(y, radius, stride, rows), _cells_within(x, radius, stride, columns)
            window = inside[span_y.start : span_y.stop, span_x.start : span_x.stop]
            row, column = (torch.arange(s.start, s.stop) + 0.5 for s in (span_y, span_x))
            points = torch.stack(torch.meshgrid(column * stride, row * stride, indexing="xy"), -1)
            reach = (box[2:4] / 2).clamp(min=_LEAST_REACH_IN_STRIDES * stride)
            window |= (_in_frames(points, box).abs() <= reach).all(-1)
        levels.append(inside.flatten())
    return torch.cat(levels).to(locations.points.device)


def _cells_within(center: float, radius: float, stride: int, num_cells: int) -> range:
    low, high = (center - radius) // stride - 1, (center + radius) // stride + 2
    start = int(min(max(low, 0), num_cells))
    return range(start, int(min(max(high, start), num_cells)))


def _in_frames(points: Tensor, boxes: Tensor) -> Tensor:
    """Points seen from boxes' centres, along and across their widths; both broadcast."""
    (dx, dy), angle = (points - boxes[..., :2]).unbind(-1), boxes[..., 4]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([dx * cos + dy * sin, dy * cos - dx * sin], -1)
