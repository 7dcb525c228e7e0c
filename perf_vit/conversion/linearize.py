"""Conversion of a softmax ViT to linear attention with the same weights, and its arguments."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import nn

from perf_vit.conversion.native_size import native_layers, tile_positions
from perf_vit.layers import LinearizedAttention, MixerOptions
from perf_vit.layers.chunked import chunk_modules
from perf_vit.layers.linearized_attention import CONVERTIBLE
from perf_vit.layers.mixer import MIXERS, check_integers, check_option_names
from perf_vit.layers.token_grid import TokenGrid, follow_tokens, watch_patch_embed

__all__ = [
    "Conversion",
    "convert_attention",
    "convert_in_place",
    "converted_layers",
    "convertible_layers",
    "find_vit",
    "linearize",
    "max_exact_side",
]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Arguments of `linearize`.

    Attributes:
        mixer: Name of a mixer.
        layers: Indices of the layers to convert, None for all.
        options: Options of the mixer, for all these layers.
        per_layer: Options by layer index, which override `options`. A layer with another "mixer" ignores `options`.
        native_size: Rows and columns of patches after which positions repeat; None for positions of whole images.

    Raises:
        ValueError: The mixer is unknown, has no such option, or an option has an invalid value.
    """

    mixer: str = "clustered"
    layers: tuple[int, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    per_layer: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    native_size: int | None = None

    def __post_init__(self) -> None:
        if self.native_size is not None:
            check_integers(1, native_size=self.native_size)
        check_option_names(self.mixer, self.options)
        MIXERS[self.mixer].options_type(**self.options)
        for index, own in self.per_layer.items():
            mixer = own.get("mixer", self.mixer)
            check_option_names(mixer, (name for name in own if name != "mixer"))
            self.layer_options(index, 0)

    def layer_mixer(self, index: int) -> str:
        """Return the name of a layer's mixer."""
        return str(self.per_layer.get(index, {}).get("mixer", self.mixer))

    def layer_options(self, index: int, num_prefix_tokens: int) -> MixerOptions:
        """Return the options of a layer in a model with `num_prefix_tokens` prefix tokens."""
        mixer = self.layer_mixer(index)
        own = {name: value for name, value in self.per_layer.get(index, {}).items() if name != "mixer"}
        common = self.options if mixer == self.mixer else {}
        of_model = {"num_prefix_tokens": num_prefix_tokens, "layer_index": index}
        return MIXERS[mixer].options_type(**{**common, **own, **of_model})

    def truncated(self, num_layers: int) -> Self:
        """Return the conversion of a model that was truncated to its first `num_layers` layers."""
        layers = None if self.layers is None else tuple(index for index in self.layers if index < num_layers)
        per_layer = {index: options for index, options in self.per_layer.items() if index < num_layers}
        return replace(self, layers=layers, per_layer=per_layer)

    def beyond_native(self, num_layers: int) -> Self:
        """Return the conversion of all layers of which `layers` see the whole image and others windows.

        Raises:
            ValueError: There is no such layer.
        """
        assert self.native_size is not None
        _check_indices(self.layers or (), num_layers)
        windows = native_layers(num_layers, self.native_size, self.layers or ())
        # A layer that names a mixer has options of its own, as elsewhere.
        own = {
            index: options if "mixer" in options else {**windows.get(index, {}), **options}
            for index, options in self.per_layer.items()
        }
        return replace(self, layers=None, per_layer={**windows, **own})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with defaults included, so that saved conversions don't depend on them."""
        return {
            "mixer": self.mixer,
            "layers": None if self.layers is None else list(self.layers),
            "options": MIXERS[self.mixer].options_type(**self.options).user_options(),
            "per_layer": {
                str(index): {"mixer": self.layer_mixer(index), **self.layer_options(index, 0).user_options()}
                for index in self.per_layer
            },
            "native_size": self.native_size,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a conversion from the result of `to_dict`.

        Raises:
            ValueError: The values come from another version.
        """
        if "mixer" not in values:
            raise ValueError("it has no mixer, as conversions of other versions")
        return cls(
            mixer=values["mixer"],
            layers=None if values["layers"] is None else tuple(values["layers"]),
            options=values["options"],
            per_layer={int(index): own for index, own in values["per_layer"].items()},
            native_size=values.get("native_size"),
        )


def linearize(
    model: nn.Module,
    mixer: str = "clustered",
    layers: Collection[int] | None = None,
    per_layer: Mapping[int, Mapping[str, Any]] | None = None,
    native_size: int | None = None,
    **options: Any,
) -> nn.Module:
    """Copy a timm ViT with attention of linear cost and the same weights under the same names.

    Converts timm's `Attention` (ViT, DeiT, MAE, DINOv2, CLIP, SigLIP), `AttentionRope` and `EvaAttention` (EVA02,
    DINOv3), also in a ViT inside another model. timm's utilities work on the result as on the original. "clustered"
    preserves most of a pretrained model without training; "performer" is FAVOR+ (Choromanski et al. 2020) and needs
    training afterwards.

    Args:
        model: ViT with such layers, or a model that contains one; it is not changed.
        mixer: "clustered", "performer", "softmax" to keep the layers, or a registered mixer.
        layers: Indices, from 0, of the attention layers to convert; None for all. With `native_size`, those that see
            the whole image; None for none.
        per_layer: Options by layer index, which override `options`: {11: {"window_size": 8}}. They may set another
            "mixer", for which `options` are ignored; with `native_size`, layers without one keep native windows.
        native_size: Rows and columns of patches that the model was pretrained at, for images that are larger: positions
            repeat after so many patches, and all layers but `layers` attend within windows of this size.
        **options: Options of the mixer: fields of `ClusteredOptions` (window_size, num_sinks, num_clusters,
            max_exact_tokens, chunk_size) or of `PerformerOptions` (num_features, kernel, seed and others).

    Returns:
        The converted copy, in the same mode (training or evaluation). Its attribute `conversion` holds the arguments.

    Raises:
        ValueError: The mixer or an option is unknown, the model has no such layers, a layer can't be converted, or
            the mixer needs the grid and the model has no patch embedding that provides it.
    """
    _check_arguments(model, mixer, layers)
    chosen = None if layers is None else tuple(sorted(set(layers)))
    conversion = Conversion(
        mixer=mixer, layers=chosen, options=options, per_layer=per_layer or {}, native_size=native_size
    )
    if native_size is not None:
        conversion = conversion.beyond_native(len(convertible_layers(find_vit(model))))
    return convert_in_place(copy.deepcopy(model), conversion)


def convert_in_place(model: nn.Module, conversion: Conversion) -> nn.Module:
    """Convert a model in place, as `linearize` converts its copy.

    Raises:
        ValueError: As `linearize`.
    """
    body = find_vit(model)
    convert_attention(body, conversion)
    # nn.Module accepts attributes of any type.
    body.conversion = conversion  # type: ignore[assignment]
    return model


def convert_attention(model: nn.Module, conversion: Conversion, *, in_chunks: bool = True) -> None:
    """Replace the attention layers of a model in place.

    Args:
        model: ViT.
        conversion: Mixer and options.
        in_chunks: Whether blocks and MLPs process tokens in chunks (`chunk_modules`).

    Raises:
        ValueError: As `linearize`.
    """
    found = convertible_layers(model)
    grid, num_prefix_tokens = TokenGrid(), getattr(model, "num_prefix_tokens", 0)
    layers = []
    for index in _choose(model, found, conversion):
        options = conversion.layer_options(index, num_prefix_tokens)
        if conversion.layer_mixer(index) == "softmax" and not options.local_enhancement:
            continue
        name, module = found[index]
        parent, _, child = name.rpartition(".")
        layers.append(LinearizedAttention(module, options, grid))
        setattr(model.get_submodule(parent), child, layers[-1])
    if layers and in_chunks:
        chunk_modules(model)
    if conversion.native_size is not None:
        tile_positions(model, conversion.native_size)
    if any(layer.needs_grid for layer in layers):
        watch_patch_embed(model, grid)
        follow_tokens(model, grid)


def find_vit(model: nn.Module) -> nn.Module:
    """Return the model if it is a ViT, else the only ViT in it, as in `features_only=True`, decoders and trainers.

    Raises:
        ValueError: It contains several.
    """
    vits = [module for module in model.modules() if _has_patch_embed(module) and _has_attention(module)]
    if not vits or vits[0] is model:
        return model
    if len(vits) > 1:
        raise ValueError(
            f"expected one ViT in {type(model).__name__}, got {len(vits)}; convert each of them and assign the result"
        )
    return vits[0]


def convertible_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (name, layer) of all convertible attention layers, in the order of the model."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, CONVERTIBLE)]


def converted_layers(model: nn.Module) -> dict[int, LinearizedAttention]:
    """Return the converted layers by index."""
    layers = [module for module in model.modules() if isinstance(module, LinearizedAttention)]
    return {layer.options.layer_index: layer for layer in layers}


def max_exact_side(model: nn.Module) -> int | None:
    """Return the rows and columns of the largest square grid for which all converted layers use softmax attention.

    Returns:
        Number of rows, 0 for none; None for a model without converted layers.
    """
    return min((layer.options.max_exact_side() for layer in converted_layers(model).values()), default=None)


def _check_arguments(model: nn.Module, mixer: str, layers: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a model, got {model!r}; timm.create_model makes one")
    MIXERS[mixer]
    if layers is not None and not (isinstance(layers, Collection) and all(isinstance(x, int) for x in layers)):
        raise ValueError(f"layers must be indices of attention layers, got {layers!r}; pass a list of integers")


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
            f"{type(model).__name__} with none of them; attention with windows, pooling or relative position "
            "biases (Swin, MViT, BEiT) can't be converted"
        )
    chosen = range(len(found)) if conversion.layers is None else conversion.layers
    _check_indices(chosen, len(found))
    for index in conversion.per_layer:
        if index not in chosen:
            among = f"0 to {len(found) - 1}" if conversion.layers is None else ", ".join(map(str, chosen))
            raise ValueError(f"per_layer must name layers that are converted, {among}; got {index!r}")
    return list(chosen)


def _check_indices(layers: Collection[int], num_layers: int) -> None:
    outside = [index for index in layers if not 0 <= index < num_layers]
    if outside:
        raise ValueError(
            f"layers must be indices from 0 to {num_layers - 1}, got {outside[0]}; leave layers out to convert all"
        )
