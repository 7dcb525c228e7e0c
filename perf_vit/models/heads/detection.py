"""Common parts of detection heads: registry, interface, targets, anchors, ignored objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from perf_vit.errors import ConfigError
from perf_vit.registry import Registry
from perf_vit.types import Detections, ObjectLabels

__all__ = [
    "DETECTION_HEADS",
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
    "make_targets",
    "placeholder_backbone",
    "register_detection_head",
    "split_ignored",
    "to_detections",
]

DETECTION_HEADS: Registry[Callable[..., nn.Module]] = Registry("model.head", ConfigError)
"""Heads by name, called with (in_channels, num_classes, strides, **options); see `DetectionHead` for their methods."""

register_detection_head = DETECTION_HEADS.register

IGNORED_LABEL = -1
"""Label of ignored objects within the heads, where they follow all others."""

IGNORED_COVER = 0.5
"""Fraction of an anchor or proposal covered by an ignored object from which it is not a negative."""

Targets = dict[str, Tensor]
"""Targets in torchvision's format: boxes [n, 4], labels [n] and optional masks [n, H, W]."""


class DetectionHead(Protocol):
    """Interface of detection heads, modules from feature levels to losses or detections.

    The attribute `kind` is the geometry of the detections: boxes, oriented_boxes or masks. The constructor takes
    (in_channels, num_classes, strides, **options). The strides of the levels divide the image size. Padding is treated
    as image; `Detector` clips detections.
    """

    kind: str

    def losses(self, features: Sequence[Tensor], labels: Sequence[ObjectLabels]) -> dict[str, Tensor]:
        """Compute the losses of a batch, whose sum is minimised.

        Args:
            features: One map per stride, [B, in_channels, height / stride, width / stride].
            labels: Labels of each image, in its pixels; ignored objects are neither positive nor negative.
        """

    def detect(self, features: Sequence[Tensor]) -> list[Detections]:
        """Detect the objects of each image, in its pixels."""


class CenteredAnchors(AnchorGenerator):
    """torchvision's anchors at the centres of cells instead of their top left corners.

    The shift by half a cell matters for objects of the size of a cell, and without it the last half cell of an image
    has no anchor.
    """

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors of all levels, one tensor [A, 4] per image, in float32 for maps of any dtype.

        The eight significant bits of bfloat16 can't distinguish pixels 510 and 512.
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
    """Return the size of each level's anchor, in pixels."""
    return tuple(max(1, round(scale * stride)) for stride in strides)


def check_channels(channels: int) -> None:
    """Check the number of channels for group norms of 32 groups with at least two channels each.

    A group of one channel has zero variance on a map of one cell.

    Raises:
        ValueError: It isn't a multiple of 32 above 32.
    """
    if channels % 32 or channels < 64:
        raise ValueError(f"expected model.channels to be a multiple of 32 above 32, got {channels}; try 64 or 128")


def placeholder_backbone(channels: int) -> nn.Module:
    """Return a placeholder for the backbone of torchvision's detectors, which only provides `out_channels`."""
    backbone = nn.Identity()
    backbone.out_channels = channels  # type: ignore[assignment]
    return backbone


def image_list(features: Sequence[Tensor], strides: Sequence[int]) -> ImageList:
    """Return placeholders of the images of the levels, of which torchvision only needs size and number."""
    batch, _, rows, columns = features[0].shape
    height, width = rows * strides[0], columns * strides[0]
    # An expanded scalar needs no memory.
    return ImageList(features[0].new_zeros(()).expand(batch, 1, height, width), [(height, width)] * batch)


def make_targets(labels: ObjectLabels, device: torch.device, *, first_class: int = 0, masks: bool = False) -> Targets:
    """Convert an image's labels to torchvision's format, without objects of zero area.

    Args:
        labels: Labels of the image.
        device: Device of the tensors.
        first_class: Index of class 0; 1 where 0 is the background.
        masks: Whether to include masks.
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
    """Convert torchvision's detections of an image."""
    return Detections(boxes_xyxy=found["boxes"], scores=found["scores"], labels=found["labels"] - first_class)


def split_ignored(targets: Targets) -> tuple[Targets, Tensor]:
    """Return the objects that aren't ignored, and the boxes of the ignored ones."""
    counts = targets["labels"] != IGNORED_LABEL
    return {name: values[counts] for name, values in targets.items()}, targets["boxes"][~counts]


def covered_share(boxes_xyxy: Tensor, regions_xyxy: Tensor) -> Tensor:
    """Return the largest fraction of each box's area covered by a single region, [n]; 0 without regions."""
    if not len(regions_xyxy):
        return boxes_xyxy.new_zeros(len(boxes_xyxy))
    area = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(1)
    best = torch.zeros_like(area)
    # A loop over regions: a matrix of all pairs with the anchors of a large tile takes gigabytes.
    for region in regions_xyxy:
        low, high = torch.maximum(boxes_xyxy[:, :2], region[:2]), torch.minimum(boxes_xyxy[:, 2:], region[2:])
        best = torch.maximum(best, (high - low).clamp(min=0).prod(1) / area.clamp(min=1e-6))
    return best


def inside_any(points: Tensor, regions_xyxy: Tensor) -> Tensor:
    """Return whether each point (x, y) lies in a region, bool [n]."""
    inside = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for region in regions_xyxy:
        inside |= ((points >= region[:2]) & (points <= region[2:])).all(1)
    return inside
