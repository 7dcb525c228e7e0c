"""A network that says one thing of a whole image, with all that prediction needs to know about its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from perf_vit.models.finetune import BackboneTuning, evaluate_frozen, tune_backbone
from perf_vit.models.input_spec import TaskSpec
from perf_vit.models.pooled import build_pooled, pooled_parts, trunk_layers
from perf_vit.models.valid_tokens import forward_head, forward_tokens, key_mask

__all__ = ["ClassificationModelConfig", "ClassificationSpec", "Classifier", "ImageLabelKind", "build_classifier"]

ImageLabelKind = Literal["single_label", "multilabel", "regression"]
"""One class an image, any number of classes, or regression targets."""


@dataclass(kw_only=True)
class ClassificationModelConfig(BackboneTuning):
    """A backbone and what is put on it; `BackboneTuning` has further keys.

    Attributes:
        pool: token, avg, max, avgmax or map (attention with a learnt query); the backbone's own if left out.
        drop_rate: of the pooled features while training.
    """

    pool: str | None = None
    drop_rate: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationSpec(TaskSpec):
    """What a trained network expects and means; saved with its weights.

    Attributes:
        kind: what its outputs are.
        resize: whole images are resized to a tile; else a tile is the middle of the image, at full resolution.
        target_mean: of each target in the training data; empty for classes.
        target_std: standard deviation, likewise.

    The others are those of `InputSpec`; `classes` are names of targets in regression, and `label_options` the columns
    of the CSV files that it was trained with.
    """

    takes_grey: ClassVar[bool] = True

    kind: ImageLabelKind
    resize: bool = False
    target_mean: tuple[float, ...] = ()
    target_std: tuple[float, ...] = ()


class Classifier(nn.Module):
    """A network that classifies images, or predicts targets from them.

    Args:
        network: a timm model whose classifier has as many outputs as the spec names.
        spec: what the network expects and means.
        saved_backbone: config of the converted model that the backbone was made of, None for a timm model.
    """

    def __init__(
        self, network: nn.Module, spec: ClassificationSpec, saved_backbone: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.spec = spec
        self.saved_backbone = saved_backbone
        self._mean: Tensor
        self._std: Tensor
        self.register_buffer("_mean", torch.tensor(spec.target_mean or (0.0,)), persistent=False)
        self.register_buffer("_std", torch.tensor(spec.target_std or (1.0,)), persistent=False)

    @property
    def is_backbone_frozen(self) -> bool:
        """Whether nothing is trained but what comes after the backbone's features."""
        on_top = {id(parameter) for part in pooled_parts(self.network) for parameter in part.parameters()}
        return not any(each.requires_grad and id(each) not in on_top for each in self.network.parameters())

    @property
    def task(self) -> str:
        """The task that trains it."""
        return "regression" if self.spec.kind == "regression" else "classification"

    def forward(self, image: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits, or standardised targets, of standardised tiles.

        Args:
            image: [B, C, H, W].
            valid: valid pixels, bool [B, H, W], None where all are; a ViT's patches without one are left out of
                attention and pooling.

        Returns:
            [B, K].
        """
        mask = key_mask(self.network, valid)
        # Without gradients, converted models go through their MLPs in pieces.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_backbone_frozen):
            features = forward_tokens(self.network, image, mask)
        return forward_head(self.network, features, mask)

    def scores(self, logits: Tensor) -> Tensor:
        """Probabilities of the classes, or targets in the labels' units, [B, K]."""
        logits = logits.float()
        if self.spec.kind == "single_label":
            return logits.softmax(dim=1)
        if self.spec.kind == "multilabel":
            return logits.sigmoid()
        return logits * self._std + self._mean

    def standardised(self, values: Tensor) -> Tensor:
        """Targets in the labels' units as the network gives them, [B, K]."""
        return (values - self._mean) / self._std

    def train(self, mode: bool = True) -> Self:
        """Training mode, in which frozen parts of the backbone stay as they are evaluated."""
        super().train(mode)
        if mode and self.is_backbone_frozen:
            self.network.eval()
            for part in (*pooled_parts(self.network), getattr(self.network, "head_drop", nn.Identity())):
                part.train()
        elif mode:
            evaluate_frozen(self.network)
        return self


def build_classifier(
    config: ClassificationModelConfig, spec: ClassificationSpec, saved_backbone: Mapping[str, Any] | None = None
) -> Classifier:
    """Build a network; its weights are random unless `pretrained` is set or the backbone is a folder.

    Args:
        config: the network.
        spec: what it expects and means.
        saved_backbone: config of the converted model that the backbone was made of, to do without its folder.

    Raises:
        CheckpointError: a folder without a converted model.
        ConfigError: an unknown backbone or pooling, arguments they don't take, or a tile size that the patch size
            doesn't divide.
    """
    network, saved_backbone = build_pooled(
        config,
        len(spec.normalizer.mean),
        spec.tile_px,
        num_outputs=len(spec.classes),
        pool=config.pool,
        drop_rate=config.drop_rate,
        saved_backbone=saved_backbone,
    )
    tune_backbone(network, config, trunk_layers)
    return Classifier(network, spec, saved_backbone)
