"""Necks: feature levels of detection heads from the maps of a backbone."""

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
    """A feature pyramid with a top-down path (Lin et al. 2017, arXiv 1612.03144) over maps of several strides.

    It uses the maps from the finest stride asked for up to the backbone's coarsest, so the coarsest ones give context
    even if no level has their stride. Levels finer than any map are resized from the finest, levels coarser than any
    are max pooled.

    Args:
        feature_specs: the backbone's maps, of growing strides that are powers of two.
        strides: of the levels, in image pixels; powers of two.
        channels: of each level.

    Attributes:
        size_multiple: height and width of the image that the levels cover must be multiples of it.
        backbone_multiple: the same for the image that the backbone sees.

    Raises:
        ValueError: strides that are no powers of two.
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
            # Maps that only give context need no smoothing, and parameters without gradients stop distributed training.
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
        """The levels.

        Args:
            features: the backbone's maps, [B, C_i, height / stride_i, width / stride_i].
            size: (height, width) of the image, multiples of `size_multiple`.

        Returns:
            One map a stride, [B, channels, height / stride, width / stride].
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
        """Stride of the map that a level is made of."""
        return max((used for used in self.used_strides if used <= stride), default=self.used_strides[0])


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


def build_neck(feature_specs: Sequence[FeatureSpec], strides: Sequence[int], channels: int) -> SimpleFPN | TopDownFPN:
    """`SimpleFPN` for maps of one stride, `TopDownFPN` for a pyramid.

    Raises:
        ValueError: strides that don't grow or are no powers of two.
    """
    if not strides or list(strides) != sorted(set(strides)) or any(s < 1 or s & (s - 1) for s in strides):
        raise ValueError(f"expected growing strides that are powers of two, as [4, 8, 16, 32, 64], got {list(strides)}")
    one_stride = len({spec.stride for spec in feature_specs}) == 1
    return (SimpleFPN if one_stride else TopDownFPN)(feature_specs, strides, channels)
