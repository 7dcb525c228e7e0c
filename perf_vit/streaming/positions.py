"""Position embeddings of some tokens of an image, without those of all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perf_vit.conversion.native_size import native_size_of, period_of

__all__ = ["AbsolutePositions", "RotaryPositions"]


class AbsolutePositions:
    """Learned position embeddings, resampled to a grid as timm does: bicubic and antialiased.

    The resampling is separable, so columns are resampled once and rows when they are needed. Those of a model with a
    native size are resampled to a window and repeat.

    Args:
        model: timm's `VisionTransformer` or `Eva`.
        grid: Rows and columns of tokens.
    """

    def __init__(self, model: Any, grid: tuple[int, int]) -> None:
        table = model.pos_embed
        first = 0 if model.no_embed_class else model.num_prefix_tokens
        self.prefix = table[0, :first]
        old = model.patch_embed.grid_size
        # [C, old rows, old columns]
        plane = table[0, first:].view(*old, -1).permute(2, 0, 1)
        self._dtype = table.dtype
        self._period = period_of(grid, native_size_of(model))
        if tuple(old) == tuple(self._period):
            self._rows, self._weights = plane, None
            return
        self._rows = plane.float() @ _resampling(old[1], self._period[1]).mT
        self._weights = _resampling(old[0], self._period[0])

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the embeddings of tokens at some rows and columns, [n, C]."""
        rows, columns = rows % self._period[0], columns % self._period[1]
        if self._weights is None:
            return self._rows[:, rows, columns].mT
        # Few rows are asked for at a time.
        asked, index = torch.unique(rows, return_inverse=True)
        resampled = torch.einsum("ro,com->crm", self._weights[asked], self._rows)
        return resampled[:, index, columns].mT.to(self._dtype)


class RotaryPositions:
    """Axial rotary embeddings: each channel depends on the row or on the column of a token.

    Args:
        rope: timm's rotary embedding module.
        grid: Rows and columns of tokens.

    Raises:
        ValueError: A channel depends on both, or positions depend on the size of the grid.
    """

    def __init__(self, rope: Any, grid: tuple[int, int]) -> None:
        rows, columns = grid
        if getattr(rope, "pos_embed", None) is not None:
            raise ValueError(
                f"{type(rope).__name__} holds positions of one image size; expected a model with dynamic_img_size=True"
            )
        self._by_row, self._by_column = rope.get_embed(shape=(rows, 1)), rope.get_embed(shape=(1, columns))
        corner = rope.get_embed(shape=(min(rows, 2), min(columns, 2))).view(min(rows, 2), min(columns, 2), -1)
        self._is_row = (self._by_row != self._by_row[:1]).any(0)
        expected = self.at(*torch.meshgrid(torch.arange(corner.shape[0]), torch.arange(corner.shape[1]), indexing="ij"))
        if not torch.equal(expected, corner):
            raise ValueError(
                f"{type(rope).__name__} must be axial with positions that count patches, so that parts of an image can "
                "be embedded; use a model with absolute positions or rope_type='cat'"
            )

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the embeddings of tokens at some rows and columns, [.., 2 x D]."""
        return torch.where(self._is_row, self._by_row[rows], self._by_column[columns])


def _resampling(old: int, new: int) -> Tensor:
    """Return the matrix that resamples `old` values to `new` ones, [new, old], as timm resamples positions."""
    one_hot = torch.eye(old)[None, None]
    return F.interpolate(one_hot, size=(old, new), mode="bicubic", antialias=True)[0, 0].mT
