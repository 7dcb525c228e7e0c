"""FCOS, an anchor-free detection head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FCOS
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.fcos import FCOSHead as FCOSConvolutions
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from perf_vit.distributed import mean_normalizer
from perf_vit.models.heads.detection import (
    CenteredAnchors,
    Targets,
    check_channels,
    image_list,
    inside_any,
    make_targets,
    placeholder_backbone,
    register_detection_head,
    split_ignored,
    to_detections,
)
from perf_vit.types import Detections, ObjectLabels

__all__ = ["FCOSHead", "match_locations"]

# A level learns objects whose farthest side is at most 8 strides from the location: 64 px at stride 8, as published.
_REACH_STRIDES = 8
# Initial distance in strides, between those of the smallest and largest objects of a level.
_FIRST_DISTANCE = 2.0
_BACKGROUND = -1


@register_detection_head("fcos")
class FCOSHead(nn.Module):
    """FCOS: each location predicts its class, the distances to the sides of its object's box, and its centre-ness.

    Tian et al. 2019 (arXiv 1904.01355), with torchvision's convolutions and post-processing. Locations are the centres
    of cells. An object too small to contain a location is assigned to those next to it.

    Args:
        in_channels: Number of channels of each level, a multiple of 32 above 32.
        num_classes: Number of foreground classes.
        strides: Strides of the levels, finest first.
        num_convs: Number of 3 x 3 convolutions before the outputs, shared by all levels.
        center_radius: Largest distance of a positive location from its object's centre, in strides.
        score_threshold: Lowest score of a detection.
        iou_threshold: Largest IoU of two detections of a class.
        detections_per_tile: Largest number of detections, best first; dense tiles need many.

    Raises:
        ValueError: The number of channels is not supported.
    """

    kind = "boxes"

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        strides: Sequence[int],
        *,
        num_convs: int = 4,
        center_radius: float = 1.5,
        score_threshold: float = 0.05,
        iou_threshold: float = 0.5,
        detections_per_tile: int = 1000,
    ) -> None:
        super().__init__()
        check_channels(in_channels)
        self.strides = tuple(strides)
        self.center_radius = center_radius
        self.coder = BoxLinearCoder(normalize_by_size=True)
        convolutions = FCOSConvolutions(in_channels, 1, num_classes, num_convs)
        # Distances are outputs of a ReLU. Initialised at 0, whole sides can die in the first steps.
        nn.init.constant_(convolutions.regression_head.bbox_reg.bias, _FIRST_DISTANCE)
        self.model = FCOS(
            placeholder_backbone(in_channels),
            num_classes,
            anchor_generator=CenteredAnchors(tuple((stride,) for stride in strides), ((1.0,),) * len(strides)),
            head=convolutions,
            score_thresh=score_threshold,
            nms_thresh=iou_threshold,
            detections_per_img=detections_per_tile,
            topk_candidates=2 * detections_per_tile,
        )

    def losses(self, features: Sequence[Tensor], labels: Sequence[ObjectLabels]) -> dict[str, Tensor]:
        """Compute the focal, GIoU and centre-ness losses, each divided by the number of positive locations.

        The number is a mean over processes, all of which must call this method.

        Args:
            features: One map per stride, [B, in_channels, h, w].
            labels: Labels of each image; locations in ignored objects are excluded from all losses.
        """
        outputs, cells = self._outputs(features)
        targets = [split_ignored(make_targets(each, cells.device)) for each in labels]
        shapes = [(feature.shape[-2], feature.shape[-1]) for feature in features]
        matched = [
            match_locations(objects["boxes"], shapes, self.strides, self.center_radius) for objects, _ in targets
        ]
        parts = [
            self._image_losses(objects, ignored, match, cells, {name: value[index] for name, value in outputs.items()})
            for index, ((objects, ignored), match) in enumerate(zip(targets, matched, strict=True))
        ]
        num_owned = mean_normalizer(torch.stack([(match >= 0).sum() for match in matched]).sum())
        total = torch.stack([torch.stack(each) for each in parts]).sum(0) / num_owned.item()
        return dict(zip(("classification", "box", "centerness"), total, strict=True))

    def detect(self, features: Sequence[Tensor]) -> list[Detections]:
        """Detect objects; the score is the geometric mean of class score and centre-ness.

        Args:
            features: One map per stride, [B, in_channels, h, w].
        """
        outputs, cells = self._outputs(features)
        lengths = [feature.shape[-2] * feature.shape[-1] for feature in features]
        images = image_list(features, self.strides)
        by_level = {name: list(torch.split(value, lengths, dim=1)) for name, value in outputs.items()}
        anchors = [list(torch.split(cells, lengths))] * len(images.image_sizes)
        return [to_detections(f) for f in self.model.postprocess_detections(by_level, anchors, images.image_sizes)]

    def _outputs(self, features: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the outputs of all locations, [B, L, ...] in float32, and their cells as boxes, [L, 4]."""
        outputs = self.model.head(list(features))
        cells = self.model.anchor_generator(image_list(features, self.strides), list(features))[0]
        return {name: value.float() for name, value in outputs.items()}, cells

    def _image_losses(
        self, objects: Targets, ignored: Tensor, match: Tensor, cells: Tensor, outputs: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        owned = match >= 0
        counted = owned | ~inside_any(_centers(cells), ignored)
        classes = torch.zeros_like(outputs["cls_logits"])
        classes[owned, objects["labels"][match[owned]]] = 1
        focal = sigmoid_focal_loss(outputs["cls_logits"][counted], classes[counted], reduction="sum")
        boxes, own_cells = objects["boxes"][match[owned]], cells[owned]
        found = self.coder.decode(outputs["bbox_regression"][owned], own_cells)
        giou = generalized_box_iou_loss(found, boxes, reduction="sum")
        centrality = _centerness(own_cells, _enlarged(boxes, self.strides[0]))
        logits = outputs["bbox_ctrness"][owned, 0]
        return focal, giou, F.binary_cross_entropy_with_logits(logits, centrality, reduction="sum")


def match_locations(
    boxes_xyxy: Tensor, shapes: Sequence[tuple[int, int]], strides: Sequence[int], center_radius: float
) -> Tensor:
    """Assign an object to each location.

    A location learns the smallest object that contains it, has its centre nearby and has a size in the range of its
    level. Time and memory are linear in the numbers of objects and locations: only locations near an object's centre
    are considered. The size ranges of the levels are adjacent, so every object has a level.

    Args:
        boxes_xyxy: Boxes of objects, [n, 4].
        shapes: Rows and columns of each level.
        strides: Strides of the levels, finest first.
        center_radius: Largest distance from the object's centre along x and y, in strides.

    Returns:
        Object indices, -1 for background, [L]; locations by level, in row-major order.
    """
    order = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(1).argsort(stable=True)
    ranked = _enlarged(boxes_xyxy, strides[0])[order]
    index_of_rank = torch.cat([order, order.new_tensor([_BACKGROUND])])
    ranks = []
    bounds = [0, *(_REACH_STRIDES * stride for stride in strides[:-1]), torch.inf]
    for shape, stride, reach in zip(shapes, strides, pairwise(bounds), strict=True):
        rank, cell = _fitting_cells(ranked, shape, stride, center_radius * stride, reach)
        best = torch.full((shape[0] * shape[1],), len(ranked), device=ranked.device)
        ranks.append(best.scatter_reduce(0, cell, rank, "amin"))
    return index_of_rank[torch.cat(ranks)]


def _fitting_cells(
    boxes_xyxy: Tensor, shape: tuple[int, int], stride: int, radius: float, reach: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return pairs of an object and a cell of one level that may learn it, indices [p] each.

    Args:
        boxes_xyxy: Boxes of objects, [n, 4].
        shape: Rows and columns of the level.
        stride: Stride of the level.
        radius: Largest distance of the cell's centre from the object's along x and y, in pixels.
        reach: Range (exclusive, inclusive) of the distance to the object's farthest side, in pixels.
    """
    center = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
    most = math.ceil(radius / stride)
    steps = torch.arange(-most, most + 1, device=boxes_xyxy.device)
    around = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).reshape(-1, 2)
    cell = (center[:, None] / stride).floor().long() + around
    point = (cell + 0.5) * stride
    sides = torch.cat([point - boxes_xyxy[:, None, :2], boxes_xyxy[:, None, 2:] - point], dim=-1)
    farthest = sides.amax(-1)
    fits = (sides.amin(-1) > 0) & ((point - center[:, None]).abs().amax(-1) < radius)
    fits &= (farthest > reach[0]) & (farthest <= reach[1])
    fits &= ((cell >= 0) & (cell < cell.new_tensor([shape[1], shape[0]]))).all(-1)
    column, row = cell[fits].unbind(-1)
    return fits.nonzero()[:, 0], row * shape[1] + column


def _enlarged(boxes_xyxy: Tensor, stride: int) -> Tensor:
    """Enlarge boxes to at least slightly more than a stride, so that each contains the centre of a cell."""
    center = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
    half = ((boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]) / 2).clamp(min=0.51 * stride)
    return torch.cat([center - half, center + half], dim=1)


def _centers(cells: Tensor) -> Tensor:
    return (cells[:, :2] + cells[:, 2:]) / 2


def _centerness(cells: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """Return the centre-ness (equation 3 of the paper): 1 in the centre of the box, 0 at its border, [n]."""
    points = _centers(cells)
    before, after = points - boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - points
    return (torch.minimum(before, after) / torch.maximum(before, after)).prod(1).sqrt()
