"""Mixers of attention within windows, without and with global registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perf_vit.layers.mixer import BidirectionalMixer, MixerOptions, check_integers, register_mixer, softmax_attention
from perf_vit.ops.streaming import AttentionStream, WindowStream
from perf_vit.ops.windows import WindowGrid, attend_where, split_dim

__all__ = ["RegistersMixer", "RegistersOptions", "WindowedMixer", "WindowedOptions", "window_attention"]


@dataclass(frozen=True, kw_only=True)
class WindowedOptions(MixerOptions):
    """Options of attention within windows.

    Attributes:
        window_size: Largest number of rows and columns of a window.

    Raises:
        ValueError: It is not an integer of at least 1.
    """

    window_size: int = 16

    def __post_init__(self) -> None:
        check_integers(1, window_size=self.window_size)
        super().__post_init__()

    def summary(self, grid: tuple[int, int]) -> dict[str, int]:
        """Return the sizes shown in reports."""
        return {"window": self.window_size}


@dataclass(frozen=True, kw_only=True)
class RegistersOptions(WindowedOptions):
    """Options of attention within windows and to the prefix tokens."""

    def is_exact(self, grid: tuple[int, int]) -> bool:
        """Return whether one window holds all tokens, so that attention is that of softmax layers."""
        return max(grid) <= self.window_size


class _WindowMixer(BidirectionalMixer):
    needs_grid: ClassVar[bool] = True
    to_prefix: ClassVar[bool]
    options: WindowedOptions

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None) -> Tensor:
        """Attend, see `Mixer.forward`."""
        assert grid is not None
        options = self.options
        if options.is_exact(grid):
            return softmax_attention(q, k, v, key_mask)
        return window_attention(
            q, k, v, grid, options.window_size, options.num_prefix_tokens, to_prefix=self.to_prefix, key_mask=key_mask
        )

    def stream(
        self,
        prefix: tuple[Tensor, Tensor, Tensor],
        sample: tuple[Tensor, Tensor, Tensor] | None,
        grid: tuple[int, int],
    ) -> AttentionStream:
        """Start the attention over an image in parts, see `Mixer.stream`."""
        return WindowStream(prefix, grid, self.options.window_size, to_prefix=self.to_prefix)

    def check_stream(self, grid: tuple[int, int]) -> None:
        """Accept any image: windows lie within parts, and what prefix tokens attend to is a sum over parts."""


@register_mixer("windowed")
class WindowedMixer(_WindowMixer):
    """Exact attention of patches within their window. Prefix tokens read all tokens, and no patch reads them."""

    options_type = WindowedOptions
    to_prefix = False


@register_mixer("registers")
class RegistersMixer(_WindowMixer):
    """Exact attention of patches within their window and to class and register tokens, which read all tokens.

    Registers, `reg_tokens` of timm's ViT (Darcet et al. 2024), carry what windows have in common.
    """

    options_type = RegistersOptions
    to_prefix = True


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    window_size: int,
    num_prefix_tokens: int,
    *,
    to_prefix: bool,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Softmax attention of patches within their window, and of prefix tokens to all tokens.

    Args:
        q: Queries, [B, H, P + rows x columns, D].
        k: Keys, of the same shape.
        v: Values, of the same shape.
        grid: Rows and columns of the patches.
        window_size: Largest number of rows and columns of a window.
        num_prefix_tokens: Number of prefix tokens, P.
        to_prefix: Whether patches attend to the prefix tokens, too.
        key_mask: [B, N] bool, False for keys to ignore.

    Returns:
        Attended values; 0 for queries without a visible key.
    """
    windows, prefix = WindowGrid.of(grid, window_size), num_prefix_tokens
    tokens = [split_dim(x[:, :, prefix:], 2, *grid) for x in (q, k, v)]
    queries, keys, values = (windows.split(x).flatten(1, 2) for x in tokens)
    num_windows = keys.shape[1] // q.shape[1]
    seen = None
    if key_mask is not None or windows.reaches_outside(grid):
        on_grid = (
            q.new_ones(len(q), 1, *grid, 1) if key_mask is None else split_dim(key_mask[:, None, prefix:], 2, *grid)
        )
        on_grid = on_grid.reshape(len(q), 1, *grid, 1).to(q.dtype)
        seen = windows.split(on_grid).bool().expand(-1, q.shape[1], -1, -1, -1).flatten(1, 2)[..., 0]
    if to_prefix and prefix:
        keys, values = (
            torch.cat([x[:, :, :prefix].repeat_interleave(num_windows, dim=1), own], dim=2)
            for x, own in ((k, keys), (v, values))
        )
        if seen is not None:
            first = seen.new_ones(len(q), prefix) if key_mask is None else key_mask[:, :prefix]
            seen = torch.cat([first[:, None].expand(-1, seen.shape[1], -1), seen], dim=2)
    out = attend_where(queries, keys, values, seen)
    patches = windows.join(split_dim(out, 1, q.shape[1], num_windows), grid[0]).flatten(1, 2).transpose(1, 2)
    if not prefix:
        return patches
    return torch.cat([softmax_attention(q[:, :, :prefix], k, v, key_mask), patches], dim=2)
