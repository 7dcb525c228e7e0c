"""Linear segmentation head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.models.heads.parts import Reach, register_segmentation_head
from perf_vit.types import FeatureSpec

__all__ = ["LinearHead"]


@register_segmentation_head("linear")
class LinearHead(nn.Module):
    """Linear classifier of tokens on all feature maps, upsampled bilinearly to the image.

    A linear probe of a frozen backbone; edges are as coarse as the tokens.

    Memory without gradients: 0.1 GB for a tile of 4096 px, and the logits (4 bytes x classes x pixels).

    Args:
        feature_specs: The backbone's feature maps, of one stride or several.
        in_chans: Number of bands of the image, which is not used.
        num_classes: Number of output channels.
        drop_rate: Dropout of whole feature channels.
    """

    def __init__(
        self, feature_specs: Sequence[FeatureSpec], in_chans: int, num_classes: int, drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        # The scales of blocks and channels of pretrained ViTs differ by orders of magnitude.
        self.classifiers = nn.ModuleList(
            nn.Sequential(LayerNorm2d(spec.channels), nn.Dropout2d(drop_rate), nn.Conv2d(spec.channels, num_classes, 1))
            for spec in feature_specs
        )

    def reach(self) -> Reach:
        """Return how far the head looks: to the next token."""
        return Reach(1)

    def forward(self, features: Sequence[Tensor], image: Tensor) -> Tensor:
        """Compute the class scores of every pixel.

        Args:
            features: One map per feature spec, [B, C_i, H / stride_i, W / stride_i].
            image: Images, [B, in_chans, H, W].

        Returns:
            Logits, [B, num_classes, H, W].
        """
        size = max((feature.shape[-2:] for feature in features), key=lambda shape: shape[0])
        scores = [
            classify(feature) if feature.shape[-2:] == size else F.interpolate(classify(feature), size, mode="bilinear")
            for classify, feature in zip(self.classifiers, features, strict=True)
        ]
        return F.interpolate(torch.stack(scores).sum(0), image.shape[-2:], mode="bilinear", align_corners=False)
