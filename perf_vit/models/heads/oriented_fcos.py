"""Which location of which feature map learns which oriented object."""

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
from perf_vit.models.heads.registry import register_detection_head
from perf_vit.types import Detections, ObjectLabels

__all__ = [
    "Locations",
    "OrientedFCOSHead",
    "assign_objects",
    "centerness_targets",
    "ignored_locations",
    "make_locations",
]

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


_BOX_LOSSES = {"probiou": probiou_loss, "kfiou": kfiou_loss}

_PRIOR = 0.01

# Sides of a box that the untrained head gives, in strides.
_TYPICAL_SIDE = 4

# Bounds that keep exponentials finite: sides of 400 times that, and one side 400 times the other.
_LARGEST_LOG_SIDE = 6.0

_LARGEST_ELONGATION = 3.0

_TINY = 1e-6


@register_detection_head("oriented_fcos")
class OrientedFCOSHead(nn.Module):
    """One box a location: class scores, centre, sides, angle and centre-ness (Tian et al. 2019, arXiv 1904.01355).

    The head says where the centre lies, in strides from the location; the logarithm of the box's size; and its
    elongation, half the logarithm of width over height, as a vector at twice the angle. So no output jumps where the
    angle wraps round or the sides swap. The loss compares the boxes' Gaussians, which don't jump either. The Gaussian
    of a square does not show its angle: angles of square objects are not learnt.

    Args:
        in_channels: of each feature map; a multiple of 8.
        num_classes: foreground classes, 0 to num_classes - 1.
        strides: pixels a cell of each feature map, finest first.
        num_convs: 3 x 3 convolutions before the outputs, shared by all levels.
        box_loss: "probiou" or "kfiou".
        score_threshold: lowest score of a detection.
        iou_threshold: of two detections of a class with a larger IoU, the surer one stays.
        candidates_per_level: surest boxes of a level that are compared.
        detections_per_tile: surest detections that are given.

    Raises:
        ValueError: a number of channels that is no multiple of 8, or an unknown loss.
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
            raise ValueError(f"expected channels to be a multiple of 8, got {in_channels}")
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
        # Nearly all locations are background: without this bias, their loss drowns the objects' at first.
        self.class_logits = _output(in_channels, num_classes, bias=-math.log((1 - _PRIOR) / _PRIOR))
        self.box_deltas = _output(in_channels, 5)
        self.centerness = _output(in_channels, 1)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What the head says about every location of all levels, one after the other.

        Args:
            features: one map a stride, [B, in_channels, h, w].

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
        """Losses of a batch; their sum is what to minimise.

        What they are divided by is a mean over processes, all of which must call it.

        Args:
            features: one map a stride, [B, in_channels, h, w].
            labels: with oriented boxes, one an image.

        Returns:
            classification: focal loss, its sum over locations divided by the number that have an object.
            box: of the objects' locations, weighted by how central they lie.
            centerness: binary cross entropy, a mean over the objects' locations.

        Raises:
            InputError: the labels have no oriented boxes.
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
        """The objects of each image, surest first.

        Args:
            features: one map a stride, [B, in_channels, h, w].

        Returns:
            One an image, with oriented boxes in the image's pixels; a score is the geometric mean of the class's score
            and the centre-ness.
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
        # In the order of the cells, so that equal scores rank the same on every device.
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
    """Of each location: has it an object, does its class count, its class or `num_classes`, its object's box."""
    if image.oriented_boxes is None:
        raise InputError("expected labels with oriented boxes, got none; choose a head for upright boxes")
    device = locations.points.device
    boxes, classes, ignored = (
        torch.as_tensor(values, device=device) for values in (image.oriented_boxes, image.labels, image.ignored)
    )
    # Objects centred elsewhere are for another window to find.
    outside = ((boxes[:, :2] < 0) | (boxes[:, :2] >= boxes.new_tensor(locations.size_xy))).any(1)
    ignored = ignored | outside | (boxes[:, 3] <= 0)
    objects, object_classes = boxes[~ignored], classes[~ignored]
    owner = assign_objects(objects, locations)
    owned = owner >= 0
    counted = owned | ~ignored_locations(boxes[ignored], locations)
    # Locations without an object, at -1, take the row that is appended.
    location_classes = torch.cat([object_classes, object_classes.new_full((1,), num_classes)])[owner]
    targets = torch.cat([objects, objects.new_ones(1, 5)])[owner]
    return owned, counted, location_classes, targets


def _decode(deltas: Tensor, locations: Locations) -> Tensor:
    """Oriented boxes in pixels, [B, L, 5], from the head's outputs."""
    strides = locations.strides[:, None]
    center = locations.points + deltas[..., :2] * strides
    size, (along, across) = deltas[..., 2:3], deltas[..., 3:].unbind(-1)
    # The root and the angle have no gradient where both are 0.
    along = along + _TINY
    elongation = torch.hypot(along, across).clamp(max=_LARGEST_ELONGATION)[..., None]
    log_sides = torch.cat([size + elongation, size - elongation], -1).clamp(max=_LARGEST_LOG_SIDE)
    sides = _TYPICAL_SIDE * strides * log_sides.exp()
    return torch.cat([center, sides, torch.atan2(across, along)[..., None] / 2], -1)


def _by_location(maps: Tensor) -> Tensor:
    """[B, C, h, w] to [B, h w, C], in float32 under autocast too."""
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
