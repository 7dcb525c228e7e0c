"""A 2-D grid of tokens, row by row, cut into windows of nearly equal size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["WindowGroup", "even_window", "from_windows", "group_windows", "to_windows", "window_numbers"]


@dataclass(frozen=True)
class WindowGroup:
    """Windows that are worked on together: a rectangle of the grid, and the size of its windows.

    Attributes:
        rows: rows of the grid.
        columns: columns of the grid.
        window: rows and columns of a window; the last ones of the rectangle may reach beyond it.
    """

    rows: slice
    columns: slice
    window: tuple[int, int]

    @property
    def num_windows(self) -> int:
        """How many windows cover the rectangle."""
        return _count(self.size, self.window)[0] * _count(self.size, self.window)[1]

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the rectangle."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


def even_window(grid: tuple[int, int], largest: int) -> tuple[int, int]:
    """Rows and columns of the windows when each side has the fewest of `largest` or less, as equal as they can be.

    37 tokens in windows of 16 at most are 13 + 13 + 11, not 16 + 16 + 5.
    """
    return _even(grid[0], largest), _even(grid[1], largest)


def group_windows(grid: tuple[int, int], window: tuple[int, int], max_windows: int) -> list[WindowGroup]:
    """Groups of at most `max_windows` windows each, row by row, that cover the grid."""
    rows, columns = _count(grid, window)
    wide = _even(columns, max_windows) * window[1]
    high = _even(rows, max(1, max_windows // columns)) * window[0]
    groups = []
    for top in range(0, grid[0], high):
        rows = slice(top, min(top + high, grid[0]))
        # A last row of windows that is cut has no rows to fill up, where it is alone in its group.
        height = min(window[0], rows.stop - rows.start)
        for left in range(0, grid[1], wide):
            groups.append(WindowGroup(rows, slice(left, min(left + wide, grid[1])), (height, window[1])))
    return groups


def to_windows(x: Tensor, grid: tuple[int, int], group: WindowGroup, fill: float = 0.0) -> Tensor:
    """Tokens of a grid, [B, H, rows x columns, C] -> those of a group's windows, [B, H, windows x tokens, C].

    What of the windows lies beyond the rectangle is `fill`.
    """
    batch, heads, _, channels = x.shape
    x = x.unflatten(2, grid)[:, :, group.rows, group.columns]
    (rows, columns), window = _count(group.size, group.window), group.window
    padding = (0, 0, 0, columns * window[1] - x.shape[3], 0, rows * window[0] - x.shape[2])
    if any(padding):
        x = F.pad(x, padding, value=fill)
    x = x.reshape(batch, heads, rows, window[0], columns, window[1], channels)
    return x.transpose(3, 4).reshape(batch, heads, -1, channels)


def from_windows(x: Tensor, group: WindowGroup) -> Tensor:
    """A group's windows, [B, H, windows x tokens, C] -> its rectangle, [B, rows, columns, H, C]."""
    batch, heads, _, channels = x.shape
    rows, columns = _count(group.size, group.window)
    x = x.reshape(batch, heads, rows, columns, *group.window, channels).permute(0, 2, 4, 3, 5, 1, 6)
    x = x.reshape(batch, rows * group.window[0], columns * group.window[1], heads, channels)
    return x[:, : group.size[0], : group.size[1]]


def window_numbers(grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """Number of the window that each token of the grid lies in, [rows x columns]."""
    columns = _count(grid, window)[1]
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return (row // window[0] * columns + column // window[1]).flatten()


def _even(number: int, most: int) -> int:
    """The largest of the fewest parts of `most` or less, as equal as they can be."""
    return -(-number // -(-number // most))


def _count(grid: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    return -(-grid[0] // window[0]), -(-grid[1] // window[1])
