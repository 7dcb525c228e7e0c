"""UPerNet segmentation head."""

from __future__ import annotations

from collections.abc import Sequence

from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn

from perf_vit.models.heads.level_maps import LevelMaps, PixelScores
from perf_vit.models.heads.norms import Norm, apply_norm, with_group_norm
from perf_vit.models.heads.parts import Reach, register_segmentation_head
from perf_vit.types import FeatureSpec

__all__ = ["UPerNetHead"]


@register_segmentation_head("upernet")
class UPerNetHead(nn.Module):
    """UPerNet decoder: pooled context, a top-down path and fusion of all levels (Xiao et al. 2018, arXiv 1807.10221).

    The maps of a plain ViT are first converted to strides 4, 8, 16 and 32 (`LevelMaps`); a pyramid is used unchanged.
    The decoder is that of segmentation_models_pytorch.

    Memory without gradients: 8.5 GB for a tile of 4096 px and 128 channels, independent of the number of classes, and
    the logits (4 bytes x classes x pixels) plus a sixteenth of their size.

    Args:
        feature_specs: The backbone's feature maps, of one stride or of increasing ones.
        in_chans: Number of bands of the image, which is not used.
        num_classes: Number of output channels.
        channels: Number of channels of the levels and the decoder.
        drop_rate: Dropout before the classifier.
        norm: "batch" or "group"; group norm is independent of the other tiles of a batch and works with batches of one.

    Raises:
        ValueError: The strides neither increase nor are equal, or the norm is unknown.
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
        # The first two entries are maps of strides 1 and 2, which the decoder ignores.
        self.decoder = UPerNetDecoder([0, 0, *self.levels.channels], decoder_channels=channels)
        # Its global pooling gives one value per channel, too few for a batch norm with a batch of one tile.
        with_group_norm(self.decoder.psp)
        apply_norm(self.decoder, norm)
        self.scores = PixelScores(channels, num_classes, drop_rate)

    def reach(self) -> Reach:
        """Refuse to run over parts of an image.

        Raises:
            ValueError: Always.
        """
        raise ValueError("its pyramid pooling averages over all tokens")

    def forward(self, features: Sequence[Tensor], image: Tensor) -> Tensor:
        """Compute the class scores of every pixel.

        Args:
            features: One map per feature spec, [B, C_i, H / stride_i, W / stride_i].
            image: Images, [B, in_chans, H, W].

        Returns:
            Logits, [B, num_classes, H, W].
        """
        decoded = self.levels(features, lambda levels: self.decoder([image, image, *levels]))
        return self.scores(decoded, image)
