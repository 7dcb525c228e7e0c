"""Mixers, which compute attention between the tokens of a layer, and their registry."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.ops.streaming import AttentionStream, WholeStream
from perf_vit.ops.stripes import Stripe
from perf_vit.registry import Registry, did_you_mean

__all__ = [
    "MIXERS",
    "BidirectionalMixer",
    "DerivedBuffers",
    "Mixer",
    "MixerOptions",
    "check_integers",
    "check_option_names",
    "make_mixer",
    "refuse_causal",
    "register_mixer",
    "softmax_attention",
]

# Rows and columns of the largest grid that `MixerOptions.max_exact_side` tries.
_LARGEST_SIDE = 4096

# Largest image whose queries, keys and values an `AttentionStream` may hold: 75 MiB in a ViT-S.
_WHOLE_TOKENS = 2**14

# Options that the model sets for each layer; users can't set them.
_SET_BY_MODEL = ("num_prefix_tokens", "layer_index")


@dataclass(frozen=True, kw_only=True)
class MixerOptions:
    """Options common to all mixers; each mixer has a subclass.

    Attributes:
        local_enhancement: Whether to add a depth-wise convolution of the values (see `LocalEnhancement`), which has
            parameters.
        num_prefix_tokens: Number of class and register tokens, which lie outside the grid of patches.
        layer_index: Index of the layer in its model.

    Raises:
        ValueError: a value is negative or not an integer.
    """

    local_enhancement: bool = False
    num_prefix_tokens: int = 0
    layer_index: int = 0

    def __post_init__(self) -> None:
        check_integers(num_prefix_tokens=self.num_prefix_tokens, layer_index=self.layer_index)

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the options that users can set."""
        return [field.name for field in fields(cls) if field.name not in _SET_BY_MODEL]

    def user_options(self) -> dict[str, Any]:
        """Return the values of the options that users can set, for saving."""
        return {name: value for name, value in asdict(self).items() if name not in _SET_BY_MODEL}

    def is_exact(self, grid: tuple[int, int]) -> bool:
        """Return whether softmax attention runs for an image with a grid of (rows, columns) of tokens."""
        return False

    def max_exact_side(self) -> int:
        """Return the number of rows and columns of the largest square grid with softmax attention, 0 for none."""
        exact = itertools.takewhile(lambda side: self.is_exact((side, side)), range(1, _LARGEST_SIDE + 1))
        return max(exact, default=0)

    def summary(self, grid: tuple[int, int]) -> dict[str, int]:
        """Return the sizes shown in reports for an image with a grid of (rows, columns) of tokens."""
        return {}


class DerivedBuffers(nn.Module):
    """Module whose non-persistent buffers are computed, also when it leaves the meta device."""

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers on the module's device; timm calls this when a model leaves the meta device."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        was_meta = self._is_meta()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self._is_meta():
            self.init_non_persistent_buffers()
        return self

    def _is_meta(self) -> bool:
        return any(tensor.is_meta for tensor in itertools.chain(self.parameters(), self.buffers()))


