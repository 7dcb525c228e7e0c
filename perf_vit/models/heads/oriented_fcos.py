"""A detection head for oriented boxes without anchors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from perf_vit.errors import InputError
from perf_vit.models.heads._oriented_targets import (
    Locations,
    assign_objects,
    centerness_targets,
    ignored_locations,
    make_locations,
)
from perf_vit.ops.gaussian_boxes import kfiou_loss, probiou_loss
from perf_vit.ops.oriented_boxes import normalize_oriented, oriented_nms
from perf_vit.ops.processes import mean_normalizer
from perf_vit.types import Detections, ObjectLabels

__all__ = ["OrientedFCOSHead"]

_BOX_LOSSES = {"probiou": probiou_loss, "kfiou": kfiou_loss}
_PRIOR = 0.01
# Sides of a box that the untrained head gives, in strides.
_TYPICAL_SIDE = 4
# Bounds that keep exponentials finite: sides of 400 times that, and one side 400 times the other.
_LARGEST_LOG_SIDE = 6.0
_LARGEST_ELONGATION = 3.0
_TINY = 1e-6


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
