"""Scores of a segmentation head over parts of an image whose tokens were streamed."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from perf_vit.errors import CheckpointError
from perf_vit.models.heads import LinearHead
from perf_vit.models.heads.parts import GridPart, Reach, reach_of
from perf_vit.streaming.forward import num_passes, window_heights
from perf_vit.streaming.tokens import StreamedTokens
from perf_vit.types import Window

__all__ = ["PART_PX", "DenseHead"]

PART_PX = 2**20
"""Pixels of a part with its margins: decoders take 0.4 to 0.6 GB for them."""


class DenseHead:
    """Head of a segmentation network, over one part of an image after the other.

    Args:
        segmenter: Network with `backbone` and `head`, on the CPU.

    Attributes:
        vit: ViT of the backbone.
        indices: Blocks whose tokens the head takes, from 0, in their order.
        patch: Height and width of a token in pixels.
        reach: How far the head looks.
        is_linear: Whether it only classifies tokens.

    Raises:
        CheckpointError: The head needs the whole image at once, or the backbone isn't a plain ViT.
    """

    def __init__(self, segmenter: Any) -> None:
        backbone, head = getattr(segmenter, "backbone", None), getattr(segmenter, "head", None)
        if not isinstance(backbone, FeatureGetterNet) or not isinstance(head, nn.Module):
            found = type(segmenter if backbone is None else backbone).__name__
            raise CheckpointError(
                f"the network must be a plain ViT of perf_vit with a head to run over a whole image, got {found}; "
                "predict in windows without `whole`"
            )
        self.vit: Any = backbone.model
        self.reach: Reach = reach_of(head)
        self.patch: tuple[int, int] = tuple(self.vit.patch_embed.patch_size)
        self.indices = tuple(sorted(index % len(self.vit.blocks) for index in backbone.out_indices))
        self._head, self._norm = head, bool(backbone.norm)
        self.is_linear = isinstance(head, LinearHead)
        self._takes_part = "part" in inspect.signature(head.forward).parameters

    @property
    def num_trips(self) -> int:
        """How often a map goes over the image or its tokens: to embed them, in each block, and for the head."""
        return 1 + num_passes(self._blocks()) + 1

    def num_files(self, *, in_place: bool) -> int:
        """Return the number of files of all tokens at a time.

        Args:
            in_place: Whether blocks replace their input, as without a journal.
        """
        if in_place:
            return len(self.indices)
        # Of each block: what is kept before it, its input, its output.
        return max(
            len({*(each for each in self.indices if each < index), index - 1}) + 1
            for index in range(len(self._blocks()))
        )

    def rows_at_once(self, grid: tuple[int, int]) -> int:
        """Return the number of rows of tokens that a part has at least."""
        return max(window_heights(self._blocks(), grid), default=1)

    def _blocks(self) -> list[Any]:
        return list(self.vit.blocks)[: self.indices[-1] + 1]

    def part_size(self, most_rows_px: int) -> tuple[int, int]:
        """Return rows and columns of a part in tokens, without margins.

        Args:
            most_rows_px: Most rows of a part in pixels, as far as margins allow.
        """
        step = self.reach.multiple
        around = 2 * self.reach.margin + step - 1
        side = int((PART_PX / (self.patch[0] * self.patch[1])) ** 0.5)
        rows = max(1, min(side - around, most_rows_px // self.patch[0]) // step) * step
        columns = max(1, (side * side // (rows + around) - around) // step) * step
        return rows, columns

    def with_margin(self, part: Window, grid: tuple[int, int]) -> Window:
        """Return the window of tokens that the scores of a part depend on."""
        margin, step = self.reach.margin, self.reach.multiple
        row, column = (max(0, first - margin) // step * step for first in (part.row, part.col))
        row_stop, column_stop = (
            min(stop + margin, total) for stop, total in zip((part.row_stop, part.col_stop), grid, strict=True)
        )
        return Window(row, column, row_stop - row, column_stop - column)

    def in_pixels(self, window: Window) -> Window:
        """Return the pixels of a window of tokens."""
        height, width = self.patch
        return Window(window.row * height, window.col * width, window.height * height, window.width * width)

    @torch.no_grad()
    def scores(self, tokens: Sequence[StreamedTokens], part: Window, pixels: Tensor) -> Tensor:
        """Compute the scores of a part.

        Args:
            tokens: Tokens after each block of `indices`, of one process.
            part: Part of the grid; its first row and column are multiples of `reach.multiple`.
            pixels: Input of the network in the pixels of `with_margin`, [1, C, h, w].

        Returns:
            Scores, [K, h, w], equal up to rounding to those of a forward pass of the whole image.
        """
        grid = tokens[0].layout.grid
        outer = self.with_margin(part, grid)
        maps = [each.window(outer, norm=self._norm)[None] for each in tokens]
        options = {"part": GridPart(outer, grid)} if self._takes_part else {}
        found: Tensor = self._head(maps, pixels.to(maps[0].dtype), **options)
        return found[0, :, *self.in_pixels(part).slices_in(self.in_pixels(outer))]
