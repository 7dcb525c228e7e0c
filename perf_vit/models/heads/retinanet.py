"""RetinaNet, a one-stage detection head with anchors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.retinanet import RetinaNetHead as RetinaNetConvolutions
from torchvision.ops import box_iou

from perf_vit.models.heads.detection import (
    IGNORED_COVER,
    CenteredAnchors,
    Targets,
    anchor_sides,
    check_channels,
    covered_share,
    image_list,
    make_targets,
    placeholder_backbone,
    register_detection_head,
    split_ignored,
    to_detections,
)
from perf_vit.types import Detections, ObjectLabels

__all__ = ["RetinaNetHead"]

_OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))


@register_detection_head("retinanet")
class RetinaNetHead(nn.Module):
    """RetinaNet: each anchor predicts its class and the offset of its box (Lin et al. 2017, arXiv 1708.02002).

    Uses torchvision's convolutions, with group norms, losses and post-processing. Each stride has anchors of three
    sizes.

    Args:
        in_channels: Number of channels of each level, a multiple of 32 above 32.
        num_classes: Number of foreground classes.
        strides: Strides of the levels, finest first.
        anchor_scale: Size of a level's smallest anchor in strides: 2 gives 8 px at stride 4.
        anchor_ratios: Ratios of height to width of the anchors.
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
        anchor_scale: float = 2.0,
        anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        score_threshold: float = 0.05,
        iou_threshold: float = 0.5,
        detections_per_tile: int = 1000,
    ) -> None:
        super().__init__()
        check_channels(in_channels)
        self.strides = tuple(strides)
        self.per_place = len(_OCTAVES) * len(anchor_ratios)
        sizes = tuple(tuple(side * octave for octave in _OCTAVES) for side in anchor_sides(strides, anchor_scale))
        self.model = RetinaNet(
            placeholder_backbone(in_channels),
            num_classes,
            anchor_generator=CenteredAnchors(sizes, (tuple(anchor_ratios),) * len(strides)),
            head=RetinaNetConvolutions(in_channels, self.per_place, num_classes, partial(nn.GroupNorm, 32)),
            score_thresh=score_threshold,
            nms_thresh=iou_threshold,
            detections_per_img=detections_per_tile,
            topk_candidates=2 * detections_per_tile,
        )

    def losses(self, features: Sequence[Tensor], labels: Sequence[ObjectLabels]) -> dict[str, Tensor]:
        """Compute the focal loss of classes and the L1 loss of boxes.

        Args:
            features: One map per stride, [B, in_channels, h, w].
            labels: Labels of each image; anchors mostly covered by ignored objects are not negatives.
        """
        outputs, anchors = self._outputs(features)
        targets = [split_ignored(make_targets(each, anchors[0].device)) for each in labels]
        matched = [self._match(*each, anchors[0]) for each in targets]
        objects = [each for each, _ in targets]
        losses = self.model.head.compute_loss(objects, outputs, anchors, matched)
        return {"classification": losses["classification"], "box": losses["bbox_regression"]}

    def detect(self, features: Sequence[Tensor]) -> list[Detections]:
        """Detect the objects of each image, in descending order of score.

        Args:
            features: One map per stride, [B, in_channels, h, w].
        """
        outputs, anchors = self._outputs(features)
        lengths = [feature.shape[-2] * feature.shape[-1] * self.per_place for feature in features]
        images = image_list(features, self.strides)
        by_level = {name: list(torch.split(value, lengths, dim=1)) for name, value in outputs.items()}
        split = [list(torch.split(each, lengths)) for each in anchors]
        return [to_detections(f) for f in self.model.postprocess_detections(by_level, split, images.image_sizes)]

    def _outputs(self, features: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        outputs = self.model.head(list(features))
        anchors = self.model.anchor_generator(image_list(features, self.strides), list(features))
        return {name: value.float() for name, value in outputs.items()}, anchors

    def _match(self, objects: Targets, ignored: Tensor, anchors: Tensor) -> Tensor:
        """Return the object index of each anchor, or the matcher's value for background or for neither."""
        matcher: Matcher = self.model.proposal_matcher
        if len(objects["boxes"]):
            matched = matcher(box_iou(objects["boxes"], anchors))
        else:
            matched = torch.full((len(anchors),), matcher.BELOW_LOW_THRESHOLD, device=anchors.device)
        hidden = (covered_share(anchors, ignored) >= IGNORED_COVER) & (matched == matcher.BELOW_LOW_THRESHOLD)
        return torch.where(hidden, matcher.BETWEEN_THRESHOLDS, matched)
