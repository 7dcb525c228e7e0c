"""What a conversion was asked for, as plain values that can be saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from perf_vit.layers import MixerOptions
from perf_vit.layers.mixer import MIXERS, check_option_names

__all__ = ["Conversion"]


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
