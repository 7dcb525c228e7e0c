"""Segmentation head with full-resolution detail from the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.models.heads.norms import GroupNorm
from perf_vit.models.heads.parts import GridPart, Placement, Reach, register_segmentation_head, resize_part
from perf_vit.types import FeatureSpec

__all__ = ["FullResolutionHead"]


@register_segmentation_head("full_resolution")
class FullResolutionHead(nn.Module):
    """Fusion of a ViT's feature maps with convolutions of the image, step by step up to full resolution.

    Tokens are coarse; edges are located in the pixels. A small convolutional branch processes the image, and its maps
    at strides 8, 4, 2 and 1 are fused with the upsampled token features (the detail capture of Yao et al. 2023,
    "ViTMatte", with one fusion per stride). Features of another stride, such as 14, are resized to the next finer one.

    Memory without gradients: 9.5 GB for a tile of 4096 px and the default widths, independent of the number of classes,
    and the logits (4 bytes x classes x pixels) plus 16 channels of that size.

    Args:
        feature_specs: The backbone's feature maps, all of one stride.
        in_chans: Number of bands of the image.
        num_classes: Number of output channels.
        channels: Number of channels at strides 1, 2, 4, ...; the last one is repeated for larger strides.
        drop_rate: Dropout before the classifier.
        norm: "batch" or "group"; group norm is independent of the other tiles of a batch and of its distribution over
            devices.
    """

    def __init__(
        self,
        feature_specs: Sequence[FeatureSpec],
        in_chans: int,
        num_classes: int,
        channels: Sequence[int] = (16, 32, 64, 96),
        drop_rate: float = 0.0,
        norm: Literal["batch", "group"] = "batch",
    ) -> None:
        super().__init__()
        if norm not in ("batch", "group"):
            raise ValueError(f"norm must be batch or group, got {norm}")
        self.stride = stride = _common_stride(feature_specs)
        num_steps = (stride - 1).bit_length()
        widths = [channels[min(step, len(channels) - 1)] for step in range(num_steps + 1)]

        self.detail = nn.ModuleList(
            _conv_norm_act(before, widths[step], norm, stride=1 if step == 0 else 2)
            for step, before in enumerate([in_chans, *widths[: num_steps - 1]])
        )
        # The scales of blocks and channels of pretrained ViTs differ by orders of magnitude.
        self.laterals = nn.ModuleList(
            nn.Sequential(LayerNorm2d(spec.channels), nn.Conv2d(spec.channels, widths[-1], 1)) for spec in feature_specs
        )
        self.context = _conv_norm_act(widths[-1], widths[-1], norm)
        self.fuse = nn.ModuleList(
            _conv_norm_act(widths[step + 1] + widths[step], widths[step], norm) for step in reversed(range(num_steps))
        )
        self.drop = nn.Dropout2d(drop_rate)
        self.classifier = nn.Conv2d(widths[0], num_classes, 1)

    def reach(self) -> Reach:
        """Return how far the head looks: convolutions and resizing at each stride."""
        coarsest = 2 ** len(self.fuse)
        pixels = 3 * (coarsest - 1) + self.stride
        # One more for tokens whose centres lie off those of the cells that they are resized to.
        margin = math.ceil(pixels / self.stride) + 1
        return Reach(margin, coarsest // 2 // math.gcd(coarsest // 2, self.stride) if len(self.fuse) > 1 else 1)

    def forward(self, features: Sequence[Tensor], image: Tensor, part: GridPart | None = None) -> Tensor:
        """Compute the class scores of every pixel.

        Args:
            features: One map per feature spec, [B, C_i, H / stride, W / stride].
            image: Images, [B, in_chans, H, W].
            part: Which part of a larger image is given; None for whole images.

        Returns:
            Logits, [B, num_classes, H, W].
        """
        details = []
        # Convolutions with few channels at full resolution run twice as fast on CPUs in this layout.
        detail = image.contiguous(memory_format=torch.channels_last)
        for stage in self.detail:
            detail = stage(detail)
            details.append(detail)
        projected = [lateral(feature) for lateral, feature in zip(self.laterals, features, strict=True)]
        x = self.context(torch.stack(projected).sum(0).contiguous(memory_format=torch.channels_last))
        placements = [] if part is None else self._placements(part)
        for step, (stage, detail) in enumerate(zip(self.fuse, reversed(details), strict=True)):
            if part is None:
                x = F.interpolate(x, size=detail.shape[-2:], mode="bilinear", align_corners=False)
            else:
                x = resize_part(x, detail.shape[-2:], placements[step], placements[step + 1])
            x = stage(torch.cat([x, detail], dim=1))
        return self.classifier(self.drop(x))

    def _placements(self, part: GridPart) -> list[tuple[Placement, Placement]]:
        """Return where tokens, and then cells of each map of the image from coarse to fine, lie in the image."""
        tokens = Placement(part.window.row, part.grid[0]), Placement(part.window.col, part.grid[1])
        return [tokens, *reversed(Placement.of_strides(part, self.stride, len(self.detail)))]


def _common_stride(feature_specs: Sequence[FeatureSpec]) -> int:
    strides = {spec.stride for spec in feature_specs}
    if len(strides) != 1:
        raise ValueError(
            f"expected feature maps of one stride, got strides {sorted(strides)}; use a plain ViT, or a head for "
            "pyramids: upernet, segformer, dpt or linear"
        )
    return strides.pop()


def _conv_norm_act(in_channels: int, out_channels: int, norm: str, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels) if norm == "batch" else GroupNorm(min(8, out_channels), out_channels),
        nn.ReLU(inplace=True),
    )
