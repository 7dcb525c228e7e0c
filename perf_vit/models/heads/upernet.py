"""UPerNet: a top-down pyramid with pooled context over four levels."""

from __future__ import annotations

from collections.abc import Sequence

from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn

from perf_vit.models.heads.level_maps import LevelMaps, Norm, PixelScores, apply_norm, with_group_norm
from perf_vit.models.heads.registry import register_segmentation_head
from perf_vit.types import FeatureSpec

__all__ = ["UPerNetHead"]


@register_segmentation_head("upernet")
class UPerNetHead(nn.Module):
    """Pooled context, a top-down path and the fusion of all its levels (Xiao et al. 2018, arXiv 1807.10221).

    A plain ViT's maps become levels at strides 4, 8, 16 and 32 first (`LevelMaps`); a pyramid is used as it is. The
    decoder is that of segmentation_models_pytorch.

    Memory, without gradients: 8.5 GB for a tile of 4096 px and 128 channels, whatever the number of classes; after that
    the logits once (4 bytes x classes x pixels), beside a sixteenth of them.

    Args:
        feature_specs: the backbone's feature maps, of one stride or of growing ones.
        in_chans: bands of the image, which it doesn't look at.
        num_classes: channels of the output.
        channels: of the levels and of the decoder.
        drop_rate: dropout before the classifier.
        norm: "batch" or "group"; the latter doesn't depend on the other tiles of a batch, and goes with batches of one.

    Raises:
        ValueError: strides that neither grow nor are all the same, or another norm.
    """

    def __init__(
        self,
        feature_specs: Sequence[FeatureSpec],
        in_chans: int,
        num_classes: int,
        channels: int = 128,
        drop_rate: float = 0.1,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        self.levels = LevelMaps(feature_specs, channels)
        # The first two are maps of strides 1 and 2, which the decoder doesn't look at.
        self.decoder = UPerNetDecoder([0, 0, *self.levels.channels], decoder_channels=channels)
        # Of its means over all pixels, a batch of one tile has a single value a channel.
        with_group_norm(self.decoder.psp)
        apply_norm(self.decoder, norm)
        self.scores = PixelScores(channels, num_classes, drop_rate)

    def forward(self, features: Sequence[Tensor], image: Tensor) -> Tensor:
        """Class scores for every pixel.

        Args:
            features: one map per feature spec, [B, C_i, H / stride_i, W / stride_i].
            image: [B, in_chans, H, W].

        Returns:
            Logits, [B, num_classes, H, W].
        """
        decoded = self.levels(features, lambda levels: self.decoder([image, image, *levels]))
        return self.scores(decoded, image)
