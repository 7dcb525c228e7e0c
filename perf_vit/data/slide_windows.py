"""Bags of windows of slides, whose pixels are read in each pass of a training step."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perf_vit.data.bags import EmbeddingStore, SlideBags, SlideTargets
from perf_vit.models import InputCheck, SlideClassificationSpec
from perf_vit.models.read_ahead import window_batches
from perf_vit.types import Window

__all__ = ["SlideWindows", "WindowBags", "WindowBatch", "collate_windows"]


class SlideWindows:
    """Windows of a slide, whose pixels are read when they are needed.

    Lightning would take a dataclass apart.

    Args:
        path: Slide.
        rectangles: Row, column, height and width of each window, [N, 4].
        spec: How the slide is read.
        slide_mpp_override: Micrometres per pixel of level 0, whatever the file states; None to believe it.
    """

    def __init__(
        self,
        path: str,
        rectangles: npt.NDArray[np.int64],
        spec: SlideClassificationSpec,
        slide_mpp_override: float | None = None,
    ) -> None:
        self.path = path
        self.rectangles = rectangles
        self.spec = spec
        self.slide_mpp_override = slide_mpp_override

    def __len__(self) -> int:
        return len(self.rectangles)

    def batches(self, batch_size: int) -> Generator[tuple[Tensor, Tensor | None], None, None]:
        """Read the windows in order; threads read ahead.

        Args:
            batch_size: Number of windows in a batch.

        Yields:
            Standardised windows, [B, C, H, W], and their valid pixels, bool [B, H, W], None where all are.

        Raises:
            InputError: The slide can't be read.
        """
        # The encoder sees the glass in a window of tissue, too.
        spec = replace(self.spec, tissue=None)
        source = spec.open(self.path, check=InputCheck(None), slide_mpp_override=self.slide_mpp_override)
        windows = (Window(*rectangle.tolist()) for rectangle in self.rectangles)
        with closing(source), closing(window_batches(source, spec.normalizer, windows, batch_size)) as batches:
            yield from batches


WindowBatch = tuple[Sequence[SlideWindows], Tensor]
"""Slides, and their class indices, [B]."""


class WindowBags(SlideBags):
    """Bags of windows, one per slide; order and drawn windows are those of `SlideBags`.

    Args:
        slides: Slides with their labels.
        store: Store with their windows.
        spec: How the slides are read.
        slide_mpp_override: Micrometres per pixel of level 0, whatever files state.
        max_windows: Maximum number of windows per bag, drawn again each time; None for all.
        seed: Seed of order and windows; None to keep the given order.
    """

    def __init__(
        self,
        slides: SlideTargets,
        store: EmbeddingStore,
        spec: SlideClassificationSpec,
        slide_mpp_override: float | None = None,
        *,
        max_windows: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(slides, store, max_windows=max_windows, seed=seed)
        self.spec = spec
        self.slide_mpp_override = slide_mpp_override

    def __getitem__(self, index: int) -> tuple[SlideWindows, Tensor]:
        """Return the windows of a slide and its class index; with a seed, any index >= 0 is allowed."""
        found, kept, label = self._drawn(index)
        rectangles = np.array([[w.row, w.col, w.height, w.width] for w in found.windows], np.int64)
        chosen = rectangles if kept is None else rectangles[kept]
        return SlideWindows(self.slides.paths[self._chosen(index)], chosen, self.spec, self.slide_mpp_override), label


def collate_windows(bags: Sequence[tuple[SlideWindows, Tensor]]) -> WindowBatch:
    """Collate slides and their labels."""
    slides, labels = zip(*bags, strict=True)
    return list(slides), torch.stack(labels)
