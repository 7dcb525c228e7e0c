"""A second task for training, which says at every place of a lane what its control decides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lanes import CLASSES
from torch import Tensor, nn
from torch.nn import functional as F
from variants import CHANNELS, STRIDE

from perf_vit.models import Detector
from perf_vit.types import ObjectLabels


class LaneHint(nn.Module):
    """Detector with a 1 x 1 convolution of its level that predicts the class of the lane at every place.

    Platelets cover few places, so that their class alone teaches slowly what the control means. The detector is trained
    in place and needs none of this afterwards.

    Args:
        detector: Detector with one level.
        lane_px: Height of a lane in the detector's tiles.
    """

    def __init__(self, detector: Detector, lane_px: int) -> None:
        super().__init__()
        self.detector = detector
        self.lane_rows = lane_px // STRIDE
        self.says = nn.Conv2d(CHANNELS, 1, 1)
        self.level: Tensor | None = None
        detector.neck.register_forward_hook(self._keep)

    def losses(self, images: Sequence[Tensor], labels: Sequence[ObjectLabels]) -> dict[str, Tensor]:
        """Return the detector's losses and that of the lanes; lanes without platelets don't count."""
        found = self.detector.losses(images, labels)
        assert self.level is not None
        logits = self.says(self.level).float().unflatten(2, (-1, self.lane_rows))
        parts = [
            F.binary_cross_entropy_with_logits(each[0, lane], torch.full_like(each[0, lane], target))
            for each, own in zip(logits, labels, strict=True)
            for lane, target in self._targets(own)
        ]
        return {**found, "lanes": torch.stack(parts).mean() if parts else logits.sum() * 0}

    def _targets(self, labels: ObjectLabels) -> list[tuple[int, float]]:
        """Return each lane's index and whether it is a target's."""
        lanes = (labels.boxes_xyxy[:, 1] // (self.lane_rows * STRIDE)).astype(int)
        is_target = labels.labels == CLASSES.index("target")
        return sorted({(int(lane), float(each)) for lane, each in zip(lanes, is_target, strict=True)})

    def _keep(self, neck: nn.Module, args: tuple[object, ...], levels: list[Tensor]) -> None:
        (self.level,) = levels
