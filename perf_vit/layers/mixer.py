"""The registry of mixers: what computes attention between the tokens of a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perf_vit.registry import Registry, did_you_mean

__all__ = [
    "MIXERS",
    "Mixer",
    "MixerOptions",
    "check_option_names",
    "check_whole",
    "make_mixer",
    "register_mixer",
]

# Options that the model decides for each layer; users set none of them.
_OF_MODEL = ("num_prefix_tokens", "layer_index")


@dataclass(frozen=True, kw_only=True)
class MixerOptions:
    """Options that all mixers have; the options of a mixer are a subclass.

    Attributes:
        local_enhancement: whether a depth-wise convolution of the values is added (see `LocalEnhancement`); it has
            parameters of its own.
        num_prefix_tokens: class and register tokens, which have no place in the grid of patches.
        layer_index: index of the layer in its model.

    Raises:
        ValueError: a number that is negative or not whole.
    """

    local_enhancement: bool = False
    num_prefix_tokens: int = 0
    layer_index: int = 0

    def __post_init__(self) -> None:
        check_whole(num_prefix_tokens=self.num_prefix_tokens, layer_index=self.layer_index)

    @classmethod
    def names(cls) -> list[str]:
        """Names of the options that a user may set."""
        return [field.name for field in fields(cls) if field.name not in _OF_MODEL]

    def given(self) -> dict[str, Any]:
        """Values of the options that a user may set, for saving."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_MODEL}

    def summary(self, grid: tuple[int, int]) -> dict[str, int]:
        """Sizes that a report shows for an image of these rows and columns of tokens."""
        return {}


class Mixer(nn.Module, ABC):
    """Attention of linear cost between queries, keys and values, without the projections around it.

    Args:
        options: options of the mixer.
        head_dim: channels of a head, D.
        device: device of its buffers and parameters.

    Attributes:
        options_type: dataclass of the options.
        name: name in the registry.
        needs_grid: whether it must know the rows and columns of its tokens.
    """

    options_type: ClassVar[type[MixerOptions]]
    name: ClassVar[str]
    needs_grid: ClassVar[bool] = False

    def __init__(self, options: MixerOptions, head_dim: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.options, self.head_dim = options, head_dim

    @abstractmethod
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend.

        Args:
            q: queries, [B, H, N, D]: first the prefix tokens, then those of the grid, row by row.
            k: keys, [B, H, N, D].
            v: values, [B, H, N, D].
            grid: rows and columns of tokens; None for a mixer that doesn't need them.
            key_mask: [B, N] bool, False for keys that are left out.
            is_causal: token i sees tokens 0 .. i only.

        Returns:
            [B, H, N, D].

        Raises:
            ValueError: causal order where the mixer has none.
        """

    def extra_repr(self) -> str:
        """The options, for printing."""
        return ", ".join(f"{field.name}={getattr(self.options, field.name)!r}" for field in fields(self.options))


MIXERS: Registry[type[Mixer]] = Registry("mixer")
"""Classes of mixers by name."""


def register_mixer(name: str) -> Callable[[type[Mixer]], type[Mixer]]:
    """Decorate a `Mixer` class so that conversion, backbones and configs find it by name.

    Args:
        name: Name of the mixer.

    Raises:
        ValueError: The name is taken.
    """

    def register(mixer: type[Mixer]) -> type[Mixer]:
        MIXERS.add(name, mixer)
        mixer.name = name
        return mixer

    return register


def make_mixer(options: MixerOptions, head_dim: int, device: torch.device | None = None) -> Mixer:
    """The mixer that has options of this type."""
    (mixer,) = (each for each in MIXERS.values() if each.options_type is type(options))
    return mixer(options, head_dim, device)


def check_option_names(name: str, options: Iterable[str]) -> None:
    """Refuse options that a mixer doesn't have.

    Args:
        name: name of the mixer.
        options: names of options that a user gave.

    Raises:
        ValueError: names the first of them and the mixer that has it, or the nearest option.
    """
    known = MIXERS[name].options_type.names()
    for option in options:
        if option in _OF_MODEL:
            raise ValueError(f"options must not hold {option}, which the model decides for each layer; leave it out")
        if option not in known:
            raise ValueError(_unknown_option(name, option, known))


def _unknown_option(name: str, option: str, known: list[str]) -> str:
    owners = [other for other, mixer in MIXERS.items() if option in mixer.options_type.names()]
    if owners:
        return f"{option} is an option of mixer={owners[0]!r}, got mixer={name!r}; use that mixer or leave {option} out"
    return f"options of mixer={name!r} are {', '.join(known)}, got {option!r}{did_you_mean(option, known)}"


def check_whole(least: int = 0, **numbers: Any) -> None:
    """Refuse options that must be whole numbers and aren't.

    Args:
        least: smallest number allowed.
        **numbers: values by name.

    Raises:
        ValueError: names the first of them.
    """
    for name, number in numbers.items():
        if not isinstance(number, Integral):
            raise ValueError(f"{name} must be a whole number, got {number!r}; pass an int")
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
