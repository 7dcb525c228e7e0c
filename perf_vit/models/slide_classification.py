"""A whole slide as a bag of windows: a frozen encoder, gated attention over its features, a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from perf_vit.errors import ConfigError
from perf_vit.models.backbone import BackboneConfig, built_from
from perf_vit.models.classification import build_pooled
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
    """An encoder of windows, which is not trained, and what pools its features; `BackboneConfig` has further keys.

    Attributes:
        pool: token, avg, max or avgmax; the backbone's own if left out.
        hidden_dim: of the features that attention sees.
        attention_dim: of the attention's hidden layer.
        drop_rate: of features while training.
    """

    backbone: str = "vit_small_patch14_dinov2"
    pool: str | None = None
    hidden_dim: int = 256
    attention_dim: int = 128
    drop_rate: float = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class SlideClassificationSpec(TaskSpec):
    """What a trained slide classifier expects and means; saved with its weights.

    Attributes:
        min_tissue: least share of tissue in a window.

    The others are those of `InputSpec`; without `tissue`, windows of glass are taken, too, and `label_options` are the
    columns of the CSV files that it was trained with.
    """

    min_tissue: float = 0.25


class GatedAttentionPool(nn.Module):
    """The weighted mean of a bag of any size (Ilse, Tomczak and Welling 2018, "Attention-based deep multiple instance
    learning", eqs. 7 and 9): a_k = softmax_k(w^T (tanh(V h_k) * sigmoid(U h_k))), z = sum_k a_k h_k.

    Args:
        dim: of the features h.
        hidden_dim: rows of V and U.
    """  # noqa: D205

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.value = nn.Linear(dim, hidden_dim)
        self.gate = nn.Linear(dim, hidden_dim)
        self.weight = nn.Linear(hidden_dim, 1)

    def forward(self, bags: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pool bags.

        Args:
            bags: [B, N, D].
            mask: which instances are there, bool [B, N]; at least one in each bag.

        Returns:
            Pooled features [B, D] and attention [B, N], which sums to 1 and is 0 where nothing is.
        """
        logits = self.weight(self.value(bags).tanh() * self.gate(bags).sigmoid()).squeeze(-1)
        attention = logits.float().masked_fill(~mask, -torch.inf).softmax(dim=1)
        pooled = torch.einsum("bn,bnd->bd", attention.to(bags.dtype), bags)
        return pooled, attention


class SlideClassifier(nn.Module):
    """Classifies bags of windows' features, and makes such features of windows.

    Args:
        encoder: a timm model without classifier: windows [B, C, H, W] to features [B, D]. It is never trained.
        embed_dim: D.
        spec: what the network expects and means.
        config: sizes of what is trained.
        saved_backbone: config of the converted model that the encoder was made of, None for a timm model.
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
        self.encoder = encoder.requires_grad_(False).eval()
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
            bags: of `embed`, [B, N, D].
            mask: which windows are there, bool [B, N]; at least one in each bag.

        Returns:
            Logits [B, K] and attention [B, N].
        """
        pooled, attention = self.pool(self.project(bags), mask)
        return self.classifier(pooled), attention

    def embed(self, windows: Tensor, valid: Tensor | None = None) -> Tensor:
        """Features [B, D] of standardised windows [B, C, H, W], without gradient.

        Args:
            windows: tiles of a slide.
            valid: valid pixels, bool [B, H, W], None where all are; a ViT's patches without one are left out of
                attention and pooling.
        """
        mask = key_mask(self.encoder, valid)
        features: Tensor
        with torch.no_grad():
            if mask is None:
                features = self.encoder(windows)
            else:
                features = forward_head(self.encoder, forward_tokens(self.encoder, windows, mask), mask)
        return features

    def encoder_id(self) -> str:
        """Twelve hex digits that another encoder, or another standardisation, would not have."""
        return network_id(self.encoder, self.spec.normalizer.to_dict())

    def train(self, mode: bool = True) -> Self:
        """Training mode, in which the encoder stays as it is evaluated."""
        super().train(mode)
        self.encoder.eval()
        return self


def build_slide_classifier(
    config: SlideClassificationModelConfig,
    spec: SlideClassificationSpec,
    saved_backbone: Mapping[str, Any] | None = None,
) -> SlideClassifier:
    """Build a slide classifier; the encoder's weights are random unless `pretrained` is set or it is a folder.

    Args:
        config: the network.
        spec: what it expects and means.
        saved_backbone: config of the converted model that the encoder was made of, to do without its folder.

    Raises:
        CheckpointError: a folder without a converted model.
        ConfigError: an unknown backbone or pooling, arguments they don't take, or a tile size that the patch size
            doesn't divide.
    """
    if config.pool == "map":
        raise ConfigError("model.pool map has weights to train, and the encoder isn't trained; use token or avg")
    if config.hidden_dim < 1 or config.attention_dim < 1 or not 0 <= config.drop_rate < 1:
        raise ConfigError(
            "expected model.hidden_dim and model.attention_dim from 1 on and model.drop_rate from 0 to below 1, got "
            f"{config.hidden_dim}, {config.attention_dim} and {config.drop_rate:g}"
        )
    num_bands = len(spec.normalizer.mean)
    encoder, saved_backbone = build_pooled(
        config, num_bands, spec.tile_px, num_outputs=0, pool=config.pool, saved_backbone=saved_backbone
    )
    embed_dim = _features_of(encoder, num_bands, spec.tile_px)
    with built_from("model.hidden_dim and model.attention_dim"):
        return SlideClassifier(encoder, embed_dim, spec, config, saved_backbone)


def _features_of(encoder: nn.Module, num_bands: int, tile_px: int) -> int:
    # timm's own number is that of the map for some pools, so one window tells.
    weight = next(encoder.parameters())
    with torch.inference_mode():
        return int(encoder.eval()(weight.new_zeros(1, num_bands, tile_px, tile_px)).shape[1])
