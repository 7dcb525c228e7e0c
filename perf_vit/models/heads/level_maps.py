"""Norms of decoders whose own are batch norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.models.necks import SimpleFPN, nearest_power_of_two
from perf_vit.types import FeatureSpec

__all__ = [
    "LevelMaps",
    "Norm",
    "PixelScores",
    "apply_norm",
    "check_growing_strides",
    "has_one_stride",
    "padded_to",
    "with_group_norm",
]

Norm = Literal["batch", "group"]


def apply_norm(module: nn.Module, norm: Norm) -> None:
    """Leave a module its batch norms, or put group norms in their places.

    Raises:
        ValueError: neither batch nor group.
    """
    if norm not in ("batch", "group"):
        raise ValueError(f"norm must be batch or group, got {norm}")
    if norm == "group":
        with_group_norm(module)


def with_group_norm(module: nn.Module) -> None:
    """Put group norms of up to 8 groups in the places of batch norms."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            # Two channels a group at least: of one, a map of one cell has no spread.
            setattr(module, name, nn.GroupNorm(math.gcd(8, child.num_features // 2), child.num_features))
        else:
            with_group_norm(child)


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


_STRIDES = (4, 8, 16, 32)


class LevelMaps(nn.Module):
    """Maps of growing stride: a `SimpleFPN` over a plain ViT's maps, or a pyramid as it is.

    A ViT's levels are 4, 2, 1 and 1/2 times as fine as its grid of tokens where patches are about 16 pixels large; the
    finest is at stride 4, or at 3.5 of patches of 14. Token grids that the coarsest level doesn't divide are continued
    at the right and the bottom.

    Args:
        feature_specs: the backbone's maps, of one stride or of growing ones.
        channels: of a ViT's levels.

    Attributes:
        channels: of each level.

    Raises:
        ValueError: strides that neither grow nor are all the same.
    """

    def __init__(self, feature_specs: Sequence[FeatureSpec], channels: int) -> None:
        super().__init__()
        self.base_stride = 0
        self.channels = [spec.channels for spec in feature_specs]
        if has_one_stride(feature_specs):
            self.channels = [channels] * len(_STRIDES)
            self.base_stride = nearest_power_of_two(feature_specs[0].stride)
            specs = [FeatureSpec(spec.channels, self.base_stride) for spec in feature_specs]
            # Blocks of pretrained ViTs differ by orders of magnitude in scale, and so do their channels.
            self.norms = nn.ModuleList(LayerNorm2d(spec.channels) for spec in specs)
            self.neck = SimpleFPN(specs, _STRIDES, channels)
        else:
            check_growing_strides(feature_specs)

    def forward(self, features: Sequence[Tensor], decode: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """What a decoder makes of the levels, at the finest level's stride, without the continuation.

        Args:
            features: one map per feature spec, [B, C_i, h_i, w_i].
            decode: the levels, finest first, to a map of the finest one's size.

        Returns:
            [B, C, h, w], which covers the image exactly.
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
    """Whether the maps are those of a plain ViT."""
    return len({spec.stride for spec in feature_specs}) == 1


def check_growing_strides(feature_specs: Sequence[FeatureSpec]) -> None:
    """Refuse maps that are no pyramid.

    Raises:
        ValueError: strides that don't grow from map to map.
    """
    strides = [spec.stride for spec in feature_specs]
    if strides != sorted(set(strides)):
        raise ValueError(f"expected maps of one stride or of growing strides, got strides {strides}")


def padded_to(feature: Tensor, multiple: int) -> Tensor:
    """A map [B, C, h, w], continued by its border values until the sides are multiples."""
    bottom, right = (-side % multiple for side in feature.shape[-2:])
    return F.pad(feature, (0, right, 0, bottom), mode="replicate") if bottom or right else feature
