"""The levels that detection heads look at, made from the one map of a plain ViT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.types import FeatureSpec

__all__ = ["SimpleFPN"]


class SimpleFPN(nn.Module):
    """A feature pyramid without a top-down path, from the last map of a plain ViT (Li et al. 2022, arXiv 2203.16527).

    Transposed convolutions make the finer levels, max pooling the coarser ones. Several maps, as of blocks 5, 8 and 11,
    are projected and summed first.

    A stride that is no power of two (patches of 14 px) is brought to the nearest power of two by bilinear resizing that
    samples at the exact places: pixel i of a level of stride s stands for image pixels [i s, (i + 1) s).

    Args:
        feature_specs: the backbone's maps, all of one stride.
        strides: of the levels, in image pixels; powers of two.
        channels: of each level.

    Attributes:
        size_multiple: height and width of the image that the levels cover must be multiples of it.
        backbone_multiple: the same for the image that the backbone sees, which may be larger.

    Raises:
        ValueError: maps of several strides, or levels whose strides are no powers of two.
    """

    def __init__(self, feature_specs: Sequence[FeatureSpec], strides: Sequence[int], channels: int) -> None:
        super().__init__()
        if len({spec.stride for spec in feature_specs}) != 1:
            raise ValueError(f"expected maps of one stride, got {[spec.stride for spec in feature_specs]}")
        self.backbone_multiple = feature_specs[0].stride
        self.base_stride = nearest_power_of_two(self.backbone_multiple)
        self.size_multiple = max(*strides, self.base_stride)
        width = feature_specs[-1].channels
        several = len(feature_specs) > 1
        self.fuse = nn.ModuleList(nn.Conv2d(spec.channels, width, 1) for spec in feature_specs) if several else None
        self.levels = nn.ModuleList(_level(width, channels, self.base_stride, stride) for stride in strides)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """The levels.

        Args:
            features: the backbone's maps, [B, C_i, h, w], of an image at least as large as `size`.
            size: (height, width) of the image that the levels cover, multiples of `size_multiple`.

        Returns:
            One map a stride, [B, channels, height / stride, width / stride].
        """
        x = features[-1]
        if self.fuse is not None:
            x = torch.stack([conv(feature) for conv, feature in zip(self.fuse, features, strict=True)]).sum(0)
        shape = (size[0] // self.base_stride, size[1] // self.base_stride)
        if self.backbone_multiple == self.base_stride:
            x = x[..., : shape[0], : shape[1]]
        else:
            x = _resampled(x, self.backbone_multiple / self.base_stride, shape)
        return [level(x) for level in self.levels]


def nearest_power_of_two(value: int) -> int:
    """The power of two with the nearest logarithm; of two, the larger."""
    below = 1 << (value.bit_length() - 1)
    return below if value * value < 2 * below * below else 2 * below


def _resampled(feature: Tensor, scale: float, shape: tuple[int, int]) -> Tensor:
    """Bilinear samples at the centres of cells that are `scale` times as many as those of the map."""
    # `interpolate` copies a map whose size stays the same, whatever the scale.
    rows, columns = (
        (torch.arange(num, device=feature.device) + 0.5) * (2 / (scale * side)) - 1
        for num, side in zip(shape, feature.shape[-2:], strict=True)
    )
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    # In bfloat16, places near the edge would be rounded by pixels.
    dtype = torch.promote_types(feature.dtype, torch.float32)
    grid = torch.stack([x, y], -1).expand(len(feature), *shape, 2).to(dtype)
    sampled = F.grid_sample(feature.to(dtype), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.to(feature.dtype)


def _level(width: int, channels: int, base_stride: int, stride: int) -> nn.Sequential:
    steps: list[nn.Module] = []
    for index in range((base_stride // stride).bit_length() - 1):
        if index:
            steps += [LayerNorm2d(width), nn.GELU()]
        # Not below the level's own width, where a narrow ViT is brought to a fine stride.
        narrower = max(width // 2, min(width, channels))
        steps.append(nn.ConvTranspose2d(width, narrower, 2, stride=2))
        width = narrower
    if stride > base_stride:
        steps.append(nn.MaxPool2d(stride // base_stride))
    return nn.Sequential(
        *steps,
        nn.Conv2d(width, channels, 1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        LayerNorm2d(channels),
    )
