"""DPT segmentation head."""

from __future__ import annotations

from collections.abc import Sequence

from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from perf_vit.models.heads.level_maps import (
    PixelScores,
    check_growing_strides,
    has_one_stride,
    padded_to,
)
from perf_vit.models.heads.norms import Norm, apply_norm
from perf_vit.models.heads.parts import Reach, register_segmentation_head
from perf_vit.models.necks import nearest_power_of_two
from perf_vit.types import FeatureSpec

__all__ = ["DPTHead"]

_MAX_MAPS = 4


@register_segmentation_head("dpt")
class DPTHead(nn.Module):
    """Dense prediction transformer: maps at four strides, fused to stride 2 (Ranftl et al. 2021, arXiv 2103.13413).

    The first map, of the earliest block, is resized to stride 4, the next ones to 8, 16 and 32, so the order of
    `model.out_indices` matters. Patches of 14 px give strides of 3.5, 7, ... The decoder is that of
    segmentation_models_pytorch, without class tokens.

    Memory without gradients: 3.5 GB for a tile of 4096 px and 64 channels, independent of the number of classes, and
    the logits (4 bytes x classes x pixels) plus a quarter of their size.

    Args:
        feature_specs: The backbone's feature maps, up to four, of one stride or of increasing ones.
        in_chans: Number of bands of the image, which is not used.
        num_classes: Number of output channels.
        channels: Number of channels of the decoder.
        drop_rate: Dropout before the classifier.
        norm: "batch" or "group"; group norm is independent of the other tiles of a batch.

    Raises:
        ValueError: There are more maps, their strides neither increase nor are equal, or the norm is unknown.
    """

    def __init__(
        self,
        feature_specs: Sequence[FeatureSpec],
        in_chans: int,
        num_classes: int,
        channels: int = 64,
        drop_rate: float = 0.1,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        if len(feature_specs) > _MAX_MAPS:
            raise ValueError(
                f"expected up to {_MAX_MAPS} feature maps, got {len(feature_specs)}; choose with model.out_indices"
            )
        if not has_one_stride(feature_specs):
            check_growing_strides(feature_specs)
        self.strides = [nearest_power_of_two(spec.stride) for spec in feature_specs]
        # The scales of blocks and channels of pretrained ViTs differ by orders of magnitude.
        self.norms = nn.ModuleList(LayerNorm2d(spec.channels) for spec in feature_specs)
        self.decoder = DPTDecoder(
            [spec.channels for spec in feature_specs],
            self.strides,
            encoder_has_prefix_tokens=False,
            readout="ignore",
            intermediate_channels=[channels] * len(feature_specs),
            fusion_channels=channels,
        )
        self.refine = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )
        apply_norm(self.decoder, norm)
        apply_norm(self.refine, norm)
        self.scores = PixelScores(channels, num_classes, drop_rate)

    def reach(self) -> Reach:
        """Refuse to run over parts of an image.

        Raises:
            ValueError: Always.
        """
        raise ValueError("it resizes maps from corner to corner, so that places in them depend on the image's size")

    def forward(self, features: Sequence[Tensor], image: Tensor) -> Tensor:
        """Compute the class scores of every pixel.

        Args:
            features: One map per feature spec, [B, C_i, H / stride_i, W / stride_i].
            image: Images, [B, in_chans, H, W].

        Returns:
            Logits, [B, num_classes, H, W].
        """
        coarsest = 2 ** (len(features) + 1)
        maps = [
            padded_to(norm(feature), max(1, coarsest // stride))
            for norm, feature, stride in zip(self.norms, features, self.strides, strict=True)
        ]
        decoded = self.decoder(maps, [None] * len(maps))
        rows, columns = (side * self.strides[0] // 2 for side in features[0].shape[-2:])
        return self.scores(self.refine(decoded[..., :rows, :columns]), image)
