"""Pretrained softmax ViTs made linear, weights and all."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from perf_vit.layers.chunked_block import chunk_blocks
from perf_vit.layers.chunked_mlp import chunk_mlps
from perf_vit.layers.converted_attention import CONVERTIBLE, ConvertedAttention, ScatterbrainOptions
from perf_vit.layers.performer_attention import RandomProjectionMixin, check_option_names
from perf_vit.layers.token_grid import TokenGrid, follow_tokens, watch_patch_embed
from perf_vit.models.conversion import ATTENTIONS, Conversion, default_attention

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
    attention: str | None = None,
    layers: Collection[int] | None = None,
    per_layer: Mapping[int, Mapping[str, Any]] | None = None,
    **options: Any,
) -> nn.Module:
    """A copy of a timm ViT whose attention costs O(N), with the same weights under the same names.

    timm's `Attention` (ViT, DeiT, MAE, DINOv2, CLIP, SigLIP), `AttentionRope` and `EvaAttention` (EVA02, DINOv3) are
    taken over, also in a ViT that something wraps; the model is still what it was for timm's utilities.
    "clustered" keeps most of what a pretrained model knows, untrained, and is the fastest; "scatterbrain" has random
    features in the place of clusters; "performer" is plain FAVOR+ (Choromanski et al. 2020), after which a model must
    be trained.

    Args:
        model: a ViT with such layers, or a model that holds one; it is not changed.
        attention: "clustered", "scatterbrain", "performer", or "softmax" to leave layers as they are. None for
            "clustered", or for "scatterbrain" where options of random features are given (num_features, kernel, norms,
            orthogonal, center, balance).
        layers: places, from 0, of the attention layers to convert; None for all.
        per_layer: options for single layers, by place, over those for all: {11: {"window_size": 8}}. Among them may
            be another "attention", for which of `options` only num_features, orthogonal and seed count.
        **options: fields of `ScatterbrainOptions`, among them window_size, num_sinks, num_clusters, num_features and
            seed.

    Returns:
        The converted copy, in the mode (training or evaluation) of the model. It keeps what was asked for as
        `conversion`.

    Raises:
        ValueError: an unknown attention or option, a model without such layers, or with windows one without a patch
            embedding that tells the grid, or a layer that has no linear form.
    """
    if attention is None:
        own = (name for each in (per_layer or {}).values() if "attention" not in each for name in each)
        attention = default_attention((*options, *own))
    _check_arguments(model, attention, layers, options)
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
    """Replace the attention layers of a model itself, and let its blocks and MLPs go in chunks.

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
        chosen_options = ScatterbrainOptions(**options)
        setattr(model.get_submodule(parent), child, ConvertedAttention(module, chosen_options, grid))
        needs_grid = needs_grid or chosen_options.needs_grid
    chunk_blocks(model)
    if needs_grid:
        watch_patch_embed(model, grid)
        follow_tokens(model, grid)


def body_of(model: nn.Module) -> nn.Module:
    """The model, or the one ViT within it: `features_only=True`, decoders and trainers wrap one up.

    Raises:
        ValueError: several of them.
    """
    vits = [module for module in model.modules() if _has_patch_embed(module) and _has_attention(module)]
    if not vits or vits[0] is model:
        return model
    if len(vits) > 1:
        raise ValueError(
            f"expected one ViT in {type(model).__name__}, got {len(vits)}: convert each of them and put it in its place"
        )
    return vits[0]


def convertible_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, layer) of all attention layers that have a linear form, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, CONVERTIBLE)]


def converted_layers(model: nn.Module) -> dict[int, ConvertedAttention]:
    """Place -> layer of those that are linear."""
    layers = [module for module in model.modules() if isinstance(module, ConvertedAttention)]
    return {layer.options.layer_index: layer for layer in layers}


def _check_arguments(model: nn.Module, attention: str, layers: object, options: Mapping[str, Any]) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a model, got {model!r}; timm.create_model makes one")
    if attention not in ATTENTIONS:
        near = difflib.get_close_matches(str(attention), ATTENTIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}{hint}")
    if layers is not None and not (isinstance(layers, Collection) and all(isinstance(x, int) for x in layers)):
        raise ValueError(f"layers must be places of attention layers, got {layers!r}; pass a list of whole numbers")
    if "layer_index" in options:
        raise ValueError("options must not hold layer_index, which each layer gets by its place; use seed")


def _has_patch_embed(module: nn.Module) -> bool:
    return isinstance(getattr(module, "patch_embed", None), nn.Module)


def _has_attention(module: nn.Module) -> bool:
    return any(isinstance(layer, (*CONVERTIBLE, ConvertedAttention)) for layer in module.modules())


def _choose(model: nn.Module, found: list[tuple[str, nn.Module]], conversion: Conversion) -> list[int]:
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
    chosen = range(len(found)) if conversion.layers is None else conversion.layers
    outside = [index for index in chosen if not 0 <= index < len(found)]
    if outside:
        raise ValueError(
            f"layers must be places from 0 to {len(found) - 1}, got {outside[0]}; leave layers out to convert all"
        )
    check_option_names(conversion.options, ScatterbrainOptions)
    for index, options in conversion.per_layer.items():
        if index not in chosen:
            among = f"0 to {len(found) - 1}" if conversion.layers is None else ", ".join(map(str, chosen))
            raise ValueError(f"per_layer must name layers that are converted, {among}; got {index!r}")
        check_option_names((name for name in options if name != "attention"), ScatterbrainOptions)
    return list(chosen)
