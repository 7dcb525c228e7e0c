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

    Of several processes, each has a stripe of rows.

    Attributes:
        valid: Tokens that count, bool [rows, columns].
        first_row: First row of the stripe of this process.
        stop_row: First row below it; None for all rows.
    """

    valid: Tensor
    first_row: int = 0
    stop_row: int | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        rows, columns = self.valid.shape
        return rows, columns

    @property
    def num_tokens(self) -> int:
        """Number of tokens that count, in all stripes."""
        return int(self.starts[-1])

    @property
    def stripe(self) -> tuple[int, int]:
        """First row of the stripe of this process, and the first below it."""
        return self.first_row, len(self.valid) if self.stop_row is None else self.stop_row

    @property
    def own_tokens(self) -> range:
        """Which of all tokens that count are in the stripe of this process."""
        first, stop = (int(self.starts[row]) for row in self.stripe)
        return range(first, stop)

    @cached_property
    def starts(self) -> Tensor:
        """Number of tokens that count above each row, [rows + 1]."""
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.valid.sum(dim=1).cumsum(0)])

    def parts(self, rows_at_once: int, num_tokens: int) -> Iterator[Part]:
        """Yield parts of this stripe of about a number of tokens, from top to bottom, without those that hold no token.

        Args:
            rows_at_once: A part begins at a multiple of this number of rows.
            num_tokens: Number of tokens of the grid in a part, at least `rows_at_once` rows.
        """
        columns, stop = self.grid[1], self.stripe[1]
        step = max(1, num_tokens // (columns * rows_at_once)) * rows_at_once
        for first in range(self.first_row, stop, step):
            part = self.part(first, min(first + step, stop))
            if len(part.places):
                yield part

    def part(self, first_row: int, stop_row: int) -> Part:
        """Return the part of some rows."""
        places = self.valid[first_row:stop_row].flatten().nonzero().flatten()
        return Part(first_row, stop_row - first_row, places)

    def tokens(self, part: Part) -> slice:
        """Return where the tokens of a part are among those of this stripe."""
        first = int(self.starts[part.first_row] - self.starts[self.first_row])
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
