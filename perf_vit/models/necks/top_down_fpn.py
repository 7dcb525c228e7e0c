"""The levels that detection heads look at, from a backbone that has a pyramid of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork

from perf_vit.types import FeatureSpec

__all__ = ["TopDownFPN"]


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
