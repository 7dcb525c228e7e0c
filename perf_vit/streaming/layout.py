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
    """Which tokens of a grid count: those with a valid pixel. They are stored, row by row, and computed.

    Tokens around them may be computed too, as queries that nothing attends to. Of several processes, each has a stripe
    of rows.

    Attributes:
        valid: Tokens that count, bool [rows, columns].
        first_row: First row of the stripe of this process.
        stop_row: First row below it; None for all rows.
        stored: Tokens that are stored, bool [rows, columns]; None for those that count.
    """

    valid: Tensor
    first_row: int = 0
    stop_row: int | None = None
    stored: Tensor | None = None

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

    @property
    def num_stored(self) -> int:
        """Number of stored tokens of the stripe of this process."""
        first, stop = self.stripe
        return int(self.stored_starts[stop] - self.stored_starts[first])

    @cached_property
    def starts(self) -> Tensor:
        """Number of tokens that count above each row, [rows + 1]."""
        return _number_above(self.valid)

    @cached_property
    def stored_starts(self) -> Tensor:
        """Number of stored tokens above each row, [rows + 1]."""
        return self.starts if self.stored is None else _number_above(self.stored)

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
        valid = self.valid[first_row:stop_row].flatten()
        if self.stored is None:
            return Part(first_row, stop_row - first_row, valid.nonzero().flatten())
        places = self.stored[first_row:stop_row].flatten().nonzero().flatten()
        counted = valid[places]
        return Part(first_row, stop_row - first_row, places, None if bool(counted.all()) else counted)

    def tokens(self, part: Part) -> slice:
        """Return where the tokens of a part are among the stored ones of this stripe."""
        first = int(self.stored_starts[part.first_row] - self.stored_starts[self.first_row])
        return slice(first, first + len(part.places))

    def stored_at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return where the tokens at places are among the stored ones of this stripe, [n]."""
        stored, found = self.valid if self.stored is None else self.stored, torch.empty_like(rows)
        for row in torch.unique(rows).tolist():
            inside = rows == row
            found[inside] = self.stored_starts[row] + stored[row].cumsum(0)[columns[inside]] - 1
        return found - self.stored_starts[self.first_row]

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


def _number_above(tokens: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), tokens.sum(dim=1).cumsum(0)])
