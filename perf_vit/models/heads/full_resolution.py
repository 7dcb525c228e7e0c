"""A segmentation head whose output has the resolution of its input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.models.heads.registry import register_segmentation_head
from perf_vit.types import FeatureSpec

__all__ = ["FullResolutionHead"]


@register_segmentation_head("full_resolution")
class FullResolutionHead(nn.Module):
    """Fuse a ViT's feature maps with convolutions on the pixels, step by step up to full resolution.

    A patch token says what is there; only the pixels say where its edge runs. A small convolutional branch runs on
    the image itself, and its maps at strides 8, 4, 2 and 1 join the token features on their way up (the detail
    capture of Yao et al. 2023, "ViTMatte", with one fusion a stride). Features of another stride, such as 14, are
    resized to the next finer one.

    Memory, without gradients: 9.5 GB for a tile of 4096 px and the default widths, whatever the number of classes;
    after that the logits once (4 bytes x classes x pixels), beside 16 channels of that size.

    Args:
        feature_specs: the backbone's feature maps, all of one stride.
        in_chans: bands of the image.
        num_classes: channels of the output.
        channels: widths at strides 1, 2, 4, ...; the last one is repeated for larger strides.
        drop_rate: dropout before the classifier.
        norm: "batch" or "group"; the latter doesn't depend on the other tiles of a batch, nor on how a batch is split
            between devices.
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
        stride = _common_stride(feature_specs)
        num_steps = (stride - 1).bit_length()
        widths = [channels[min(step, len(channels) - 1)] for step in range(num_steps + 1)]

        self.detail = nn.ModuleList(
            _conv_norm_act(before, widths[step], norm, stride=1 if step == 0 else 2)
            for step, before in enumerate([in_chans, *widths[: num_steps - 1]])
        )
        # Blocks of pretrained ViTs differ by orders of magnitude in scale, and so do their channels.
        self.laterals = nn.ModuleList(
            nn.Sequential(LayerNorm2d(spec.channels), nn.Conv2d(spec.channels, widths[-1], 1)) for spec in feature_specs
        )
        self.context = _conv_norm_act(widths[-1], widths[-1], norm)
        self.fuse = nn.ModuleList(
            _conv_norm_act(widths[step + 1] + widths[step], widths[step], norm) for step in reversed(range(num_steps))
        )
        self.drop = nn.Dropout2d(drop_rate)
        self.classifier = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, features: Sequence[Tensor], image: Tensor) -> Tensor:
        """Class scores for every pixel.

        Args:
            features: one map per feature spec, [B, C_i, H / stride, W / stride].
            image: [B, in_chans, H, W].

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
        for stage, detail in zip(self.fuse, reversed(details), strict=True):
            x = F.interpolate(x, size=detail.shape[-2:], mode="bilinear", align_corners=False)
            x = stage(torch.cat([x, detail], dim=1))
        return self.classifier(self.drop(x))


def _common_stride(feature_specs: Sequence[FeatureSpec]) -> int:
    strides = {spec.stride for spec in feature_specs}
    if len(strides) != 1:
        raise ValueError(f"expected feature maps of one stride, got strides {sorted(strides)}; use a plain ViT")
    return strides.pop()


def _conv_norm_act(in_channels: int, out_channels: int, norm: str, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels) if norm == "batch" else nn.GroupNorm(min(8, out_channels), out_channels),
        nn.ReLU(inplace=True),
    )
