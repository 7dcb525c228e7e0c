"""Tokens of an image after a block of a ViT."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perf_vit.errors import OptionError
from perf_vit.streaming.layout import TokenLayout
from perf_vit.streaming.processes import Processes
from perf_vit.streaming.store import TokenStore
from perf_vit.types import Window

__all__ = ["PART_TOKENS", "READ_PARTS", "StreamedTokens"]

PART_TOKENS = 2**12
"""Tokens of a part of a block: a tenth faster than parts of 2**14, whose hidden layers leave a CPU's caches."""

READ_PARTS = 4
"""Parts whose pixels are read at once: tiles of files are taller than rows of tokens."""


@dataclass(frozen=True, eq=False)
class StreamedTokens:
    """Tokens of an image after a block, before the model's last norm.

    Attributes:
        prefix: Class and register tokens, [P, C].
        store: Tokens with a valid pixel.
        layout: Where they are.
        norm: Last norm of the model.
        processes: Processes that share the image; each has the tokens of its stripe of rows.
    """

    prefix: Tensor
    store: TokenStore
    layout: TokenLayout
    norm: nn.Module
    processes: Processes

    @torch.no_grad()
    def normed_prefix(self) -> Tensor:
        """Return the class and register tokens after the last norm, [P, C]."""
        normed: Tensor = self.norm(self.prefix)
        return normed

    @torch.no_grad()
    def rows(self, first_row: int, stop_row: int, *, norm: bool = True) -> Tensor:
        """Return rows of this process's stripe as a map, 0 where no pixel is valid, [C, rows, columns].

        Raises:
            OptionError: The rows aren't within the stripe, which is the whole grid of a single process.
        """
        first, stop = self.layout.stripe
        if not first <= first_row < stop_row <= stop:
            raise OptionError(
                f"rows must be within {first} to {stop}, which this process has, got {first_row} to {stop_row}"
            )
        return self.window(Window(first_row, 0, stop_row - first_row, self.layout.grid[1]), norm=norm)

    @torch.no_grad()
    def window(self, window: Window, *, norm: bool = True) -> Tensor:
        """Return rows and columns of this process's stripe as a map, 0 where no token is stored, [C, h, w]."""
        part, columns = self.layout.part(window.row, window.row_stop), self.layout.grid[1]
        row, column = part.places // columns, part.places % columns - window.col
        inside = (column >= 0) & (column < window.width)
        tokens = inside.nonzero().flatten() + self.layout.tokens(part).start
        x = self.store.read(tokens)
        x = self.norm(x) if norm else x
        plane = x.new_zeros(window.height * window.width, x.shape[1])
        plane[(row * window.width + column)[inside]] = x
        return plane.mT.reshape(-1, *window.shape)

    @torch.no_grad()
    def mean(self) -> Tensor:
        """Return the mean of all tokens after the last norm, [C]; all processes must call it."""
        total = torch.zeros(self.prefix.shape[-1], dtype=torch.float64)
        for part in self.layout.parts(1, PART_TOKENS):
            x = self.store.read(self.layout.tokens(part))
            total += self.norm(x if part.counted is None else x[part.counted]).sum(dim=0, dtype=torch.float64)
        return (self.processes.reduce(total, "sum") / self.layout.num_tokens).to(self.prefix.dtype)
