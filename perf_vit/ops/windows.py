"""Windows of nearly equal size on a 2-D grid of tokens in row-major order."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["WindowGroup", "from_windows", "group_windows", "split_dim", "to_windows", "window_indices"]


@dataclass(frozen=True)
class WindowGroup:
    """Windows of one size that are processed together: a rectangle of the grid.

    Attributes:
        rows: Rows of the grid.
        columns: Columns of the grid.
        window: Rows and columns of a window, which divide those of the rectangle.
    """

    rows: slice
    columns: slice
    window: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and columns of windows."""
        rows, columns = self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
        return rows // self.window[0], columns // self.window[1]

    @property
    def size(self) -> tuple[int, ...]:
        """Sizes that determine the memory of a group."""
        return *self.shape, *self.window


def group_windows(grid: tuple[int, int], largest: tuple[int, int], max_windows: int) -> list[WindowGroup]:
    """Split a grid into groups of at most `max_windows` windows each, in row-major order.

    Rows and columns are split into the fewest windows of at most `largest`, whose sizes differ by at most 1: 37 tokens
    with windows of at most 16 are split into 13 + 12 + 12, not 16 + 16 + 5. The windows of a group have one size.
    """
    columns = _spans(grid[1], largest[1], max_windows)
    most = max(1, max_windows // max((span.stop - span.start) // width for span, width in columns))
    return [
        WindowGroup(rows, part, (height, width))
        for rows, height in _spans(grid[0], largest[0], most)
        for part, width in columns
    ]


def to_windows(x: Tensor, grid: tuple[int, int], groups: list[WindowGroup]) -> list[Tensor]:
    """Return views of the windows of each group, [B, H, .., .., h, w, C], given a grid, [B, H, rows x columns, C].

    The dots are the rows and columns of windows, h and w the rows and columns of a window. The groups must cover the
    grid in the order of `group_windows`. The tensor is split instead of sliced: gradients of slices would be summed as
    one full-size tensor per group.
    """
    heights = {group.rows.start: group.rows.stop - group.rows.start for group in groups}
    widths = {group.columns.start: group.columns.stop - group.columns.start for group in groups}
    parts: list[Tensor] = []
    for band in torch.split(split_dim(x, 2, *grid), list(heights.values()), dim=2):
        parts.extend(torch.split(band, list(widths.values()), dim=3))
    return [
        split_dim(split_dim(part, 3, -1, group.window[1]), 2, -1, group.window[0]).transpose(3, 4)
        for part, group in zip(parts, groups, strict=True)
    ]


def from_windows(x: Tensor, group: WindowGroup) -> Tensor:
    """Arrange a group's windows, [B, H, windows x tokens, C], as its rectangle, [B, rows, columns, H, C]."""
    x = split_dim(x, 2, *group.shape, *group.window).permute(0, 2, 4, 3, 5, 1, 6)
    return x.flatten(3, 4).flatten(1, 2)


def split_dim(x: Tensor, dim: int, *sizes: int) -> Tensor:
    """Return a view with one dimension split into several."""
    return x.view(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def window_indices(grid: tuple[int, int], largest: tuple[int, int]) -> Tensor:
    """Return the index of the window of `group_windows` that holds each token of the grid, [rows x columns]."""
    row, column = (
        torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        for sizes in (_window_sizes(length, most) for length, most in zip(grid, largest, strict=True))
    )
    return (row[:, None] * grid[1] + column).flatten()


def _window_sizes(length: int, largest: int) -> list[int]:
    number = -(-length // largest)
    return [length // number + (place < length % number) for place in range(number)]


def _spans(length: int, largest: int, most: int) -> list[tuple[slice, int]]:
    """Return runs of at most `most` windows of one size that cover `length` tokens, with that size."""
    spans, start = [], 0
    for size, of_size in itertools.groupby(_window_sizes(length, largest)):
        number = len(list(of_size))
        for run in _window_sizes(number, most):
            spans.append((slice(start, start + run * size), size))
            start += run * size
    return spans
