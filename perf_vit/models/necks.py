"""Necks, which convert a backbone's maps to the levels of detection heads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork

from perf_vit.types import FeatureSpec

__all__ = ["SimpleFPN", "TopDownFPN", "build_neck"]


class TopDownFPN(nn.Module):
    """Feature pyramid with a top-down path (Lin et al. 2017, arXiv 1612.03144) over maps of several strides.

    It uses the maps from the finest requested stride to the backbone's coarsest, so the coarsest maps provide context
    even without a level of their stride. Levels finer than all maps are resized from the finest map, coarser ones are
    max pooled.

    Args:
        feature_specs: The backbone's maps, of increasing strides that are powers of two.
        strides: Strides of the levels in image pixels, powers of two.
        channels: Number of channels of each level.

    Attributes:
        size_multiple: Multiple of height and width of the image that the levels cover.
        backbone_multiple: Multiple of height and width of the backbone's input.

    Raises:
        ValueError: Strides aren't powers of two.
    """

    def __init__(self, feature_specs: Sequence[FeatureSpec], strides: Sequence[int], channels: int) -> None:
        super().__init__()
        odd = [spec.stride for spec in feature_specs if spec.stride & (spec.stride - 1)]
        if odd:
            raise ValueError(f"expected maps whose strides are powers of two, got {odd}")
        self.strides = tuple(strides)
        self.map_strides = [spec.stride for spec in feature_specs]
        coarsest = max(self.map_strides)
        self.first = next((i for i, stride in enumerate(self.map_strides) if stride >= min(strides)), -1)
        used = feature_specs[self.first :]
        self.used_strides = [spec.stride for spec in used]
        self.fpn = FeaturePyramidNetwork([spec.channels for spec in used], channels, norm_layer=LayerNorm2d)
        for index, stride in enumerate(self.used_strides):
            # Maps used only for context need no smoothing; unused parameters would break distributed training.
            if index and stride not in self._sources():
                self.fpn.layer_blocks[index] = nn.Identity()
        self.refine = nn.ModuleDict(
            {
                str(stride): nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), LayerNorm2d(channels))
                for stride in strides
                if stride < self.used_strides[0]
            }
        )
        self.size_multiple = max(*strides, coarsest)
        self.backbone_multiple = coarsest

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Compute the levels.

        Args:
            features: The backbone's maps, [B, C_i, height / stride_i, width / stride_i].
            size: (height, width) of the image, multiples of `size_multiple`.

        Returns:
            One map per stride, [B, channels, height / stride, width / stride].
        """
        named = zip(self.used_strides, features[self.first :], strict=True)
        maps: dict[str, Tensor] = self.fpn(OrderedDict((str(stride), feature) for stride, feature in named))
        return [self._level(maps, stride, size) for stride in self.strides]

    def _level(self, maps: dict[str, Tensor], stride: int, size: tuple[int, int]) -> Tensor:
        if str(stride) in maps:
            return maps[str(stride)]
        if stride < self.used_strides[0]:
            finest = maps[str(self.used_strides[0])]
            shape = (size[0] // stride, size[1] // stride)
            return self.refine[str(stride)](F.interpolate(finest, size=shape, mode="bilinear"))
        source = self._source(stride)
        return F.max_pool2d(maps[str(source)], stride // source)

    def _sources(self) -> set[int]:
        return {self._source(stride) for stride in self.strides}

    def _source(self, stride: int) -> int:
        """Return the stride of the map that a level is made from."""
        return max((used for used in self.used_strides if used <= stride), default=self.used_strides[0])


class SimpleFPN(nn.Module):
    """Feature pyramid without a top-down path, from the last map of a plain ViT (Li et al. 2022, arXiv 2203.16527).

    Transposed convolutions make the finer levels, max pooling the coarser ones. Several maps, such as those of blocks
    5, 8 and 11, are projected and summed first.

    Maps whose stride is not a power of two (patches of 14 px) are resampled bilinearly to the nearest power of two at
    exact positions: pixel i of a level of stride s covers image pixels [i s, (i + 1) s).

    Args:
        feature_specs: The backbone's maps, all of one stride.
        strides: Strides of the levels in image pixels, powers of two.
        channels: Number of channels of each level.

    Attributes:
        size_multiple: Multiple of height and width of the image that the levels cover.
        backbone_multiple: Multiple of height and width of the backbone's input, which may be larger.

    Raises:
        ValueError: The maps have several strides, or the strides of the levels aren't powers of two.
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
        """Compute the levels.

        Args:
            features: The backbone's maps, [B, C_i, h, w], of an image at least as large as `size`.
            size: (height, width) of the image that the levels cover, multiples of `size_multiple`.

        Returns:
            One map per stride, [B, channels, height / stride, width / stride].
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
    """Return the power of two with the nearest logarithm, the larger in case of a tie."""
    below = 1 << (value.bit_length() - 1)
    return below if value * value < 2 * below * below else 2 * below


def _resampled(feature: Tensor, scale: float, shape: tuple[int, int]) -> Tensor:
    """Sample a map bilinearly at the centres of a grid `scale` times as fine."""
    # Not `interpolate`, which ignores the scale if the size is unchanged.
    rows, columns = (
        (torch.arange(num, device=feature.device) + 0.5) * (2 / (scale * side)) - 1
        for num, side in zip(shape, feature.shape[-2:], strict=True)
    )
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    # In bfloat16, positions would be rounded by whole pixels.
    dtype = torch.promote_types(feature.dtype, torch.float32)
    grid = torch.stack([x, y], -1).expand(len(feature), *shape, 2).to(dtype)
    sampled = F.grid_sample(feature.to(dtype), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.to(feature.dtype)


def _level(width: int, channels: int, base_stride: int, stride: int) -> nn.Sequential:
    steps: list[nn.Module] = []
    for index in range((base_stride // stride).bit_length() - 1):
        if index:
            steps += [LayerNorm2d(width), nn.GELU()]
        # Not below `channels`, for fine levels of a narrow ViT.
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


def build_neck(feature_specs: Sequence[FeatureSpec], strides: Sequence[int], channels: int) -> SimpleFPN | TopDownFPN:
    """Build a `SimpleFPN` for maps of one stride, a `TopDownFPN` for a pyramid.

    Raises:
        ValueError: The strides don't increase or aren't powers of two.
    """
    if not strides or list(strides) != sorted(set(strides)) or any(s < 1 or s & (s - 1) for s in strides):
        raise ValueError(f"expected growing strides that are powers of two, as [4, 8, 16, 32, 64], got {list(strides)}")
    one_stride = len({spec.stride for spec in feature_specs}) == 1
    return (SimpleFPN if one_stride else TopDownFPN)(feature_specs, strides, channels)
