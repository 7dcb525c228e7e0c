"""What a conversion was asked for, as plain values that can be saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

__all__ = ["ATTENTIONS", "Conversion", "default_attention"]

# What each kind of attention changes of `ScatterbrainOptions`; further mixers go here.
ATTENTIONS: dict[str, dict[str, Any] | None] = {
    "softmax": None,
    "performer": {},
    "clustered": {"window_size": 16, "num_sinks": 64, "num_clusters": 96},
    "scatterbrain": {
        "kernel": "softmax-hyp+",
        "norms": "sqrt",
        "center": True,
        "balance": True,
        "num_features": 128,
        "window_size": 12,
        "num_sinks": 512,
    },
}
# Options that mean the same for every attention.
_SHARED = ("num_features", "orthogonal", "seed")
# Options of random features, of which clusters have none.
_OF_FEATURES = ("num_features", "kernel", "norms", "orthogonal", "center", "balance")


def default_attention(options: Iterable[str]) -> str:
    """The attention for options of these names: "scatterbrain" for those of random features, else "clustered"."""
    return "scatterbrain" if set(_OF_FEATURES).intersection(options) else "clustered"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The arguments of `performerize`.

    Attributes:
        attention: "softmax", "performer", "clustered" or "scatterbrain".
        layers: places of the layers to convert, None for all.
        options: for all of these layers.
        per_layer: options by place, over those for all; among them an "attention" of the layer's own.

    Raises:
        ValueError: an attention that there isn't, or options of random features for clusters.
    """

    attention: str = "clustered"
    layers: tuple[int, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    per_layer: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = (options["attention"] for options in self.per_layer.values() if "attention" in options)
        for attention in (self.attention, *own):
            if attention not in ATTENTIONS:
                raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
        for options in (self.options if self.attention == "clustered" else {}, *self.per_layer.values()):
            wrong = [name for name in _OF_FEATURES if name in options]
            if wrong and options.get("attention", self.attention) == "clustered":
                raise ValueError(
                    f"{wrong[0]} is of random features, which attention='clustered' doesn't have; use num_clusters, or "
                    "attention='scatterbrain'"
                )

    def of_layer(self, index: int) -> tuple[str, dict[str, Any]]:
        """The attention of a layer and its options, defaults included."""
        own = dict(self.per_layer.get(index, {}))
        attention = own.pop("attention", self.attention)
        common = self.options
        if attention != self.attention:
            common = {name: value for name, value in common.items() if name in _SHARED}
        return attention, {**(ATTENTIONS[attention] or {}), **common, **own}

    def within(self, num_layers: int) -> Self:
        """The same for a model that was cut after its first layers."""
        layers = None if self.layers is None else tuple(index for index in self.layers if index < num_layers)
        per_layer = {index: options for index, options in self.per_layer.items() if index < num_layers}
        return replace(self, layers=layers, per_layer=per_layer)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, whose keys are strings."""
        return {
            "attention": self.attention,
            "layers": None if self.layers is None else list(self.layers),
            "options": dict(self.options),
            "per_layer": {str(index): dict(options) for index, options in self.per_layer.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(
            attention=values["attention"],
            layers=None if values["layers"] is None else tuple(values["layers"]),
            options=values["options"],
            per_layer={int(index): options for index, options in values["per_layer"].items()},
        )
