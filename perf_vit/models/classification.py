"""Image classification and regression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from perf_vit.conversion.save import read_model_config
from perf_vit.conversion.weights import stored_folder
from perf_vit.errors import ConfigError
from perf_vit.models.backbone import BackboneConfig, constructor_errors, create_backbone
from perf_vit.models.finetune import BackboneTuning, backbone_layers, evaluate_frozen, tune_backbone
from perf_vit.models.input_spec import TaskSpec
from perf_vit.models.valid_tokens import forward_head, forward_tokens, key_mask
from perf_vit.transforms import Normalizer

__all__ = [
    "POOLS",
    "ClassificationModelConfig",
    "ClassificationSpec",
    "Classifier",
    "ImageLabelKind",
    "build_classifier",
    "build_pooled",
    "pooled_parts",
    "pretrained_statistics",
    "trunk_layers",
]

POOLS = ("token", "avg", "max", "avgmax", "map")
"""Poolings: class token, mean, maximum or both of patches, or attention with a learnt query (timm's map pooling)."""


def build_pooled(
    config: BackboneConfig,
    in_chans: int,
    tile_px: int,
    *,
    num_outputs: int,
    pool: str | None = None,
    drop_rate: float = 0.0,
    saved_backbone: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Mapping[str, Any] | None]:
    """Build a timm model that returns one vector per image, [B, num_outputs].

    The model is built and loaded in its pretrained form before pooling and classifier are replaced, so both may differ.

    Args:
        config: Backbone.
        in_chans: Number of bands of the images.
        tile_px: Size of the square images in pixels.
        num_outputs: Length of the vector; 0 for the pooled features.
        pool: One of `POOLS`, None for the model's own.
        drop_rate: Dropout of the pooled features.
        saved_backbone: Config of the converted model that the backbone was built from, used instead of its folder.

    Returns:
        The model, and the config of the converted model that it was built from, None for a timm model.

    Raises:
        CheckpointError: The folder has no converted model.
        ConfigError: The model is unknown or doesn't accept its arguments or pooling, or the tile size is not a
            multiple of the patch size.
    """
    if pool is not None and pool not in POOLS:
        raise ConfigError(f"model.pool must be one of {', '.join(POOLS)}, or left out, got {pool}")
    options = {"num_classes": 0, "drop_rate": drop_rate}
    model, saved_backbone = create_backbone(config, in_chans, tile_px, saved_backbone, options)
    _check_tile(model, tile_px)
    with constructor_errors(f"model.pool {pool} doesn't go with {config.backbone}"):
        _set_pooling(model, num_outputs, pool)
    return model, saved_backbone


def pretrained_statistics(backbone: str) -> Normalizer:
    """Return the mean and standard deviation of RGB that a backbone was pretrained with, for 8-bit pixels.

    Args:
        backbone: Name of a timm model, or what else `model.backbone` takes.

    Raises:
        CheckpointError: The folder has no model.
    """
    folder = stored_folder(backbone)
    if folder is None:
        config = timm.get_pretrained_cfg(backbone)
        found = {} if config is None else {"mean": config.mean, "std": config.std}
    else:
        found = read_model_config(folder).get("pretrained_cfg") or {}
    mean, std = found.get("mean", IMAGENET_DEFAULT_MEAN), found.get("std", IMAGENET_DEFAULT_STD)
    return Normalizer(tuple(255.0 * value for value in mean), tuple(255.0 * value for value in std))


def pooled_parts(model: Any) -> list[nn.Module]:
    """Return the modules after the backbone's features that have parameters: classifier, learnt pooling, norm."""
    # timm treats the norm after pooling as part of the classifier.
    parts = [model.get_classifier(), getattr(model, "attn_pool", None), getattr(model, "fc_norm", None)]
    return [part for part in parts if isinstance(part, nn.Module) and any(True for _ in part.parameters())]


def trunk_layers(model: nn.Module) -> dict[str, int]:
    """Return the layer index, from the input, of each parameter outside pooling and classifier, by name."""
    on_top = {id(parameter) for part in pooled_parts(model) for parameter in part.parameters()}
    below = {name for name, parameter in model.named_parameters() if id(parameter) not in on_top}
    return {name: layer for name, layer in backbone_layers(model).items() if name in below}


def _set_pooling(model: Any, num_outputs: int, pool: str | None) -> None:
    if pool != "map":
        model.reset_classifier(num_outputs, *(() if pool is None else (pool,)))
        return
    if not hasattr(model, "attn_pool"):
        raise ValueError("map pooling needs a model with tokens")
    if model.attn_pool is None:
        width = model.embed_dim
        model.attn_pool = AttentionPoolLatent(width, num_heads=width // 64 or 1)
        model.global_pool = "map"
    # timm's `reset_classifier` refuses "map", and removes the pooling if another one is given.
    model.head = nn.Linear(model.embed_dim, num_outputs) if num_outputs else nn.Identity()
    model.num_classes = num_outputs


def _check_tile(model: Any, tile_px: int) -> None:
    embed = getattr(model, "patch_embed", None)
    patch = getattr(embed, "patch_size", None)
    size_multiple = max(patch) if isinstance(patch, tuple) else int(patch or 1)
    if tile_px % size_multiple:
        nearest = max(1, round(tile_px / size_multiple)) * size_multiple
        raise ConfigError(
            f"data.tile_px must be a multiple of the patch size {size_multiple}, got {tile_px}; try {nearest}"
        )


ImageLabelKind = Literal["single_label", "multilabel", "regression"]
"""Kind of labels: one class per image, any number of classes, or regression targets."""


@dataclass(kw_only=True)
class ClassificationModelConfig(BackboneTuning):
    """Backbone, pooling and classifier; `BackboneTuning` has further keys.

    Attributes:
        pool: token, avg, max, avgmax or map (attention with a learnt query); None for the backbone's own.
        drop_rate: Dropout of the pooled features during training.
    """

    pool: str | None = None
    drop_rate: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationSpec(TaskSpec):
    """Input and output of an image classifier or regression network, saved with its weights.

    Attributes:
        kind: Kind of the outputs.
        resize: Whether images are resized to a tile; False for a centre crop at full resolution.
        whole: Whether a tile must hold the whole image, as a count needs; only without `resize`.
        target_mean: Mean of each target in the training data; empty for classes.
        target_std: Standard deviation of each target in the training data; empty for classes.

    The other attributes are those of `InputSpec`. In regression `classes` are the names of the targets. `label_options`
    are the columns of the CSV files of its training.
    """

    takes_grey: ClassVar[bool] = True

    kind: ImageLabelKind
    resize: bool = False
    whole: bool = False
    target_mean: tuple[float, ...] = ()
    target_std: tuple[float, ...] = ()


class Classifier(nn.Module):
    """Image classifier or regression network.

    Args:
        network: timm model with as many outputs as the spec has classes.
        spec: Input and output of the network.
        saved_backbone: Config of the converted model that the backbone was built from, None for a timm model.
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
        """Whether only the modules after the backbone's features are trained."""
        on_top = {id(parameter) for part in pooled_parts(self.network) for parameter in part.parameters()}
        return not any(each.requires_grad and id(each) not in on_top for each in self.network.parameters())

    @property
    def task(self) -> str:
        """Name of the task that trains it."""
        return "regression" if self.spec.kind == "regression" else "classification"

    def forward(self, image: Tensor, valid: Tensor | None = None) -> Tensor:
        """Compute logits, or standardised targets, of standardised tiles.

        Args:
            image: Tiles, [B, C, H, W].
            valid: Valid pixels, bool [B, H, W], None if all are; a ViT's patches without a valid pixel are excluded
                from attention and pooling.

        Returns:
            Logits or standardised targets, [B, K].
        """
        mask = key_mask(self.network, valid)
        # Without gradients, converted models process tokens in chunks.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_backbone_frozen):
            features = forward_tokens(self.network, image, mask)
        return forward_head(self.network, features, mask)

    def scores(self, logits: Tensor) -> Tensor:
        """Convert outputs to probabilities of the classes, or to targets in the units of the labels, [B, K]."""
        logits = logits.float()
        if self.spec.kind == "single_label":
            return logits.softmax(dim=1)
        if self.spec.kind == "multilabel":
            return logits.sigmoid()
        return logits * self._std + self._mean

    def standardised(self, values: Tensor) -> Tensor:
        """Standardise targets in the units of the labels, [B, K]."""
        return (values - self._mean) / self._std

    def train(self, mode: bool = True) -> Self:
        """Set the mode; frozen parts of the backbone stay in evaluation mode."""
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
    """Build a classifier; its weights are random unless `pretrained` is set or the backbone is a folder.

    Args:
        config: Architecture.
        spec: Input and output of the network.
        saved_backbone: Config of the converted model that the backbone was built from, used instead of its folder.

    Raises:
        CheckpointError: The folder has no converted model.
        ConfigError: The backbone or pooling is unknown, doesn't accept its arguments, or the tile size is not a
            multiple of the patch size.
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
