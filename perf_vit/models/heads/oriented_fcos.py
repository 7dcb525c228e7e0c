"""FCOS for oriented boxes: assignment of objects to locations, outputs and losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from perf_vit.distributed import mean_normalizer
from perf_vit.errors import InputError
from perf_vit.geometry.oriented_boxes import kfiou_loss, normalize_oriented, oriented_nms, probiou_loss
from perf_vit.models.heads.detection import register_detection_head
from perf_vit.types import Detections, ObjectLabels

__all__ = [
    "Locations",
    "OrientedFCOSHead",
    "assign_objects",
    "centerness_targets",
    "ignored_locations",
    "make_locations",
]

# A level learns objects whose longer side is at most 16 strides, as in FCOS: 128 pixels at stride 8.
_LONGEST_IN_STRIDES = 16

_CENTER_RADIUS_IN_STRIDES = 1.5

# A rotated square of this half size always contains a point of the grid.
_LEAST_REACH_IN_STRIDES = 1 / math.sqrt(2)

_CELLS_AROUND = 3


@dataclass(frozen=True, slots=True)
class Locations:
    """Cells of all feature maps, by level, in row-major order.

    Attributes:
        points: x and y of each cell's centre in pixels, [L, 2].
        strides: Stride of each cell in pixels, [L].
        level_sizes: Rows and columns of each level.
        level_strides: Stride of each level in pixels.
    """

    points: Tensor
    strides: Tensor
    level_sizes: tuple[tuple[int, int], ...]
    level_strides: tuple[int, ...]

    @property
    def size_xy(self) -> tuple[int, int]:
        """Width and height of the image in pixels."""
        rows, columns = self.level_sizes[0]
        return columns * self.level_strides[0], rows * self.level_strides[0]

    @property
    def level_lengths(self) -> list[int]:
        """Number of cells of each level."""
        return [rows * columns for rows, columns in self.level_sizes]


def make_locations(level_sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device) -> Locations:
    """Make the cells of feature maps of these sizes and strides."""
    points, per_cell = [], []
    for (rows, columns), stride in zip(level_sizes, strides, strict=True):
        row, column = (torch.arange(size, device=device) + 0.5 for size in (rows, columns))
        y, x = torch.meshgrid(row * stride, column * stride, indexing="ij")
        points.append(torch.stack([x, y], -1).flatten(0, 1))
        per_cell.append(points[-1].new_full((rows * columns,), stride))
    return Locations(torch.cat(points), torch.cat(per_cell), tuple(level_sizes), tuple(strides))


def assign_objects(oriented_boxes: Tensor, locations: Locations) -> Tensor:
    """Assign an object to each location.

    An object is assigned to one level by its longer side, and there to the locations in its box within 1.5 strides of
    its centre (FCOS with centre sampling); an object thinner than a cell to those nearest to its centre. The smallest
    of several objects at a location is used. Time and memory grow with L + n, not with L x n.

    Args:
        oriented_boxes: Oriented boxes with width >= height, [n, 5].
        locations: L cells.

    Returns:
        Object indices, -1 for background, [L].
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
    """Return pairs of an object and a cell of a level in the object's centre region."""
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
    """Compute the centre-ness of points (FCOS, eq. 3), in the frame of their objects.

    Objects narrower than two cells count as two cells wide; otherwise no location would be central to them.

    Args:
        points: x and y of points, [p, 2].
        strides: Strides of the points' cells, [p].
        oriented_boxes: Box of each point's object, [p, 5].

    Returns:
        Centre-ness, from 0 at the border to 1 in the centre, [p].
    """
    offsets = _in_frames(points, oriented_boxes).abs()
    half_sides = torch.maximum(oriented_boxes[:, 2:4] / 2, strides[:, None])
    return ((half_sides - offsets).clamp(min=0) / (half_sides + offsets)).prod(-1).sqrt()


def ignored_locations(oriented_boxes: Tensor, locations: Locations) -> Tensor:
    """Return the locations of all levels that lie inside one of the boxes, bool [L]."""
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
    """Transform points to the frames of boxes, along and across their widths; both broadcast."""
    (dx, dy), angle = (points - boxes[..., :2]).unbind(-1), boxes[..., 4]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([dx * cos + dy * sin, dy * cos - dx * sin], -1)


_BOX_LOSSES = {"probiou": probiou_loss, "kfiou": kfiou_loss}

_PRIOR = 0.01

# Size of the boxes of the untrained head, in strides.
_TYPICAL_SIDE = 4

# Bounds that keep exponentials finite: 400 times the typical size, and an aspect ratio of 400.
_LARGEST_LOG_SIDE = 6.0

