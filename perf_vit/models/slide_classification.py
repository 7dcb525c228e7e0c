"""Slide classification by multiple-instance learning: encoder, gated attention pooling, classifier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from perf_vit.errors import ConfigError
from perf_vit.models.backbone import BackboneConfig, constructor_errors
from perf_vit.models.batched_pooling import ReadWindows, pool_in_batches
from perf_vit.models.classification import build_pooled
from perf_vit.models.finetune import batch_norms
from perf_vit.models.input_spec import TaskSpec
from perf_vit.models.segmentation import network_id
from perf_vit.models.valid_tokens import forward_head, forward_tokens, key_mask

__all__ = [
    "GatedAttentionPool",
    "SlideClassificationModelConfig",
    "SlideClassificationSpec",
    "SlideClassifier",
    "build_slide_classifier",
]


@dataclass(kw_only=True)
class SlideClassificationModelConfig(BackboneConfig):
    """Encoder of windows and the pooling of its features; `BackboneConfig` has further keys.

    Attributes:
        pool: Pooling of the encoder, token, avg, max or avgmax, or map with `through_encoder`; None for the backbone's
            own.
        hidden_dim: Dimension of the features that are pooled.
        attention_dim: Dimension of the hidden layer of the attention.
        drop_rate: Dropout of the features during training.
        through_encoder: Whether to train the encoder, too, with gradients from all windows of a slide; else it is
            frozen, and features are computed once.
    """

    backbone: str = "vit_small_patch14_dinov2"
    pool: str | None = None
    hidden_dim: int = 256
    attention_dim: int = 128
    drop_rate: float = 0.25
    through_encoder: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SlideClassificationSpec(TaskSpec):
    """Input and output of a slide classifier, saved with its weights.

    Attributes:
        min_tissue: Smallest fraction of tissue in a window.

    The other attributes are those of `InputSpec`. Without `tissue`, windows of glass are used, too. `label_options` are
    the columns of the CSV files of its training.
    """

    min_tissue: float = 0.25


class GatedAttentionPool(nn.Module):
    """Gated attention pooling of a bag of any size (Ilse, Tomczak and Welling 2018, eqs. 7 and 9).

    a_k = softmax_k(w^T (tanh(V h_k) * sigmoid(U h_k))), z = sum_k a_k h_k; "Attention-based deep multiple instance
    learning".

    Args:
        dim: Dimension of the features h.
        hidden_dim: Number of rows of V and U.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.value = nn.Linear(dim, hidden_dim)
        self.gate = nn.Linear(dim, hidden_dim)
        self.weight = nn.Linear(hidden_dim, 1)

    def forward(self, bags: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pool bags.

        Args:
            bags: Features, [B, N, D].
            mask: bool [B, N], False for padding; at least one instance in each bag.

        Returns:
            Pooled features, [B, D], and attention, [B, N], which sums to 1 and is 0 for padding.
        """
        scores = self.scores(bags)
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        attention = wide.masked_fill(~mask, -torch.inf).softmax(dim=1)
        pooled = torch.einsum("bn,bnd->bd", attention.to(bags.dtype), bags)
        return pooled, attention

    def scores(self, bags: Tensor) -> Tensor:
        """Compute the logits of the attention, [...], of features [..., D]."""
        logits: Tensor = self.weight(self.value(bags).tanh() * self.gate(bags).sigmoid())
        return logits.squeeze(-1)


class SlideClassifier(nn.Module):
    """Classifier of bags of window features, with the encoder that computes the features.

    Args:
        encoder: timm model without classifier, windows [B, C, H, W] -> features [B, D]; trained with
            `through_encoder` only.
        embed_dim: Dimension of the features, D.
        spec: Input and output of the network.
        config: Sizes of the other layers, and whether the encoder is trained.
        saved_backbone: Config of the converted model that the encoder was built from, None for a timm model.
    """

    task = "slide_classification"

    def __init__(
        self,
        encoder: nn.Module,
        embed_dim: int,
        spec: SlideClassificationSpec,
        config: SlideClassificationModelConfig,
        saved_backbone: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.through_encoder = config.through_encoder
        self.encoder = encoder if config.through_encoder else encoder.requires_grad_(False).eval()
        self.embed_dim = embed_dim
        self.spec = spec
        self.saved_backbone = saved_backbone
        self.project = nn.Sequential(
            nn.LayerNorm(embed_dim), nn.Linear(embed_dim, config.hidden_dim), nn.ReLU(), nn.Dropout(config.drop_rate)
        )
        self.pool = GatedAttentionPool(config.hidden_dim, config.attention_dim)
        self.classifier = nn.Linear(config.hidden_dim, len(spec.classes))

    def forward(self, bags: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Classify bags of features.

        Args:
            bags: Features from `embed`, [B, N, D].
            mask: bool [B, N], False for padding; at least one window in each bag.

        Returns:
            Logits, [B, K], and attention, [B, N].
        """
        pooled, attention = self.pool(self.project(bags), mask)
        return self.classifier(pooled), attention

    def classify_windows(self, read: ReadWindows, seed: int | None = None) -> Tensor:
        """Classify a slide, with gradients through the encoder, in the memory of a batch of windows.

        Args:
            read: Reader of all windows of the slide, standardised, as batches. It is called again for the gradients.
            seed: Seed of dropout, see `pool_in_batches`.

        Returns:
            Logits, [K].
        """

        def score(windows: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
            hidden = self.project(self.encode(windows, valid))
            return hidden, self.pool.scores(hidden)

        layers = self.encoder, self.project, self.pool
        trained = [each for layer in layers for each in layer.parameters() if each.requires_grad]
        logits: Tensor = self.classifier(pool_in_batches(score, trained, read, seed=seed).to(trained[0].dtype))
        return logits

    def encode(self, windows: Tensor, valid: Tensor | None = None) -> Tensor:
        """Compute features, [B, D], of standardised windows.

        Args:
            windows: Windows of a slide, [B, C, H, W].
            valid: Valid pixels, bool [B, H, W], None if all are; a ViT's patches without a valid pixel are excluded
                from attention and pooling.
        """
        mask = key_mask(self.encoder, valid)
        features: Tensor
        if mask is None:
            features = self.encoder(windows)
        else:
            features = forward_head(self.encoder, forward_tokens(self.encoder, windows, mask), mask)
        return features

    def embed(self, windows: Tensor, valid: Tensor | None = None) -> Tensor:
        """Compute features, [B, D], of standardised windows without gradient; see `encode`."""
        with torch.no_grad():
            return self.encode(windows, valid)

    def encoder_id(self) -> str:
        """Return a hash of 12 hex digits of the encoder and its standardisation."""
        return network_id(self.encoder, self.spec.normalizer.to_dict())

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen encoder stays in evaluation mode, and so do the batch norms of any encoder."""
        super().train(mode)
        # Statistics of a batch of windows would make the gradients those of another loss.
        for module in batch_norms(self.encoder) if self.through_encoder else [self.encoder]:
            module.eval()
        return self


def build_slide_classifier(
    config: SlideClassificationModelConfig,
    spec: SlideClassificationSpec,
    saved_backbone: Mapping[str, Any] | None = None,
) -> SlideClassifier:
    """Build a slide classifier; the encoder's weights are random unless `pretrained` is set or it is a folder.

    Args:
        config: Architecture.
        spec: Input and output of the network.
        saved_backbone: Config of the converted model that the encoder was built from, used instead of its folder.

    Raises:
        CheckpointError: The folder has no converted model.
        ConfigError: The backbone or pooling is unknown, doesn't accept its arguments, or the tile size is not a
            multiple of the patch size.
    """
    if config.pool == "map" and not config.through_encoder:
        raise ConfigError(
            "model.pool map has trainable weights, but the encoder is frozen; use token or avg, or "
            "model.through_encoder=true"
        )
    if config.hidden_dim < 1 or config.attention_dim < 1 or not 0 <= config.drop_rate < 1:
        raise ConfigError(
            "model.hidden_dim and model.attention_dim must be at least 1 and model.drop_rate in [0, 1), got "
            f"{config.hidden_dim}, {config.attention_dim} and {config.drop_rate:g}"
        )
    num_bands = len(spec.normalizer.mean)
    encoder, saved_backbone = build_pooled(
        config, num_bands, spec.tile_px, num_outputs=0, pool=config.pool, saved_backbone=saved_backbone
    )
    embed_dim = _features_of(encoder, num_bands, spec.tile_px)
    with constructor_errors("model.hidden_dim and model.attention_dim"):
        return SlideClassifier(encoder, embed_dim, spec, config, saved_backbone)


def _features_of(encoder: nn.Module, num_bands: int, tile_px: int) -> int:
    # timm's `num_features` ignores some poolings, so run the encoder on one window.
    weight = next(encoder.parameters())
    with torch.inference_mode():
        return int(encoder.eval()(weight.new_zeros(1, num_bands, tile_px, tile_px)).shape[1])
