"""Tokens of an image that count, and the parts in which they are processed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from perf_vit.ops.streaming import Part

__all__ = ["TokenLayout"]


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Which tokens of a grid count: those with a valid pixel. Only they are stored, row by row, and computed.

    Attributes:
        valid: Tokens that count, bool [rows, columns].
    """

    valid: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        rows, columns = self.valid.shape
        return rows, columns

    @property
    def num_tokens(self) -> int:
        """Number of tokens that count."""
        return int(self.starts[-1])

    @cached_property
    def starts(self) -> Tensor:
        """Number of tokens that count above each row, [rows + 1]."""
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.valid.sum(dim=1).cumsum(0)])

    def parts(self, rows_at_once: int, num_tokens: int) -> Iterator[Part]:
        """Yield parts of about a number of tokens, from top to bottom, without those that hold no token.

        Args:
            rows_at_once: A part begins at a multiple of this number of rows.
            num_tokens: Number of tokens of the grid in a part, at least `rows_at_once` rows.
        """
        rows, columns = self.grid
        step = max(1, num_tokens // (columns * rows_at_once)) * rows_at_once
        for first in range(0, rows, step):
            part = self.part(first, min(first + step, rows))
            if len(part.places):
                yield part

    def part(self, first_row: int, stop_row: int) -> Part:
        """Return the part of some rows."""
        places = self.valid[first_row:stop_row].flatten().nonzero().flatten()
        return Part(first_row, stop_row - first_row, places)

    def tokens(self, part: Part) -> slice:
        """Return where the tokens of a part are among all tokens that count."""
        first = int(self.starts[part.first_row])
        return slice(first, first + len(part.places))

    def places_of(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return row and column in the grid of each token of a part, [n] each."""
        columns = self.grid[1]
        return part.places // columns + part.first_row, part.places % columns

    def places(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return row and column in the grid of tokens given by their index, [n] each."""
        rows = torch.searchsorted(self.starts, tokens, right=True) - 1
        columns = torch.empty_like(rows)
        for row in torch.unique(rows).tolist():
            inside = rows == row
            columns[inside] = self.valid[row].nonzero().flatten()[tokens[inside] - self.starts[row]]
        return rows, columns
