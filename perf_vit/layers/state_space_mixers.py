"""Mixers of state-space models over rows and columns: S4 and H3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.layers.mixer import BidirectionalMixer, MixerOptions, check_integers, register_mixer
from perf_vit.ops.state_space import DiagonalStates, at_least_float, convolve_grid
from perf_vit.ops.windows import split_dim

__all__ = ["H3Mixer", "H3Options", "S4Mixer", "S4Options"]


@dataclass(frozen=True, kw_only=True)
class S4Options(MixerOptions):
    """Options of S4.

    Attributes:
        num_states: Number of complex states of each channel and direction.

    Raises:
        ValueError: It is not an integer of at least 1.
    """

    num_states: int = 16

    def __post_init__(self) -> None:
        check_integers(1, num_states=self.num_states)
        super().__post_init__()

    def summary(self, grid: tuple[int, int]) -> dict[str, int]:
        """Return the sizes shown in reports."""
        return {"states": self.num_states}


@dataclass(frozen=True, kw_only=True)
class H3Options(S4Options):
    """Options of H3."""


class _StateSpaceMixer(BidirectionalMixer):
    """State-space models along rows and columns, in both directions, one for each channel of all heads.

    Prefix tokens have no place on the grid: they read the mean of the result over all valid tokens, and no token reads
    them.

    Attributes:
        rows: Models along rows.
        columns: Models along columns.
        skip: Weight of a token's own input, [C].
    """

    needs_grid: ClassVar[bool] = True
    options: S4Options

    def __init__(
        self, options: S4Options, head_dim: int, device: torch.device | None = None, num_heads: int = 1
    ) -> None:
        super().__init__(options, head_dim, device, num_heads)
        channels = head_dim * num_heads
        self.rows = DiagonalStates(channels, options.num_states, device)
        self.columns = DiagonalStates(channels, options.num_states, device)
        self.skip = nn.Parameter(torch.ones(channels, device=device))

    def run_models(self, u: Tensor) -> Tensor:
        """Return the models' outputs and the skip of a map [B, C, rows, columns], in float32 at least."""
        kernels = self.rows.kernel(u.shape[3]), self.columns.kernel(u.shape[2])
        return convolve_grid(u, *kernels) + self.skip[:, None, None] * at_least_float(u)

    def with_prefix(self, on_grid: Tensor, seen: Tensor | None) -> Tensor:
        """Return tokens [B, H, P + rows x columns, D] of a map [B, C, rows, columns]: prefix tokens are its mean."""
        tokens = split_dim(on_grid.flatten(2), 1, self.num_heads, self.head_dim).mT
        if seen is None:
            mean = tokens.mean(dim=2, keepdim=True)
        else:
            weight = seen[:, None, :, None].to(tokens.dtype)
            mean = (tokens * weight).sum(dim=2, keepdim=True) / weight.sum(dim=2, keepdim=True).clamp(min=1)
        prefix = mean.expand(-1, -1, self.options.num_prefix_tokens, -1)
        return torch.cat([prefix, tokens], dim=2)

    def on_grid(self, x: Tensor, grid: tuple[int, int], seen: Tensor | None) -> Tensor:
        """Return the map [B, C, rows, columns] of tokens [B, H, N, D], 0 where they are to be ignored."""
        x = x[:, :, self.options.num_prefix_tokens :]
        if seen is not None:
            x = x.masked_fill(~seen[:, None, :, None], 0.0)
        return x.mT.reshape(len(x), -1, *grid)

    def seen(self, key_mask: Tensor | None) -> Tensor | None:
        """Return the part of a key mask on the grid, [B, rows x columns]."""
        return None if key_mask is None else key_mask[:, self.options.num_prefix_tokens :]


@register_mixer("s4")
class S4Mixer(_StateSpaceMixer):
    """Diagonal S4 of the values over rows and columns, then GELU (Gu et al. 2022; Nguyen et al. 2022 for two axes).

    Queries and keys of the layer are unused.
    """

    options_type = S4Options

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None) -> Tensor:
        """Mix, see `Mixer.forward`; tokens to ignore weigh nothing."""
        assert grid is not None
        seen = self.seen(key_mask)
        mixed = F.gelu(self.run_models(self.on_grid(v, grid, seen)))
        return self.with_prefix(mixed, seen).to(v.dtype)


@register_mixer("h3")
class H3Mixer(_StateSpaceMixer):
    """H3: q * S4(shift(k) * v) with a head for each channel (Fu et al. 2023, "Hungry Hungry Hippos", section 3).

    The shift model, which remembers the last tokens, is a depth-wise 3 x 3 convolution here: it looks both ways.

    Attributes:
        shift: Convolution of the keys.
    """

    options_type = H3Options

    def __init__(
        self, options: H3Options, head_dim: int, device: torch.device | None = None, num_heads: int = 1
    ) -> None:
        super().__init__(options, head_dim, device, num_heads)
        channels = head_dim * num_heads
        self.shift = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False, device=device)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None) -> Tensor:
        """Mix, see `Mixer.forward`; tokens to ignore weigh nothing."""
        assert grid is not None
        seen = self.seen(key_mask)
        keys, values = (self.on_grid(x, grid, seen) for x in (k, v))
        mixed = self.run_models(self.shift(keys) * values)
        return q * self.with_prefix(mixed, seen).to(q.dtype)
