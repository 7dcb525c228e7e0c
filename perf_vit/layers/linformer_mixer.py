"""Mixer with learnt projections of keys and values to a fixed number (Linformer)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.layers.mixer import BidirectionalMixer, MixerOptions, check_integers, register_mixer
from perf_vit.ops.state_space import at_least_float
from perf_vit.ops.windows import split_dim

__all__ = ["LinformerMixer", "LinformerOptions"]


@dataclass(frozen=True, kw_only=True)
class LinformerOptions(MixerOptions):
    """Options of Linformer.

    Attributes:
        num_projected: Number of projected keys and values, K; the cost is O(N K).
        native_side: Rows and columns of the grid for which projections are learnt; over other grids they are
            interpolated.

    Raises:
        ValueError: A value is not an integer of at least 1.
    """

    num_projected: int = 128
    native_side: int = 14

    def __post_init__(self) -> None:
        check_integers(1, num_projected=self.num_projected, native_side=self.native_side)
        super().__post_init__()

    def summary(self, grid: tuple[int, int]) -> dict[str, int]:
        """Return the sizes shown in reports."""
        return {"projected": self.num_projected}


@register_mixer("linformer")
class LinformerMixer(BidirectionalMixer):
    """Softmax attention to K learnt sums of keys and of values (Wang et al. 2020, "Linformer", equation 7).

    Both projections are shared by all heads. Over a grid of N tokens of another size they are interpolated bilinearly
    and scaled by native_side^2 / N, so that sums of a uniform image stay the same.

    Attributes:
        keys: Projection of the keys, [K, P + native_side^2]: prefix tokens first.
        values: Projection of the values, of the same shape.
    """

    options_type = LinformerOptions
    needs_grid: ClassVar[bool] = True
    options: LinformerOptions

    def __init__(
        self, options: LinformerOptions, head_dim: int, device: torch.device | None = None, num_heads: int = 1
    ) -> None:
        super().__init__(options, head_dim, device, num_heads)
        length = options.num_prefix_tokens + options.native_side**2
        self.keys = nn.Parameter(torch.empty(options.num_projected, length, device=device))
        self.values = nn.Parameter(torch.empty(options.num_projected, length, device=device))
        for projection in (self.keys, self.values):
            # Sums of N keys of unit variance keep it.
            nn.init.normal_(projection, std=length**-0.5)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None) -> Tensor:
        """Attend, see `Mixer.forward`; keys to ignore are left out of the sums."""
        assert grid is not None
        if key_mask is not None:
            hidden = ~key_mask[:, None, :, None]
            k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        keys, values = (self.projection(weight, grid).to(k.dtype) for weight in (self.keys, self.values))
        return F.scaled_dot_product_attention(q, keys @ k, values @ v)

    def projection(self, weight: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return `keys` or `values` for a grid of (rows, columns), [K, P + rows x columns]."""
        side, prefix = self.options.native_side, self.options.num_prefix_tokens
        if tuple(grid) == (side, side):
            return weight
        weight = at_least_float(weight)
        native = split_dim(weight[:, None, prefix:], 2, side, side)
        resized = F.interpolate(native, size=tuple(grid), mode="bilinear", antialias=True).flatten(2)[:, 0]
        return torch.cat([weight[:, :prefix], resized * (side * side / (grid[0] * grid[1]))], dim=1)
