"""Windows of equal size on a 2-D grid of tokens in row-major order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["WindowGrid", "attend_where", "check_grid", "row_windows", "split_dim", "split_rows", "window_indices"]

_ROW_TOKENS = 1024
"""Queries that are processed together where there are no windows."""


@dataclass(frozen=True)
class WindowGrid:
    """Windows of height x width tokens that cover rows of `columns` tokens; the last ones may reach past the grid.

    Attributes:
        columns: Columns of the grid.
        height: Rows of a window.
        width: Columns of a window.
    """

    columns: int
    height: int
    width: int

    @classmethod
    def of(cls, grid: tuple[int, int], window_size: int) -> WindowGrid:
        """Return the fewest windows of at most `window_size` tokens a side: 37 tokens with 16 are 13 + 13 + 11."""
        rows, columns = (_ceil(length, _ceil(length, window_size)) for length in grid)
        return cls(grid[1], rows, columns)

    @property
    def across(self) -> int:
        """Number of windows in a row of windows."""
        return _ceil(self.columns, self.width)

    def reaches_outside(self, grid: tuple[int, int]) -> bool:
        """Return whether windows reach outside a grid; True where torch.compile may not know its size."""
        return torch.compiler.is_compiling() or bool(grid[0] % self.height or grid[1] % self.width)

    def split(self, *parts: Tensor) -> Tensor:
        """Join columns of rows of tokens, and arrange them as windows.

        Tokens of a window that lie outside the grid are 0.

        Args:
            parts: Columns of the tokens, [B, H, rows, columns, c] each.

        Returns:
            [B, H, W, height x width, C], C being the sum of all c.
        """
        rows = parts[0].shape[2]
        down = _ceil(rows, self.height)
        missing = (0, 0, 0, self.across * self.width - self.columns, 0, down * self.height - rows)
        if torch.compiler.is_compiling() or any(missing):
            parts = (F.pad(torch.cat(parts, dim=-1), missing),)
        sizes = (down, self.height, self.across, self.width)
        # One copy both joins and arranges.
        by_window = [x.view(*x.shape[:2], *sizes, x.shape[-1]).transpose(3, 4) for x in parts]
        x = torch.cat(by_window, dim=-1) if len(parts) > 1 else by_window[0]
        return x.reshape(*x.shape[:2], down * self.across, self.height * self.width, x.shape[-1])

    def write(self, x: Tensor, out: Tensor) -> None:
        """Write rows of tokens, [B, H, rows, columns, C], into windows, [B, H, W, height x width, C].

        The values of `out` outside the grid stay as they are.
        """
        for rows, windows in self._parts(x, out):
            windows.copy_(rows)

    def read(self, x: Tensor, out: Tensor) -> None:
        """Write windows, [B, H, W, height x width, C], into rows of tokens, [B, H, rows, columns, C]."""
        for rows, windows in self._parts(out, x):
            rows.copy_(windows)

    def _parts(self, rows: Tensor, windows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield views of one shape of both, for the windows of each size."""
        down = _ceil(rows.shape[2], self.height)
        windows = split_dim(split_dim(windows, 3, self.height, self.width), 2, down, self.across).transpose(3, 4)
        for high in _full_and_rest(rows.shape[2], self.height):
            for wide in _full_and_rest(self.columns, self.width):
                part = rows[:, :, high.tokens, wide.tokens]
                part = split_dim(split_dim(part, 3, -1, wide.size), 2, -1, high.size)
                yield part, windows[:, :, high.windows, : high.size, wide.windows, : wide.size]

    def join(self, x: Tensor, rows: int) -> Tensor:
        """Arrange windows as rows of tokens, [B, H, W, height x width, C] -> [B, rows, columns, H, C]."""
        B, H, C = *x.shape[:2], x.shape[-1]
        x = x.view(B, H, -1, self.across, self.height, self.width, C).permute(0, 2, 4, 3, 5, 1, 6)
        return x.flatten(3, 4).flatten(1, 2)[:, :rows, : self.columns]


def attend_where(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """Softmax attention within windows, [B, W, n, D], to keys that are seen, [B, W, n]; 0 where none is."""
    if seen is None:
        return F.scaled_dot_product_attention(q, k, v)
    hidden = ~seen[..., None]
    k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    # A window without visible keys sees all of them: their values are 0.
    mask = seen | ~seen.any(dim=2, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(2))


def row_windows(grid: tuple[int, int]) -> WindowGrid:
    """Return whole rows, for queries without windows."""
    return WindowGrid(grid[1], min(grid[0], max(1, _ROW_TOKENS // grid[1])), grid[1])


def split_rows(x: Tensor | None, grid: tuple[int, int], rows: int) -> list[Any]:
    """Split [B, H, n, C] into chunks of rows, [B, H, rows, columns, C]; None gives [None]."""
    return [None] if x is None else list(torch.split(split_dim(x, 2, *grid), rows, dim=2))


def window_indices(grid: tuple[int, int], window_size: int) -> Tensor:
    """Return the index of the window that holds each token of the grid, [rows x columns]."""
    windows = WindowGrid.of(grid, window_size)
    row, column = torch.arange(grid[0]) // windows.height, torch.arange(grid[1]) // windows.width
    return (row[:, None] * windows.across + column).flatten()


def check_grid(
    q: Tensor, k: Tensor, grid: tuple[int, int], window_size: int, num_sinks: int, num_prefix_tokens: int
) -> None:
    """Check that queries, keys, grid and sizes are consistent.

    Raises:
        ValueError: q and k differ in shape, a size is negative, or the grid doesn't match the number of tokens.
    """
    if q.shape != k.shape:
        raise ValueError(f"q and k must have one shape [B, H, N, D], got {list(q.shape)} and {list(k.shape)}")
    if min(window_size, num_sinks, num_prefix_tokens) < 0:
        raise ValueError(
            "window_size, num_sinks and num_prefix_tokens must be 0 or more, "
            f"got {window_size}, {num_sinks} and {num_prefix_tokens}"
        )
    if not isinstance(grid, tuple | list) or len(grid) != 2 or min(grid) < 1:
        raise ValueError(
            f"grid must be (rows, columns) of the patches, each 1 or more, got {grid!r}; {num_prefix_tokens} prefix "
            f"tokens come before the patches, rows x columns = {q.shape[2] - num_prefix_tokens}"
        )
    expected = num_prefix_tokens + grid[0] * grid[1]
    if q.shape[2] != expected:
        raise ValueError(
            f"{num_prefix_tokens} prefix tokens and a grid of {grid[0]} x {grid[1]} are {expected} tokens, got "
            f"{q.shape[2]}; pass grid=(rows, columns) of the patches"
        )


def split_dim(x: Tensor, dim: int, *sizes: int) -> Tensor:
    """Return a view with one dimension split into several."""
    return x.view(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


@dataclass(frozen=True)
class _Part:
    """Windows of one size along one side of a grid: their tokens, which windows they are, and their size."""

    tokens: slice
    windows: slice
    size: int


def _full_and_rest(length: int, size: int) -> list[_Part]:
    """Return the whole windows of `length` tokens, and the last one where it reaches outside."""
    # Sizes are tensors under torch.jit.trace.
    number, rest = divmod(int(length), size)
    parts = [_Part(slice(0, number * size), slice(0, number), size)] if number else []
    return [*parts, _Part(slice(number * size, length), slice(number, number + 1), rest)] if rest else parts


def _ceil(length: int, size: int) -> int:
    return -(-length // size)
