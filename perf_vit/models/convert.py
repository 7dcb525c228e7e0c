"""Pretrained softmax ViTs made linear, weights and all."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection
from typing import Any

from torch import nn

from perf_vit.layers.converted_attention import CONVERTIBLE, ConvertedAttention, ScatterbrainOptions
from perf_vit.layers.performer_attention import RandomProjectionMixin, check_option_names
from perf_vit.layers.token_grid import TokenGrid, watch_patch_embed

__all__ = ["ATTENTIONS", "performerize"]

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
    taken over, also in a ViT that something wraps; the model is still what it was for timm's utilities.
    "scatterbrain" keeps what a pretrained model knows, untrained; "performer" is plain FAVOR+ (Choromanski et al.
    2020), after which a model must be trained.

    Args:
        model: a ViT with such layers, or a model that holds one; it is not changed.
        attention: "scatterbrain", "performer", or "softmax" to leave layers as they are.
        layers: places, from 0, of the attention layers to convert; None for all.
        **options: fields of `ScatterbrainOptions`, among them num_features, window_size, num_sinks, kernel and seed.

    Returns:
        The converted copy, in the mode (training or evaluation) of the model.

    Raises:
        ValueError: an unknown attention or option, a model without such layers, or with windows one without a patch
            embedding that tells the grid, or a layer that has no linear form.
    """
    _check_arguments(model, attention, options)
    model = copy.deepcopy(model)
    vit = _find_vit(model)
    found = _attentions(vit)
    chosen = _choose(vit, found, layers)
    defaults = ATTENTIONS[attention]
    if defaults is None:
        return model
    merged = {"num_prefix_tokens": getattr(vit, "num_prefix_tokens", 0), **defaults, **options}
    grid = TokenGrid()
    for index in chosen:
        name, module = found[index]
        parent, _, child = name.rpartition(".")
        converted = ConvertedAttention(module, ScatterbrainOptions(**{**merged, "layer_index": index}), grid)
        setattr(vit.get_submodule(parent), child, converted)
    if merged.get("window_size") or merged.get("num_sinks"):
        watch_patch_embed(_patch_embed(vit), grid)
    return model


def _check_arguments(model: nn.Module, attention: str, options: dict[str, Any]) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a model, got {model!r}; timm.create_model makes one")
    if attention not in ATTENTIONS:
        near = difflib.get_close_matches(str(attention), ATTENTIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}{hint}")
    check_option_names(options, ScatterbrainOptions)
    if "layer_index" in options:
        raise ValueError("options must not hold layer_index, which each layer gets by its place; use seed")


def _find_vit(model: nn.Module) -> nn.Module:
    """The model, or the one ViT within it: `features_only=True`, decoders and trainers wrap one up."""
    vits = [module for module in model.modules() if _has_patch_embed(module) and _attentions(module)]
    if not vits or vits[0] is model:
        return model
    if len(vits) > 1:
        raise ValueError(
            f"expected one ViT in {type(model).__name__}, got {len(vits)}: convert each of them and put it in its place"
        )
    return vits[0]


def _has_patch_embed(module: nn.Module) -> bool:
    return isinstance(getattr(module, "patch_embed", None), nn.Module)


def _attentions(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, CONVERTIBLE)]


def _choose(model: nn.Module, found: list[tuple[str, nn.Module]], layers: Collection[int] | None) -> list[int]:
    linear = [name for name, module in model.named_modules() if isinstance(module, RandomProjectionMixin)]
    if linear:
        raise ValueError(
            f"{type(model).__name__} is linear already ({linear[0]}); convert the softmax model it came from"
        )
    if not found:
        raise ValueError(
            f"expected a model with timm's {', '.join(kind.__name__ for kind in CONVERTIBLE)}, got "
            f"{type(model).__name__} with none of them; windows, pooling and relative position "
            "biases (Swin, MViT, BEiT) have no linear form"
        )
    if layers is not None and not (isinstance(layers, Collection) and all(isinstance(x, int) for x in layers)):
        raise ValueError(
            f"layers must be places from 0 to {len(found) - 1}, got {layers!r}; pass a list of whole numbers"
        )
    chosen = range(len(found)) if layers is None else sorted(set(layers))
    outside = [index for index in chosen if not 0 <= index < len(found)]
    if outside:
        raise ValueError(
            f"layers must be places from 0 to {len(found) - 1}, got {outside[0]}; leave layers out to convert all"
        )
    return list(chosen)


def _patch_embed(model: nn.Module) -> nn.Module:
    patch_embed = getattr(model, "patch_embed", None)
    if not isinstance(patch_embed, nn.Module):
        raise ValueError(
            f"windows and sinks need the grid: expected a model with a patch_embed, got {type(model).__name__} without "
            "one; use attention='performer'"
        )
    return patch_embed
