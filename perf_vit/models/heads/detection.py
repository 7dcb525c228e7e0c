"""What all detection heads have in common: their interface, training targets, anchors and rules for ignored objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from perf_vit.types import Detections, ObjectLabels

__all__ = [
    "IGNORED_COVER",
    "IGNORED_LABEL",
    "CenteredAnchors",
    "DetectionHead",
    "Targets",
    "anchor_sides",
    "check_channels",
    "covered_share",
    "image_list",
    "inside_any",
    "levels_only",
    "make_targets",
    "split_ignored",
    "to_detections",
]

IGNORED_LABEL = -1
"""Label of ignored objects inside the heads, where they come after all others."""

IGNORED_COVER = 0.5
"""An anchor or proposal of which an ignored object covers this share is no negative."""

Targets = dict[str, Tensor]
"""boxes [n, 4], labels [n] and, where there are any, masks [n, H, W], as torchvision names them."""


class DetectionHead(Protocol):
    """Feature levels in, losses or detections out; an `nn.Module`.

    Its attribute `kind` names the geometry of its detections: boxes, oriented_boxes or masks. A head is built with
    (in_channels, num_classes, strides, **options). It sees levels whose strides divide the image exactly: height is
    rows times stride. Padding counts as image; `Detector` clips what reaches into it.
    """

    kind: str

    def losses(self, features: Sequence[Tensor], labels: Sequence[ObjectLabels]) -> dict[str, Tensor]:
        """Losses of a batch, whose sum is to be minimised.

        Args:
            features: one map a stride, [B, in_channels, height / stride, width / stride].
            labels: one an image, in its pixels; ignored objects are neither positive nor negative.
        """

    def detect(self, features: Sequence[Tensor]) -> list[Detections]:
        """The objects of each image, in its pixels."""


class CenteredAnchors(AnchorGenerator):
    """torchvision's anchors at the centres of cells instead of their upper left corners.

    Half a cell hardly matters to large objects; to objects of a cell's size it does, and the last half cell of an image
    would have no anchor.
    """

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors of all levels, one tensor [A, 4] an image, in float32 whatever the maps are.

        Eight bits, those of bfloat16, can't tell pixels 510 and 512 apart.
        """
        shapes = [feature.new_zeros((), dtype=torch.float32).expand(feature.shape) for feature in feature_maps]
        anchors = super().forward(image_list, shapes)
        height = image_list.tensors.shape[-2]
        shifts = [
            anchors[0].new_full((rows * columns * per_cell, 1), height / rows / 2)
            for (rows, columns), per_cell in zip(
                (feature.shape[-2:] for feature in feature_maps), self.num_anchors_per_location(), strict=True
            )
        ]
        shift = torch.cat(shifts)
        return [each + shift for each in anchors]


def anchor_sides(strides: Sequence[int], scale: float) -> tuple[int, ...]:
    """Side of each level's anchor, in pixels."""
    return tuple(max(1, round(scale * stride)) for stride in strides)


def check_channels(channels: int) -> None:
    """Refuse what the group norms of 32 groups can't take; of a group of one channel, a map of one cell has no spread.

    Raises:
        ValueError: no multiple of 32, or 32 itself.
    """
    if channels % 32 or channels < 64:
        raise ValueError(f"expected model.channels to be a multiple of 32 above 32, got {channels}; try 64 or 128")


def levels_only(channels: int) -> nn.Module:
    """A stand-in for the backbone that torchvision's detectors ask for; it only tells its channels."""
    backbone = nn.Identity()
    backbone.out_channels = channels  # type: ignore[assignment]
    return backbone


def image_list(features: Sequence[Tensor], strides: Sequence[int]) -> ImageList:
    """The images that the levels belong to: only their size and number, as torchvision's parts need it."""
    batch, _, rows, columns = features[0].shape
    height, width = rows * strides[0], columns * strides[0]
    # An expanded scalar takes no memory.
    return ImageList(features[0].new_zeros(()).expand(batch, 1, height, width), [(height, width)] * batch)


def make_targets(labels: ObjectLabels, device: torch.device, *, first_class: int = 0, masks: bool = False) -> Targets:
    """An image's labels as torchvision's parts take them; objects without an area are left out.

    Args:
        labels: of the image.
        device: where the tensors go.
        first_class: what class 0 is called; 1 where 0 means background.
        masks: with masks.
    """
    boxes = torch.as_tensor(labels.boxes_xyxy, dtype=torch.float32).reshape(-1, 4)
    ignored = torch.as_tensor(labels.ignored, dtype=torch.bool)
    classes = torch.as_tensor(labels.labels, dtype=torch.int64) + first_class
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    order = torch.cat([torch.nonzero(keep & ~ignored), torch.nonzero(keep & ignored)]).flatten()
    found = {"boxes": boxes[order], "labels": torch.where(ignored, IGNORED_LABEL, classes)[order]}
    if masks:
        assert labels.masks is not None
        found["masks"] = torch.as_tensor(labels.masks)[order]
    return {name: values.to(device) for name, values in found.items()}


def to_detections(found: dict[str, Tensor], *, first_class: int = 0) -> Detections:
    """What torchvision's parts found in an image."""
    return Detections(boxes_xyxy=found["boxes"], scores=found["scores"], labels=found["labels"] - first_class)


def split_ignored(targets: Targets) -> tuple[Targets, Tensor]:
    """The objects that count, and the boxes of those that don't."""
    counts = targets["labels"] != IGNORED_LABEL
    return {name: values[counts] for name, values in targets.items()}, targets["boxes"][~counts]


def covered_share(boxes_xyxy: Tensor, regions_xyxy: Tensor) -> Tensor:
    """The largest share of each box's area that one region covers, [n]; 0 without regions."""
    if not len(regions_xyxy):
        return boxes_xyxy.new_zeros(len(boxes_xyxy))
    area = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(1)
    best = torch.zeros_like(area)
    # One region at a time: with all anchors of a large tile, a matrix of all pairs takes gigabytes.
    for region in regions_xyxy:
        low, high = torch.maximum(boxes_xyxy[:, :2], region[:2]), torch.minimum(boxes_xyxy[:, 2:], region[2:])
        best = torch.maximum(best, (high - low).clamp(min=0).prod(1) / area.clamp(min=1e-6))
    return best


def inside_any(points: Tensor, regions_xyxy: Tensor) -> Tensor:
    """Whether each point (x, y) lies in a region, [n] bool."""
    inside = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for region in regions_xyxy:
        inside |= ((points >= region[:2]) & (points <= region[2:])).all(1)
    return inside
