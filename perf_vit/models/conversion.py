"""What a conversion was asked for, as plain values that can be saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

__all__ = ["ATTENTIONS", "Conversion", "default_attention"]

# What each kind of attention changes of `ScatterbrainOptions`; further mixers go here.
ATTENTIONS: dict[str, dict[str, Any] | None] = {
    "softmax": None,
    "performer": {"num_features": 256},
    "clustered": {"window_size": 16, "num_sinks": None, "num_clusters": 96},
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
# What "clustered" gave by default when conversions were saved without what they had by default.
_SAVED_WITHOUT = {"num_sinks": 64}


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
        ValueError: an attention that there isn't, options of random features for clusters, or clusters for another
            attention.
    """

    attention: str = "clustered"
    layers: tuple[int, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    per_layer: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = [options["attention"] for options in self.per_layer.values() if "attention" in options]
        for attention in (self.attention, *own):
            if attention not in ATTENTIONS:
                raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
        # What other layers' own attention takes of the options for all may stand among those.
        elsewhere = _SHARED if {"performer", "scatterbrain"}.intersection(own) else ()
        _check_options(self.attention, {name: x for name, x in self.options.items() if name not in elsewhere})
        for options in self.per_layer.values():
            _check_options(options.get("attention", self.attention), options)

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
        if self.attention != "clustered" or any("attention" in options for options in per_layer.values()):
            return replace(self, layers=layers, per_layer=per_layer)
        # Clusters take none of the options that were there for features of layers which are cut off.
        options = {name: value for name, value in self.options.items() if name not in _OF_FEATURES}
        return replace(self, layers=layers, per_layer=per_layer, options=options)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, whose keys are strings.

        What `ATTENTIONS` gives by default is spelled out: what was saved stays what it is when that changes.
        """
        return {
            "attention": self.attention,
            "layers": None if self.layers is None else list(self.layers),
            "options": {**(ATTENTIONS[self.attention] or {}), **self.options},
            "per_layer": {str(index): self._spelled_out(index) for index in self.per_layer},
        }

    def _spelled_out(self, index: int) -> dict[str, Any]:
        attention, options = self.of_layer(index)
        if attention in (self.attention, "softmax"):
            return dict(self.per_layer[index])
        foreign = _OF_FEATURES if attention == "clustered" else ()
        return {"attention": attention, **{name: value for name, value in options.items() if name not in foreign}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        attention, options = values["attention"], values["options"]
        if attention == "clustered":
            options = {**_SAVED_WITHOUT, **options}
        per_layer = {}
        for index, own in values["per_layer"].items():
            is_foreign = own.get("attention", attention) == "clustered" != attention
            per_layer[int(index)] = {**_SAVED_WITHOUT, **own} if is_foreign else own
        return cls(
            attention=attention,
            layers=None if values["layers"] is None else tuple(values["layers"]),
            options=options,
            per_layer=per_layer,
        )


def _check_options(attention: str, options: Mapping[str, Any]) -> None:
    of_features = [name for name in _OF_FEATURES if name in options]
    num_clusters = options.get("num_clusters")
    if attention == "clustered" and of_features:
        raise ValueError(
            f"{of_features[0]} is of random features, which attention='clustered' doesn't have; use num_clusters, or "
            "attention='scatterbrain'"
        )
    if attention == "clustered" and num_clusters == 0:
        raise ValueError("num_clusters must be 1 or more, got 0; use attention='scatterbrain' for random features")
    if attention != "clustered" and num_clusters:
        why = f", which {of_features[0]} asks for" if of_features else ""
        raise ValueError(
            f"num_clusters is of attention='clustered', got attention={attention!r}{why}; leave one of the two out"
        )
