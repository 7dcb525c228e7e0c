"""What a conversion was asked for, as plain values that can be saved."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import nn

from perf_vit.layers import LinearizedAttention, MixerOptions
from perf_vit.layers.chunked import chunk_modules
from perf_vit.layers.linearized_attention import CONVERTIBLE
from perf_vit.layers.mixer import MIXERS, check_option_names
from perf_vit.layers.token_grid import TokenGrid, follow_tokens, watch_patch_embed

__all__ = [
    "Conversion",
    "body_of",
    "convert_attention",
    "convert_in_place",
    "converted_layers",
    "convertible_layers",
    "linearize",
]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The arguments of `linearize`.

    Attributes:
        mixer: name of a mixer.
        layers: indices of the layers to convert, None for all.
        options: options of the mixer, for all of these layers.
        per_layer: options by index, over those for all; among them a "mixer" of the layer's own, which takes none of
            `options`.

    Raises:
        ValueError: an unknown mixer, an option that the mixer doesn't have, or a value that it can't take.
    """

    mixer: str = "clustered"
    layers: tuple[int, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    per_layer: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_option_names(self.mixer, self.options)
        MIXERS[self.mixer].options_type(**self.options)
        for index, own in self.per_layer.items():
            mixer = own.get("mixer", self.mixer)
            check_option_names(mixer, (name for name in own if name != "mixer"))
            self.of_layer(index, 0)

    def mixer_of(self, index: int) -> str:
        """The name of a layer's mixer."""
        return str(self.per_layer.get(index, {}).get("mixer", self.mixer))

    def of_layer(self, index: int, num_prefix_tokens: int) -> MixerOptions:
        """The options of a layer, in a model with so many prefix tokens."""
        mixer = self.mixer_of(index)
        own = {name: value for name, value in self.per_layer.get(index, {}).items() if name != "mixer"}
        common = self.options if mixer == self.mixer else {}
        of_model = {"num_prefix_tokens": num_prefix_tokens, "layer_index": index}
        return MIXERS[mixer].options_type(**{**common, **own, **of_model})

    def within(self, num_layers: int) -> Self:
        """The same for a model that was cut after its first layers."""
        layers = None if self.layers is None else tuple(index for index in self.layers if index < num_layers)
        per_layer = {index: options for index, options in self.per_layer.items() if index < num_layers}
        return replace(self, layers=layers, per_layer=per_layer)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, whose keys are strings.

        Defaults are spelled out: what was saved stays what it is when they change.
        """
        return {
            "mixer": self.mixer,
            "layers": None if self.layers is None else list(self.layers),
            "options": MIXERS[self.mixer].options_type(**self.options).given(),
            "per_layer": {
                str(index): {"mixer": self.mixer_of(index), **self.of_layer(index, 0).given()}
                for index in self.per_layer
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: values of an earlier version, or of a later one.
        """
        if "mixer" not in values:
            raise ValueError("it names no mixer, as conversions of other versions do")
        return cls(
            mixer=values["mixer"],
            layers=None if values["layers"] is None else tuple(values["layers"]),
            options=values["options"],
            per_layer={int(index): own for index, own in values["per_layer"].items()},
        )


def linearize(
    model: nn.Module,
    mixer: str = "clustered",
    layers: Collection[int] | None = None,
    per_layer: Mapping[int, Mapping[str, Any]] | None = None,
    **options: Any,
) -> nn.Module:
    """A copy of a timm ViT whose attention costs O(N), with the same weights under the same names.

    timm's `Attention` (ViT, DeiT, MAE, DINOv2, CLIP, SigLIP), `AttentionRope` and `EvaAttention` (EVA02, DINOv3) are
    taken over, also in a ViT that something wraps; the model is still what it was for timm's utilities.
    "clustered" keeps most of what a pretrained model knows, untrained; "performer" is FAVOR+ (Choromanski et al.
    2020), after which a model must be trained.

    Args:
        model: a ViT with such layers, or a model that holds one; it is not changed.
        mixer: "clustered", "performer", "softmax" to leave layers as they are, or a registered one.
        layers: indices, from 0, of the attention layers to convert; None for all.
        per_layer: options for single layers, by index, over those for all: {11: {"window_size": 8}}. Among them may
            be another "mixer", which takes none of `options`.
        **options: options of the mixer: fields of `ClusteredOptions` (window_size, num_sinks, num_clusters) or of
            `PerformerOptions` (num_features, kernel, seed and others).

    Returns:
        The converted copy, in the mode (training or evaluation) of the model. It keeps the arguments as `conversion`.

    Raises:
        ValueError: an unknown mixer or option, a model without such layers, or with windows one without a patch
            embedding that tells the grid, or a layer that has no linear form.
    """
    _check_arguments(model, mixer, layers)
    conversion = Conversion(
        mixer=mixer,
        layers=None if layers is None else tuple(sorted(set(layers))),
        options=options,
        per_layer=per_layer or {},
    )
    return convert_in_place(copy.deepcopy(model), conversion)


def convert_in_place(model: nn.Module, conversion: Conversion) -> nn.Module:
    """Do what `linearize` does to its copy.

    Raises:
        ValueError: as `linearize`.
    """
    body = body_of(model)
    convert_attention(body, conversion)
    # timm's models are open to attributes of any kind.
    body.conversion = conversion  # type: ignore[assignment]
    return model


def convert_attention(model: nn.Module, conversion: Conversion, *, in_chunks: bool = True) -> None:
    """Replace the attention layers of a model itself.

    Args:
        model: a ViT.
        conversion: mixer and options.
        in_chunks: whether blocks and MLPs go in chunks from then on (`chunk_modules`).

    Raises:
        ValueError: as `linearize`.
    """
    found = convertible_layers(model)
    chosen = [index for index in _choose(model, found, conversion) if conversion.mixer_of(index) != "softmax"]
    grid, num_prefix_tokens = TokenGrid(), getattr(model, "num_prefix_tokens", 0)
    layers = []
    for index in chosen:
        name, module = found[index]
        parent, _, child = name.rpartition(".")
        layers.append(LinearizedAttention(module, conversion.of_layer(index, num_prefix_tokens), grid))
        setattr(model.get_submodule(parent), child, layers[-1])
    if layers and in_chunks:
        chunk_modules(model)
    if any(layer.needs_grid for layer in layers):
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


def converted_layers(model: nn.Module) -> dict[int, LinearizedAttention]:
    """Index -> layer of those that are linear."""
    layers = [module for module in model.modules() if isinstance(module, LinearizedAttention)]
    return {layer.options.layer_index: layer for layer in layers}


def _check_arguments(model: nn.Module, mixer: str, layers: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a model, got {model!r}; timm.create_model makes one")
    MIXERS[mixer]
    if layers is not None and not (isinstance(layers, Collection) and all(isinstance(x, int) for x in layers)):
        raise ValueError(f"layers must be indices of attention layers, got {layers!r}; pass a list of whole numbers")


def _has_patch_embed(module: nn.Module) -> bool:
    return isinstance(getattr(module, "patch_embed", None), nn.Module)


def _has_attention(module: nn.Module) -> bool:
    return any(isinstance(layer, (*CONVERTIBLE, LinearizedAttention)) for layer in module.modules())


def _choose(model: nn.Module, found: list[tuple[str, nn.Module]], conversion: Conversion) -> list[int]:
    linear = [name for name, module in model.named_modules() if isinstance(module, LinearizedAttention)]
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
            f"layers must be indices from 0 to {len(found) - 1}, got {outside[0]}; leave layers out to convert all"
        )
    for index in conversion.per_layer:
        if index not in chosen:
            among = f"0 to {len(found) - 1}" if conversion.layers is None else ", ".join(map(str, chosen))
            raise ValueError(f"per_layer must name layers that are converted, {among}; got {index!r}")
    return list(chosen)
