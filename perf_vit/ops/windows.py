"""Tokens of a 2-D grid, row by row, brought into the order of windows and back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["from_windows", "num_windows", "to_windows", "window_numbers"]


def num_windows(grid: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of windows that cover a grid of (rows, columns) tokens; the last ones may reach beyond it."""
    return -(-grid[0] // window[0]), -(-grid[1] // window[1])


def to_windows(x: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """[B, H, rows x columns, C] -> [windows, B, H, tokens of a window, C].

    What of the windows lies beyond the grid is zeros (False).
    """
    batch, heads, _, channels = x.shape
    rows, columns = num_windows(grid, window)
    x = x.reshape(batch, heads, *grid, channels)
    padding = (0, 0, 0, columns * window[1] - grid[1], 0, rows * window[0] - grid[0])
    if any(padding):
        x = F.pad(x, padding)
    x = x.reshape(batch, heads, rows, window[0], columns, window[1], channels)
    return x.permute(2, 4, 0, 1, 3, 5, 6).reshape(rows * columns, batch, heads, -1, channels)


def from_windows(x: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """The inverse of `to_windows`: what lies beyond the grid is dropped."""
    rows, columns = num_windows(grid, window)
    _, batch, heads, _, channels = x.shape
    x = x.reshape(rows, columns, batch, heads, *window, channels).permute(2, 3, 0, 4, 1, 5, 6)
    x = x.reshape(batch, heads, rows * window[0], columns * window[1], channels)
    return x[:, :, : grid[0], : grid[1]].reshape(batch, heads, -1, channels)


def window_numbers(grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """Number of the window that each token of the grid lies in, [rows x columns]."""
    columns = num_windows(grid, window)[1]
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return (row // window[0] * columns + column // window[1]).flatten()
