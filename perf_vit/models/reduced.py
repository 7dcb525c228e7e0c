"""A backbone that looks at larger pixels than the image has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ReducedBackbone"]


class ReducedBackbone(nn.Module):
    """Averages squares of pixels and gives the result to a `features_only` backbone.

    To neck and head it is a backbone of coarser strides, so all that they know of places stays in image pixels.

    Args:
        backbone: a timm `features_only` model.
        factor: side of the squares, in pixels.

    Attributes:
        feature_info: channels and strides, as timm's models tell them.
    """

    def __init__(self, backbone: nn.Module, factor: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.factor = factor
        self.feature_info = _ReducedInfo(backbone.feature_info, factor)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of images [B, C, H, W] whose sides are multiples of the factor."""
        maps: list[Tensor] = self.backbone(F.avg_pool2d(images, self.factor))
        return maps


class _ReducedInfo:
    def __init__(self, info: Any, factor: int) -> None:
        self._channels: Sequence[int] = info.channels()
        self._strides = [factor * stride for stride in info.reduction()]

    def channels(self) -> list[int]:
        return list(self._channels)

    def reduction(self) -> list[int]:
        return self._strides
