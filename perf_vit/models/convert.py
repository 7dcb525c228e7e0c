"""Pretrained softmax ViTs made linear, weights and all."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from perf_vit.layers.converted_attention import CONVERTIBLE, ConvertedAttention, ScatterbrainOptions
from perf_vit.layers.performer_attention import RandomProjectionMixin, check_option_names
from perf_vit.layers.token_grid import TokenGrid, watch_patch_embed

__all__ = ["ATTENTIONS", "convert_attention", "performerize"]

# What each kind of attention changes of `ScatterbrainOptions`; further mixers go here.
ATTENTIONS: dict[str, dict[str, Any] | None] = {
    "softmax": None,
    "performer": {},
    "scatterbrain": {
        "kernel": "softmax-hyp+",
        "norms": "sqrt",
        "center": True,
        "balance": True,
        "window_size": 16,
        "num_sinks": 256,
    },
}


def performerize(
    model: nn.Module, attention: str = "scatterbrain", layers: Collection[int] | None = None, **options: Any
) -> nn.Module:
    """A copy of a timm ViT whose attention costs O(N), with the same weights under the same names.

    timm's `Attention` (ViT, DeiT, MAE, DINOv2, CLIP, SigLIP), `AttentionRope` and `EvaAttention` (EVA02, DINOv3) are
    taken over; the model is still what it was for timm's utilities. "scatterbrain" keeps what a pretrained model
    knows, untrained; "performer" is plain FAVOR+ (Choromanski et al. 2020), after which a model must be trained.

    Args:
        model: a model that holds such layers; it is not changed.
        attention: "scatterbrain", "performer", or "softmax" to leave layers as they are.
        layers: places, from 0, of the attention layers to convert; None for all.
        **options: fields of `ScatterbrainOptions`, among them num_features, window_size, num_sinks, kernel and seed.

    Returns:
        The converted copy, in the mode (training or evaluation) of the model.

    Raises:
        ValueError: an unknown attention or option, a model without such layers, or with windows one without a patch
            embedding that tells the grid, or a layer that has no linear form.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
    model = copy.deepcopy(model)
    convert_attention(model, attention, layers, options)
    return model


def convert_attention(
    model: nn.Module, attention: str, layers: Collection[int] | None, options: Mapping[str, Any]
) -> None:
    """What `performerize` does to its copy: replace attention layers in place.

    Args:
        model: a model that holds such layers.
        attention: a key of `ATTENTIONS`.
        layers: places, from 0, of the attention layers to convert; None for all.
        options: fields of `ScatterbrainOptions`.

    Raises:
        ValueError: as `performerize`.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, CONVERTIBLE)]
    chosen = _choose(model, found, layers)
    defaults = ATTENTIONS[attention]
    if defaults is None:
        return
    merged = {"num_prefix_tokens": getattr(model, "num_prefix_tokens", 0), **defaults, **options}
    check_option_names(merged, ScatterbrainOptions)
    grid = TokenGrid()
    if ScatterbrainOptions(**merged).needs_grid:
        watch_patch_embed(model, grid)
    for index in chosen:
        name, module = found[index]
        parent, _, child = name.rpartition(".")
        converted = ConvertedAttention(module, ScatterbrainOptions(**{**merged, "layer_index": index}), grid)
        setattr(model.get_submodule(parent), child, converted)


def _choose(model: nn.Module, found: list[tuple[str, nn.Module]], layers: Collection[int] | None) -> list[int]:
    linear = [name for name, module in model.named_modules() if isinstance(module, RandomProjectionMixin)]
    if linear:
        raise ValueError(
            f"{type(model).__name__} is linear already ({linear[0]}); convert the softmax model it came from"
        )
    if not found:
        raise ValueError(
            f"expected a model with timm's {', '.join(kind.__name__ for kind in CONVERTIBLE)}, got "
            f"{type(model).__name__} with none of them; windowed and pooled attention (Swin, MViT) is not converted"
        )
    chosen = range(len(found)) if layers is None else sorted(set(layers))
    outside = [index for index in chosen if not 0 <= index < len(found)]
    if outside:
        raise ValueError(f"layers must be places from 0 to {len(found) - 1}, got {outside[0]}")
    return list(chosen)