_LARGEST_ELONGATION = 3.0

_TINY = 1e-6


@register_detection_head("oriented_fcos")
class OrientedFCOSHead(nn.Module):
    """FCOS with one oriented box per location (Tian et al. 2019, arXiv 1904.01355).

    Each location predicts class scores, centre-ness, the offset of the box's centre in strides, the logarithm of its
    size, and its elongation, half the logarithm of width over height, as a vector at twice the angle. These outputs are
    continuous where the angle wraps around or the sides swap, and so is the loss, which compares the boxes' Gaussians.
    The Gaussian of a square is isotropic: angles of square objects are not learnt.

    Args:
        in_channels: Number of channels of each feature map, a multiple of 8.
        num_classes: Number of foreground classes.
        strides: Strides of the feature maps in pixels, finest first.
        num_convs: Number of 3 x 3 convolutions before the outputs, shared by all levels.
        box_loss: "probiou" or "kfiou".
        score_threshold: Lowest score of a detection.
        iou_threshold: Largest IoU of two detections of a class.
        candidates_per_level: Number of best boxes per level that enter non-maximum suppression.
        detections_per_tile: Largest number of detections, best first.

    Raises:
        ValueError: The number of channels is not a multiple of 8 or the loss is unknown.
    """

    kind = "oriented_boxes"

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        strides: Sequence[int],
        *,
        num_convs: int = 2,
        box_loss: Literal["probiou", "kfiou"] = "probiou",
        score_threshold: float = 0.05,
        iou_threshold: float = 0.1,
        candidates_per_level: int = 2000,
        detections_per_tile: int = 2000,
    ) -> None:
        super().__init__()
        if in_channels % 8:
            raise ValueError(f"model.channels must be a multiple of 8, got {in_channels}; try 64 or 128")
        if box_loss not in _BOX_LOSSES:
            raise ValueError(f"box_loss must be one of {', '.join(_BOX_LOSSES)}, got {box_loss}")
        self.strides = tuple(strides)
        self.num_classes = num_classes
        self.box_loss = _BOX_LOSSES[box_loss]
        self.score_threshold = score_threshold
        self.iou_threshold = iou_threshold
        self.candidates_per_level = candidates_per_level
        self.detections_per_tile = detections_per_tile
        self.class_tower = _tower(in_channels, num_convs)
        self.box_tower = _tower(in_channels, num_convs)
        # Nearly all locations are background: without this bias, their loss dominates initially.
        self.class_logits = _output(in_channels, num_classes, bias=-math.log((1 - _PRIOR) / _PRIOR))
        self.box_deltas = _output(in_channels, 5)
        self.centerness = _output(in_channels, 1)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the outputs of all locations, by level.

        Args:
            features: One map per stride, [B, in_channels, h, w].

        Returns:
            Class logits [B, L, num_classes], oriented boxes in pixels [B, L, 5] and centre-ness logits [B, L], float32.
        """
        logits, deltas, centerness = [], [], []
        for feature in features:
            box_feature = self.box_tower(feature)
            logits.append(_by_location(self.class_logits(self.class_tower(feature))))
            deltas.append(_by_location(self.box_deltas(box_feature)))
            centerness.append(_by_location(self.centerness(box_feature)))
        boxes = _decode(torch.cat(deltas, 1), self._locations(features))
        return torch.cat(logits, 1), boxes, torch.cat(centerness, 1).squeeze(-1)

    def losses(self, features: Sequence[Tensor], labels: Sequence[ObjectLabels]) -> dict[str, Tensor]:
        """Compute the losses of a batch, whose sum is minimised.

        The normalisers are means over processes, all of which must call this method.

        Args:
            features: One map per stride, [B, in_channels, h, w].
            labels: Labels of each image, with oriented boxes.

        Returns:
            classification: focal loss, its sum over locations divided by the number of positive ones.
            box: box loss, averaged over positive locations with centre-ness as weight.
            centerness: binary cross entropy, averaged over positive locations.

        Raises:
            InputError: The labels have no oriented boxes.
        """
        logits, boxes, centerness = self(features)
        locations = self._locations(features)
        images = [_image_targets(image, locations, self.num_classes) for image in labels]
        owned, counted, classes, targets = (torch.stack(values) for values in zip(*images, strict=True))
        num_owned = mean_normalizer(owned.sum())
        one_hot = F.one_hot(classes, self.num_classes + 1)[..., :-1].to(logits.dtype)
        focal = sigmoid_focal_loss(logits, one_hot, reduction="none")[counted].sum() / num_owned
        cells = owned.nonzero()[:, 1]
        central = centerness_targets(locations.points[cells], locations.strides[cells], targets[owned])
        distances = self.box_loss(boxes[owned], targets[owned])
        entropy = F.binary_cross_entropy_with_logits(centerness[owned], central, reduction="sum")
        return {
            "classification": focal,
            "box": (distances * central).sum() / mean_normalizer(central.sum(), least=1e-6),
            "centerness": entropy / num_owned,
        }

    def detect(self, features: Sequence[Tensor]) -> list[Detections]:
        """Detect the objects of each image, in descending order of score.

        Args:
            features: One map per stride, [B, in_channels, h, w].

        Returns:
            Detections of each image, with oriented boxes in its pixels; the score is the geometric mean of class score
            and centre-ness.
        """
        logits, boxes, centerness = self(features)
        scores = (logits.sigmoid() * centerness.sigmoid()[..., None]).sqrt()
        lengths = self._locations(features).level_lengths
        return [self._detect_image(*image, lengths) for image in zip(scores, boxes, strict=True)]

    def _detect_image(self, scores: Tensor, boxes: Tensor, lengths: list[int]) -> Detections:
        indices, start = [], 0
        for level in torch.split(scores, lengths):
            best = level.flatten().topk(min(self.candidates_per_level, level.numel())).indices
            indices.append(start + best)
            start += level.numel()
        # Sorted by cell, so that ties are broken alike on every device.
        index = torch.cat(indices).sort().values
        index = index[scores.flatten()[index] > self.score_threshold]
        cells, labels = index // self.num_classes, index % self.num_classes
        found, found_scores = normalize_oriented(boxes[cells]), scores.flatten()[index]
        kept = oriented_nms(found, found_scores, labels, self.iou_threshold)[: self.detections_per_tile]
        return Detections(oriented_boxes=found[kept], scores=found_scores[kept], labels=labels[kept])

    def _locations(self, features: Sequence[Tensor]) -> Locations:
        sizes = [(feature.shape[-2], feature.shape[-1]) for feature in features]
        return make_locations(sizes, self.strides, features[0].device)


def _image_targets(
    image: ObjectLabels, locations: Locations, num_classes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return for each location: is positive, class counts in the loss, class or `num_classes`, box of its object."""
    if image.oriented_boxes is None:
        raise InputError("expected labels with oriented boxes, got none; choose a head for upright boxes")
    device = locations.points.device
    boxes, classes, ignored = (
        torch.as_tensor(values, device=device) for values in (image.oriented_boxes, image.labels, image.ignored)
    )
    # Objects centred outside are left to other windows.
    outside = ((boxes[:, :2] < 0) | (boxes[:, :2] >= boxes.new_tensor(locations.size_xy))).any(1)
    ignored = ignored | outside | (boxes[:, 3] <= 0)
    objects, object_classes = boxes[~ignored], classes[~ignored]
    owner = assign_objects(objects, locations)
    owned = owner >= 0
    counted = owned | ~ignored_locations(boxes[ignored], locations)
    # Locations without an object, index -1, get the appended row.
    location_classes = torch.cat([object_classes, object_classes.new_full((1,), num_classes)])[owner]
    targets = torch.cat([objects, objects.new_ones(1, 5)])[owner]
    return owned, counted, location_classes, targets


def _decode(deltas: Tensor, locations: Locations) -> Tensor:
    """Convert the head's outputs to oriented boxes in pixels, [B, L, 5]."""
    strides = locations.strides[:, None]
    center = locations.points + deltas[..., :2] * strides
    size, (along, across) = deltas[..., 2:3], deltas[..., 3:].unbind(-1)
    # Square root and angle have no gradient where both are 0.
    along = along + _TINY
    elongation = torch.hypot(along, across).clamp(max=_LARGEST_ELONGATION)[..., None]
    log_sides = torch.cat([size + elongation, size - elongation], -1).clamp(max=_LARGEST_LOG_SIDE)
    sides = _TYPICAL_SIDE * strides * log_sides.exp()
    return torch.cat([center, sides, torch.atan2(across, along)[..., None] / 2], -1)


def _by_location(maps: Tensor) -> Tensor:
    """Rearrange [B, C, h, w] to [B, h w, C], in float32 also under autocast."""
    return maps.flatten(2).transpose(1, 2).float()


def _tower(channels: int, num_convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(num_convs):
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        layers += [conv, nn.GroupNorm(channels // 8, channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _output(in_channels: int, out_channels: int, bias: float = 0.0) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    assert conv.bias is not None
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.bias, bias)
    return conv
