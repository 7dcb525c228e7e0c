"""Two-stage detection heads: Faster R-CNN, and Mask R-CNN for instance masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, paste_masks_in_image
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from perf_vit.errors import InputError
from perf_vit.models.heads.detection import (
    IGNORED_COVER,
    IGNORED_LABEL,
    CenteredAnchors,
    Targets,
    anchor_sides,
    covered_share,
    image_list,
    make_targets,
    register_detection_head,
    split_ignored,
    to_detections,
)
from perf_vit.types import Detections, ObjectLabels

__all__ = ["FasterRCNNHead", "MaskRCNNHead"]

_MASKS_AT_ONCE = 16


@register_detection_head("faster_rcnn")
class FasterRCNNHead(nn.Module):
    """Faster R-CNN: proposals from anchors, then a class and a box per proposal (Ren et al. 2015, arXiv 1506.01497).

    Uses torchvision's proposal network and region heads. Ignored objects are neither positive nor negative in both.

    Args:
        in_channels: Number of channels of each level.
        num_classes: Number of foreground classes.
        strides: Strides of the levels, finest first.
        anchor_scale: Size of a level's anchor in strides: 2 gives 8 px at stride 4.
        anchor_ratios: Ratios of height to width of the anchors.
        hidden: Width of the two layers of the region head.
        proposals_per_tile: Number of proposals for the second stage.
        score_threshold: Lowest score of a detection.
        iou_threshold: Largest IoU of two detections of a class.
        detections_per_tile: Largest number of detections, best first; dense tiles need many.
    """

    kind = "boxes"

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        strides: Sequence[int],
        *,
        anchor_scale: float = 2.0,
        anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        hidden: int = 1024,
        proposals_per_tile: int = 1000,
        score_threshold: float = 0.05,
        iou_threshold: float = 0.5,
        detections_per_tile: int = 1000,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        sizes = tuple((side,) for side in anchor_sides(strides, anchor_scale))
        anchors = CenteredAnchors(sizes, (tuple(anchor_ratios),) * len(strides))
        self.rpn = _proposal_network(in_channels, anchors, proposals_per_tile)
        self.roi_heads = _RegionHeads(
            region_pool(strides, output_size=7),
            TwoMLPHead(in_channels * 7**2, hidden),
            FastRCNNPredictor(hidden, num_classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=256,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=score_threshold,
            nms_thresh=iou_threshold,
            detections_per_img=detections_per_tile,
            **self._mask_parts(in_channels, num_classes, strides),
        )

    def losses(self, features: Sequence[Tensor], labels: Sequence[ObjectLabels]) -> dict[str, Tensor]:
        """Compute the losses of both stages.

        Args:
            features: One map per stride, [B, in_channels, h, w].
            labels: Labels of each image.

        Raises:
            InputError: The head needs masks and the labels have none.
        """
        masks = self.roi_heads.has_mask()
        if masks and any(each.masks is None for each in labels):
            raise InputError("expected labels with masks, got boxes alone; choose head faster_rcnn, fcos or retinanet")
        device = features[0].device
        targets = [make_targets(each, device, first_class=1, masks=masks) for each in labels]
        return self._stages(features, targets)[1]

    def detect(self, features: Sequence[Tensor]) -> list[Detections]:
        """Detect the objects of each image, in descending order of score.

        Args:
            features: One map per stride, [B, in_channels, h, w].
        """
        found, _ = self._stages(features, None)
        return [to_detections(each, first_class=1) for each in found]

    def _stages(
        self, features: Sequence[Tensor], targets: list[Targets] | None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        images = image_list(features, self.strides)
        # Box arithmetic in half precision has errors of pixels.
        with torch.autocast(features[0].device.type, enabled=False):
            named = {str(stride): feature.float() for stride, feature in zip(self.strides, features, strict=True)}
            proposals, proposal_losses = self.rpn(images, named, targets)
            found, region_losses = self.roi_heads(named, proposals, images.image_sizes, targets)
        return found, {
            name.removeprefix("loss_"): value for name, value in {**proposal_losses, **region_losses}.items()
        }

    def _mask_parts(self, in_channels: int, num_classes: int, strides: Sequence[int]) -> dict[str, Any]:
        return {}


@register_detection_head("mask_rcnn")
class MaskRCNNHead(FasterRCNNHead):
    """Mask R-CNN: Faster R-CNN with a mask per object (He et al. 2017, arXiv 1703.06870).

    The arguments are those of `FasterRCNNHead`. Masks have the size of the tile, 1 byte per pixel and object, so keep
    `detections_per_tile` low.
    """

    kind = "masks"

    def detect(self, features: Sequence[Tensor]) -> list[Detections]:
        """Detect the objects of each image, in descending order of score, with masks.

        Args:
            features: One map per stride, [B, in_channels, h, w].
        """
        found, _ = self._stages(features, None)
        height, width = image_list(features, self.strides).image_sizes[0]
        return [
            Detections(
                scores=each["scores"],
                labels=each["labels"] - 1,
                masks=_paste_masks(each["masks"], each["boxes"], (height, width)),
            )
            for each in found
        ]

    def _mask_parts(self, in_channels: int, num_classes: int, strides: Sequence[int]) -> dict[str, Any]:
        return {
            "mask_roi_pool": region_pool(strides, output_size=14),
            "mask_head": MaskRCNNHeads(in_channels, (in_channels,) * 4, 1),
            "mask_predictor": MaskRCNNPredictor(in_channels, in_channels, num_classes + 1),
        }


class _ProposalNetwork(RegionProposalNetwork):
    """Proposal network that excludes ignored objects from positive and negative anchors."""

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[Targets]
    ) -> tuple[list[Tensor], list[Tensor]]:
        split = [split_ignored(each) for each in targets]
        labels, boxes = super().assign_targets_to_anchors(anchors, [objects for objects, _ in split])
        regions = [ignored for _, ignored in split]
        return [_without_ignored(*each) for each in zip(labels, anchors, regions, strict=True)], boxes


class _RegionHeads(RoIHeads):
    """Region heads that exclude ignored objects, which come last in the targets, from training."""

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        counts = [labels != IGNORED_LABEL for labels in gt_labels]
        objects = [boxes[count] for boxes, count in zip(gt_boxes, counts, strict=True)]
        classes = [labels[count] for labels, count in zip(gt_labels, counts, strict=True)]
        matched, labels = super().assign_targets_to_proposals(proposals, objects, classes)
        regions = [boxes[~count] for boxes, count in zip(gt_boxes, counts, strict=True)]
        return matched, [_without_ignored(*each) for each in zip(labels, proposals, regions, strict=True)]


def _without_ignored(labels: Tensor, boxes: Tensor, regions: Tensor) -> Tensor:
    """Set labels of negatives covered by an ignored object to -1, which the sampler skips."""
    share = covered_share(boxes, regions)
    hidden = (labels == 0) & (share >= IGNORED_COVER)
    # The losses are means over samples, so at least one sample must remain.
    if not ((labels >= 0) & ~hidden).any():
        hidden[share.argmin()] = False
    return torch.where(hidden, torch.full_like(labels, IGNORED_LABEL), labels)


def _proposal_network(in_channels: int, anchors: CenteredAnchors, proposals_per_tile: int) -> _ProposalNetwork:
    before, after = ({"training": n, "testing": n} for n in (2 * proposals_per_tile, proposals_per_tile))
    return _ProposalNetwork(
        anchors,
        RPNHead(in_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n=before,
        post_nms_top_n=after,
        nms_thresh=0.7,
    )


def region_pool(strides: Sequence[int], output_size: int) -> MultiScaleRoIAlign:
    """Make the pooling of region features, from the level of the region's size: up to 112 px at stride 4.

    A level also covers the sizes of octaves without a level, up to the next coarser level.
    """
    pool = MultiScaleRoIAlign([str(stride) for stride in strides], output_size, sampling_ratio=2)
    # Set explicitly; torchvision infers both from the first images.
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = _LevelOfSize(strides)
    return pool


class _LevelOfSize(LevelMapper):
    """torchvision's mapping of regions to levels, extended to strides that skip powers of two."""

    def __init__(self, strides: Sequence[int]) -> None:
        octaves = [stride.bit_length() - 1 for stride in strides]
        super().__init__(octaves[0], octaves[-1], canonical_scale=224, canonical_level=4)
        self.first_octaves = [octave - octaves[0] for octave in octaves]

    def __call__(self, boxlists: list[Tensor]) -> Tensor:
        """Return the level index of each region of all images."""
        octave = super().__call__(boxlists)
        return torch.bucketize(octave, octave.new_tensor(self.first_octaves), right=True) - 1


def _paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Paste masks [n, 1, 28, 28] into bool [n, height, width], a few at a time because of the float32 intermediates."""
    whole = torch.zeros((len(boxes), *size), dtype=torch.bool, device=boxes.device)
    for start in range(0, len(boxes), _MASKS_AT_ONCE):
        some = slice(start, start + _MASKS_AT_ONCE)
        whole[some] = paste_masks_in_image(masks[some], boxes[some], size)[:, 0] > 0.5
    return whole
