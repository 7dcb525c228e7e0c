"""Pretrained softmax ViTs made linear, weights and all."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from perf_vit.layers.chunked_mlp import chunk_mlps
from perf_vit.layers.converted_attention import CONVERTIBLE, ConvertedAttention, ScatterbrainOptions
from perf_vit.layers.performer_attention import RandomProjectionMixin, check_option_names
from perf_vit.layers.token_grid import TokenGrid, watch_patch_embed
from perf_vit.models.conversion import Conversion

__all__ = [
    "body_of",
    "convert_attention",
    "convert_in_place",
    "converted_layers",
    "convertible_layers",
    "performerize",
]


def performerize(
    model: nn.Module,
    attention: str = "scatterbrain",
    layers: Collection[int] | None = None,
    per_layer: Mapping[int, Mapping[str, Any]] | None = None,
    **options: Any,
) -> nn.Module:
    """A copy of a timm ViT whose attention costs O(N), with the same weights under the same names.

    timm's `Attention` (ViT, DeiT, MAE, DINOv2, CLIP, SigLIP), `AttentionRope` and `EvaAttention` (EVA02, DINOv3) are
    taken over; the model is still what it was for timm's utilities. "scatterbrain" keeps what a pretrained model
    knows, untrained; "performer" is plain FAVOR+ (Choromanski et al. 2020), after which a model must be trained.

    Args:
        model: a model that holds such layers; it is not changed.
        attention: "scatterbrain", "performer", or "softmax" to leave layers as they are.
        layers: places, from 0, of the attention layers to convert; None for all.
        per_layer: options for single layers, by place, over those for all: {11: {"window_size": 8}}. Among them may
            be another "attention", for which of `options` only num_features, orthogonal and seed count.
        **options: fields of `ScatterbrainOptions`, among them num_features, window_size, num_sinks, kernel and seed.

    Returns:
        The converted copy, in the mode (training or evaluation) of the model. It keeps what was asked for as
        `conversion`.

    Raises:
        ValueError: an unknown attention or option, a model without such layers, or with windows one without a patch
            embedding that tells the grid, or a layer that has no linear form.
    """
    conversion = Conversion(
        attention=attention,
        layers=None if layers is None else tuple(sorted(set(layers))),
        options=options,
        per_layer=per_layer or {},
    )
    return convert_in_place(copy.deepcopy(model), conversion)


def convert_in_place(model: nn.Module, conversion: Conversion) -> nn.Module:
    """What `performerize` does to its copy.

    Raises:
        ValueError: as `performerize`.
    """
    body = body_of(model)
    convert_attention(body, conversion)
    # timm's models are open to attributes of any kind.
    body.conversion = conversion  # type: ignore[assignment]
    return model


def convert_attention(model: nn.Module, conversion: Conversion) -> None:
    """Replace the attention layers of a model itself, and let its MLPs go in chunks.

    Raises:
        ValueError: as `performerize`.
    """
    found = convertible_layers(model)
    chosen = _choose(model, found, conversion)
    grid, needs_grid = TokenGrid(), False
    for index in chosen:
        attention, options = conversion.of_layer(index)
        if attention == "softmax":
            continue
        chunk_mlps(model)
        options = {"num_prefix_tokens": getattr(model, "num_prefix_tokens", 0), **options, "layer_index": index}
        name, module = found[index]
        parent, _, child = name.rpartition(".")
        converted = ConvertedAttention(module, ScatterbrainOptions(**options), grid)
        setattr(model.get_submodule(parent), child, converted)
        needs_grid = needs_grid or converted.options.needs_grid
    if needs_grid:
        watch_patch_embed(model, grid)


def body_of(model: nn.Module) -> nn.Module:
    """The transformer itself, where timm's `features_only` has wrapped it."""
    inner = getattr(model, "model", None)
    return inner if hasattr(model, "feature_info") and isinstance(inner, nn.Module) else model


def convertible_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, layer) of all attention layers that have a linear form, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, CONVERTIBLE)]


def converted_layers(model: nn.Module) -> dict[int, ConvertedAttention]:
    """Place -> layer of those that are linear."""
    layers = [module for module in model.modules() if isinstance(module, ConvertedAttention)]
    return {layer.options.layer_index: layer for layer in layers}


def _choose(model: nn.Module, found: list[tuple[str, nn.Module]], conversion: Conversion) -> list[int]:
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
    chosen = range(len(found)) if conversion.layers is None else conversion.layers
    outside = [index for index in chosen if not 0 <= index < len(found)]
    if outside:
        raise ValueError(f"layers must be places from 0 to {len(found) - 1}, got {outside[0]}")
    check_option_names(conversion.options, ScatterbrainOptions)
    for index, options in conversion.per_layer.items():
        if index not in chosen:
            among = f"0 to {len(found) - 1}" if conversion.layers is None else ", ".join(map(str, chosen))
            raise ValueError(f"per_layer must name layers that are converted, {among}; got {index!r}")
        check_option_names((name for name in options if name != "attention"), ScatterbrainOptions)
    return list(chosen)
