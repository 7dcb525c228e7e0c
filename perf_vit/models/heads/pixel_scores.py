"""From a decoder's map to class scores of every pixel."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PixelScores"]


class PixelScores(nn.Module):
    """Class scores at the map's own stride, enlarged bilinearly to the image.

    The enlarged logits are the only tensor that has both all classes and all pixels.

    Args:
        channels: of the map.
        num_classes: channels of the output.
        drop_rate: dropout of whole channels before the classifier.
    """

    def __init__(self, channels: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.drop = nn.Dropout2d(drop_rate)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, decoded: Tensor, image: Tensor) -> Tensor:
        """Logits [B, num_classes, H, W] of a map [B, channels, h, w] that covers the image [B, C, H, W]."""
        scores = self.classifier(self.drop(decoded))
        if scores.shape[-2:] == image.shape[-2:]:
            return scores
        return F.interpolate(scores, image.shape[-2:], mode="bilinear", align_corners=False)
