"""Whole images to one vector: timm models with the pooling and classifier that a config asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import AttentionPoolLatent
from torch import nn

from perf_vit.errors import ConfigError
from perf_vit.models.backbone_config import BackboneConfig
from perf_vit.models.build import create_backbone
from perf_vit.models.finetune import backbone_layers
from perf_vit.models.known_arguments import built_from
from perf_vit.models.saved_model import read_saved_config
from perf_vit.transforms import Normalizer

__all__ = ["POOLS", "build_pooled", "pooled_parts", "pretrained_statistics", "trunk_layers"]

POOLS = ("token", "avg", "max", "avgmax", "map")
"""Of patches: the class token, their mean, maximum or both, or attention with a learnt query (timm's map pooling)."""


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
    """A timm model that gives one vector an image, [B, num_outputs].

    Pooling and classifier are put on a model that is built, and loaded, as it was pretrained, so both may be others.

    Args:
        config: which model.
        in_chans: bands of the images.
        tile_px: side of the square images.
        num_outputs: length of the vector; 0 for the pooled features themselves.
        pool: one of `POOLS`, None for the model's own.
        drop_rate: of the pooled features, before the classifier.
        saved_backbone: config of the converted model that the backbone was made of, to do without its folder.

    Returns:
        The model, and the config of the converted model that it was made of, None for a timm model.

    Raises:
        CheckpointError: a folder without a converted model.
        ConfigError: an unknown model, arguments it doesn't take, a pooling it doesn't have, or a tile size that its
            patch size doesn't divide.
    """
    if pool is not None and pool not in POOLS:
        raise ConfigError(f"model.pool must be one of {', '.join(POOLS)}, or left out, got {pool}")
    options = {"num_classes": 0, "drop_rate": drop_rate}
    model, saved_backbone = create_backbone(config, in_chans, tile_px, saved_backbone, options)
    _check_tile(model, tile_px)
    with built_from(f"model.pool {pool} doesn't go with {config.backbone}"):
        _set_pooling(model, num_outputs, pool)
    return model, saved_backbone


def pretrained_statistics(backbone: str) -> Normalizer:
    """Mean and standard deviation of red, green and blue that a backbone was pretrained with, for pixels of 8 bits.

    Args:
        backbone: a timm model name, or a folder with a converted model.

    Raises:
        CheckpointError: a folder without a converted model.
    """
    if timm.is_model(backbone):
        config = timm.get_pretrained_cfg(backbone)
        found = {} if config is None else {"mean": config.mean, "std": config.std}
    else:
        found = read_saved_config(backbone).get("pretrained_cfg") or {}
    mean, std = found.get("mean", IMAGENET_DEFAULT_MEAN), found.get("std", IMAGENET_DEFAULT_STD)
    return Normalizer(tuple(255.0 * value for value in mean), tuple(255.0 * value for value in std))


def pooled_parts(model: Any) -> list[nn.Module]:
    """What comes after the backbone's features: classifier and learnt pooling, those of them that there are."""
    # The norm after pooling belongs to the classifier, as timm has it.
    parts = [model.get_classifier(), getattr(model, "attn_pool", None), getattr(model, "fc_norm", None)]
    return [part for part in parts if isinstance(part, nn.Module) and any(True for _ in part.parameters())]


def trunk_layers(model: nn.Module) -> dict[str, int]:
    """The layer of each parameter that is part of neither pooling nor classifier, counted from the input."""
    on_top = {id(parameter) for part in pooled_parts(model) for parameter in part.parameters()}
    below = {name for name, parameter in model.named_parameters() if id(parameter) not in on_top}
    return {name: layer for name, layer in backbone_layers(model).items() if name in below}


def _set_pooling(model: Any, num_outputs: int, pool: str | None) -> None:
    if pool != "map":
        model.reset_classifier(num_outputs, *(() if pool is None else (pool,)))
        return
    if not hasattr(model, "attn_pool"):
        raise ValueError("it has no tokens to attend to")
    if model.attn_pool is None:
        width = model.embed_dim
        model.attn_pool = AttentionPoolLatent(width, num_heads=width // 64 or 1)
        model.global_pool = "map"
    # timm refuses to name the pooling here, and drops it where another one is named.
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
