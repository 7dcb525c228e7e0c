"""Common parts of pyramid-based segmentation heads: levels, classifier."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.models.heads.parts import Reach
from perf_vit.models.necks import SimpleFPN, nearest_power_of_two
from perf_vit.types import FeatureSpec

__all__ = [
    "LevelMaps",
    "PixelScores",
    "check_growing_strides",
    "has_one_stride",
    "padded_to",
]


class PixelScores(nn.Module):
    """Classifier at the stride of the map, with bilinear upsampling of the logits to the image.

    The upsampled logits are the only tensor with all classes and all pixels.

    Args:
        channels: Number of channels of the map.
        num_classes: Number of output channels.
        drop_rate: Dropout of whole channels before the classifier.
    """

    def __init__(self, channels: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.drop = nn.Dropout2d(drop_rate)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, decoded: Tensor, image: Tensor) -> Tensor:
        """Compute logits, [B, num_classes, H, W], of a map, [B, channels, h, w], that covers the image."""
        scores = self.classifier(self.drop(decoded))
        if scores.shape[-2:] == image.shape[-2:]:
            return scores
        return F.interpolate(scores, image.shape[-2:], mode="bilinear", align_corners=False)


_STRIDES = (4, 8, 16, 32)


class LevelMaps(nn.Module):
    """Feature levels of increasing stride: a `SimpleFPN` of a plain ViT's maps, or an unchanged pyramid.

    The levels of a ViT are 4, 2, 1 and 1/2 times as fine as its grid of tokens for patches of about 16 px; the finest
    has stride 4, or 3.5 for patches of 14 px. Grids that the coarsest level doesn't divide are padded at the right and
    bottom.

    Args:
        feature_specs: The backbone's maps, of one stride or of increasing ones.
        channels: Number of channels of a ViT's levels.

    Attributes:
        channels: Number of channels of each level.

    Raises:
        ValueError: The strides neither increase nor are equal.
    """

    def __init__(self, feature_specs: Sequence[FeatureSpec], channels: int) -> None:
        super().__init__()
        self.base_stride = 0
        self.channels = [spec.channels for spec in feature_specs]
        if has_one_stride(feature_specs):
            self.channels = [channels] * len(_STRIDES)
            self.base_stride = nearest_power_of_two(feature_specs[0].stride)
            specs = [FeatureSpec(spec.channels, self.base_stride) for spec in feature_specs]
            # The scales of blocks and channels of pretrained ViTs differ by orders of magnitude.
            self.norms = nn.ModuleList(LayerNorm2d(spec.channels) for spec in specs)
            self.neck = SimpleFPN(specs, _STRIDES, channels)
        else:
            check_growing_strides(feature_specs)

    def reach(self) -> Reach:
        """Return how far levels that are resized to the finest look: a convolution and two resizings on each.

        Raises:
            ValueError: The maps are a pyramid.
        """
        if not self.base_stride:
            raise ValueError("its maps are a pyramid, not those of a plain ViT")
        coarsest = max(1, _STRIDES[-1] // self.base_stride)
        # A convolution, a resizing and the cell of the coarsest level, and the resizing of the finest.
        pixels = 3 * max(_STRIDES[-1], self.base_stride) + _STRIDES[0]
        return Reach(math.ceil(pixels / self.base_stride), coarsest)

    def forward(self, features: Sequence[Tensor], decode: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """Apply a decoder to the levels and crop the padding of its output.

        Args:
            features: One map per feature spec, [B, C_i, h_i, w_i].
            decode: Function from the levels, finest first, to a map of the size of the finest.

        Returns:
            Map [B, C, h, w] at the stride of the finest level, which covers the image exactly.
        """
        if not self.base_stride:
            return decode(list(features))
        rows, columns = features[0].shape[-2:]
        normed = [norm(feature) for norm, feature in zip(self.norms, features, strict=True)]
        padded = [padded_to(feature, max(1, _STRIDES[-1] // self.base_stride)) for feature in normed]
        height, width = (side * self.base_stride for side in padded[0].shape[-2:])
        levels = self.neck(padded, (height, width))
        scale = self.base_stride / _STRIDES[0]
        return decode(levels)[..., : math.ceil(rows * scale), : math.ceil(columns * scale)]


def has_one_stride(feature_specs: Sequence[FeatureSpec]) -> bool:
    """Return whether all maps have the same stride, as those of a plain ViT."""
    return len({spec.stride for spec in feature_specs}) == 1


def check_growing_strides(feature_specs: Sequence[FeatureSpec]) -> None:
    """Check that maps form a pyramid.

    Raises:
        ValueError: Strides don't increase.
    """
    strides = [spec.stride for spec in feature_specs]
    if strides != sorted(set(strides)):
        raise ValueError(
            f"expected maps of one stride or of growing strides, got strides {strides}; leave model.out_indices out, "
            "or give growing ones"
        )


def padded_to(feature: Tensor, multiple: int) -> Tensor:
    """Pad a map, [B, C, h, w], at the right and bottom with its border values to multiples of a size."""
    bottom, right = (-side % multiple for side in feature.shape[-2:])
    return F.pad(feature, (0, right, 0, bottom), mode="replicate") if bottom or right else feature