class Mixer(DerivedBuffers, ABC):
    """Attention of linear cost between queries, keys and values, without input and output projections.

    Args:
        options: Options of the mixer.
        head_dim: Number of channels of a head, D.
        device: Device of buffers and parameters.
        num_heads: Number of heads, H, for mixers with parameters of each head.

    Attributes:
        options_type: Dataclass of the options.
        name: Name in the registry.
        needs_grid: Whether it needs the rows and columns of the tokens.
        needs_sample: Whether `stream` needs a sample of the tokens.
        stripe: Stripe of the image that `forward` gets, the rest of which other processes have; None for whole images.
    """

    options_type: ClassVar[type[MixerOptions]]
    name: ClassVar[str]
    needs_grid: ClassVar[bool] = False
    needs_sample: ClassVar[bool] = False
    stripe: Stripe | None = None

    def __init__(
        self, options: MixerOptions, head_dim: int, device: torch.device | None = None, num_heads: int = 1
    ) -> None:
        super().__init__()
        self.options, self.head_dim, self.num_heads = options, head_dim, num_heads

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
            q: Queries, [B, H, N, D]: prefix tokens first, then the grid in row-major order.
            k: Keys, [B, H, N, D].
            v: Values, [B, H, N, D].
            grid: Rows and columns of tokens; None for a mixer that doesn't need them.
            key_mask: [B, N] bool, False for keys to ignore.
            is_causal: Whether token i attends to tokens 0 .. i only.

        Returns:
            Attended values, [B, H, N, D].

        Raises:
            ValueError: `is_causal` is set and the mixer doesn't support it.
        """

    def stream(
        self,
        prefix: tuple[Tensor, Tensor, Tensor],
        sample: tuple[Tensor, Tensor, Tensor] | None,
        grid: tuple[int, int],
    ) -> AttentionStream:
        """Start the attention over an image that is read in parts.

        Args:
            prefix: Queries, keys and values of the prefix tokens, [B, H, P, D] each.
            sample: Those of the tokens at `perf_vit.ops.streaming.sampled_places`; None unless `needs_sample`.
            grid: Rows and columns of tokens.

        Raises:
            ValueError: See `check_stream`.
        """
        self.check_stream(grid)
        return WholeStream(lambda q, k, v, mask: self(q, k, v, grid, mask), prefix, grid)

    def adds_up(self, grid: tuple[int, int]) -> bool:
        """Return whether the attention over an image is made of sums over its parts, for a grid of tokens."""
        return False

    def check_stream(self, grid: tuple[int, int]) -> None:
        """Check that the attention can run over an image in parts.

        Args:
            grid: Rows and columns of tokens.

        Raises:
            ValueError: The mixer or one of its options needs all tokens at once, and the image is large.
        """
        if grid[0] * grid[1] > _WHOLE_TOKENS and not self.adds_up(grid):
            raise ValueError(
                f"mixer={self.name!r} with these options needs all tokens at once, which is possible up to "
                f"{_WHOLE_TOKENS:,} tokens, got {grid[0]} x {grid[1]}; in larger images 'clustered' needs num_sinks=0 "
                "and a smaller max_exact_tokens, 'performer' center=False, balance=False and a kernel other than 'oprf'"
            )

    def extra_repr(self) -> str:
        """Format the options for printing."""
        return ", ".join(f"{field.name}={getattr(self.options, field.name)!r}" for field in fields(self.options))


class BidirectionalMixer(Mixer):
    """Mixer that looks both ways, and so has no causal order: subclasses define `mix`."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend, see `Mixer.forward`.

        Raises:
            ValueError: `is_causal` is set.
        """
        refuse_causal(self.name, is_causal)
        return self.mix(q, k, v, grid, key_mask)

    @abstractmethod
    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None) -> Tensor:
        """Attend, with the arguments and the result of `Mixer.forward`."""


MIXERS: Registry[type[Mixer]] = Registry("mixer")
"""Classes of mixers by name."""

_BY_OPTIONS: dict[type[MixerOptions], type[Mixer]] = {}


def register_mixer(name: str) -> Callable[[type[Mixer]], type[Mixer]]:
    """Decorate a `Mixer` class to register it under a name for conversion, backbones and configs.

    Args:
        name: Name of the mixer.

    Raises:
        ValueError: The name is taken, or the class of the options, by which layers find their mixer, is another's.
    """

    def register(mixer: type[Mixer]) -> type[Mixer]:
        owner = _BY_OPTIONS.get(mixer.options_type)
        if owner is not None:
            raise ValueError(f"mixer {name!r} has the options_type of {owner.name!r}; give it a subclass of its own")
        MIXERS.add(name, mixer)
        mixer.name = name
        _BY_OPTIONS[mixer.options_type] = mixer
        return mixer

    return register


def make_mixer(options: MixerOptions, head_dim: int, device: torch.device | None = None, num_heads: int = 1) -> Mixer:
    """Make the mixer whose options have the type of `options`."""
    return _BY_OPTIONS[type(options)](options, head_dim, device, num_heads)


def refuse_causal(name: str, is_causal: bool) -> None:
    """Refuse causal order in a mixer that looks both ways.

    Raises:
        ValueError: `is_causal` is set.
    """
    if is_causal:
        raise ValueError(
            f"is_causal=True isn't possible with mixer={name!r}, which includes future tokens; use mixer='performer'"
        )


def check_option_names(name: str, options: Iterable[str]) -> None:
    """Check that a mixer has options of these names.

    Args:
        name: Name of the mixer.
        options: Names of the options given by a user.

    Raises:
        ValueError: An option doesn't exist; the message names a mixer that has it, or the closest name.
    """
    known = MIXERS[name].options_type.names()
    for option in options:
        if option in _SET_BY_MODEL:
            raise ValueError(f"options must not hold {option}, which the model sets for each layer; leave it out")
        if option not in known:
            raise ValueError(_unknown_option(name, option, known))


def _unknown_option(name: str, option: str, known: list[str]) -> str:
    owners = [other for other, mixer in MIXERS.items() if option in mixer.options_type.names()]
    if owners:
        return f"{option} is an option of mixer={owners[0]!r}, got mixer={name!r}; use that mixer or leave {option} out"
    return f"options of mixer={name!r} are {', '.join(known)}, got {option!r}{did_you_mean(option, known)}"


def check_integers(least: int = 0, **numbers: Any) -> None:
    """Check that options are integers of at least a minimum.

    Args:
        least: Smallest allowed value.
        **numbers: Values by option name.

    Raises:
        ValueError: An option isn't an integer or is below the minimum.
    """
    for name, number in numbers.items():
        if not isinstance(number, Integral):
            raise ValueError(f"{name} must be an integer, got {number!r}; pass an int")
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Exact attention softmax(q k^T / sqrt(D)) v, as timm's layers compute it.

    Args:
        q: Queries, [B, H, N, D].
        k: Keys, [B, H, N, D].
        v: Values, [B, H, N, D].
        key_mask: [B, N] bool, False for keys to ignore, which may hold any value.
        is_causal: Whether token i attends to tokens 0 .. i only.

    Returns:
        Attended values, [B, H, N, D]; 0 for samples without a visible key.
    """
    if key_mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    masked = ~key_mask[:, None, :, None]
    k, v = k.masked_fill(masked, 0.0), v.masked_fill(masked, 0.0)
    # A sample without visible keys sees all of them: their values are 0.
    seen = key_mask | ~key_mask.any(dim=1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None], is_causal=is_causal)
