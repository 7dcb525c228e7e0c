"""Bags of windows of slides, whose pixels are read in each pass of a training step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from threading import Lock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perf_vit.data.augmentation import AugmentConfig, draw_zoom, make_augmentation, zoomed_px
from perf_vit.data.bags import EmbeddingStore, SlideBags, SlideTargets
from perf_vit.errors import warn_once
from perf_vit.models import InputCheck, SlideClassificationSpec
from perf_vit.models.read_ahead import Reads, SalvagingReader, Tile, window_batches
from perf_vit.transforms import StainJitter, resize_masked
from perf_vit.types import GeoImage, Window

__all__ = ["SlideWindows", "WindowBags", "WindowBatch", "collate_windows"]


class SlideWindows:
    """Windows of a slide, whose pixels are read when they are needed.

    Lightning would take a dataclass apart.

    Args:
        path: Slide.
        rectangles: Row, column, height and width of each window, [N, 4].
        spec: How the slide is read.
        slide_mpp_override: Micrometres per pixel of level 0, whatever the file states; None to believe it.
        augment: Augmentation of the windows; None for none.
        seed: Seed of the augmentation. A window changes in the same way whenever it is read.
        salvages: Whether damaged pixels count as invalid, with a warning, instead of being an error.
    """

    def __init__(
        self,
        path: str,
        rectangles: npt.NDArray[np.int64],
        spec: SlideClassificationSpec,
        slide_mpp_override: float | None = None,
        *,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        salvages: bool = False,
    ) -> None:
        self.path = path
        self.rectangles = rectangles
        self.spec = spec
        self.slide_mpp_override = slide_mpp_override
        self.augment = augment
        self.seed = seed
        self.salvages = salvages

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
        windows: Iterable[Window] = (Window(*rectangle.tolist()) for rectangle in self.rectangles)
        change: WindowAugmentation | None = None
        reads: Reads = SalvagingReader(source, self._warn) if self.salvages else source
        if self.augment is not None:
            change = WindowAugmentation(self.augment, self.seed, spec.tile_px, len(spec.normalizer.mean))
            windows, reads = (change.zoomed(window, source.extent) for window in windows), change.stained(reads)
        batches = window_batches(reads, spec.normalizer, windows, batch_size, change=change)
        with closing(source), closing(batches):
            yield from batches

    def _warn(self, window: Window, reason: str) -> None:
        warn_once(f"damaged {self.path}", f"damaged pixels of {self.path} count as invalid: {reason}")


class WindowAugmentation:
    """Random changes of windows, which depend on the seed and the place of a window only; for several threads.

    Args:
        config: Augmentation, without `resolution`.
        seed: Seed.
        tile_px: Window size in pixels.
        num_bands: Number of bands.
    """

    def __init__(self, config: AugmentConfig, seed: int, tile_px: int, num_bands: int) -> None:
        self._scale, self._shape = config.scale, (num_bands, tile_px, tile_px)
        self._augmentation = make_augmentation(config)
        self._stain = StainJitter(config.stain) if config.stain else None
        self._seed = seed
        # Augmentations keep the state of their random numbers.
        self._lock = Lock()

    def __call__(self, tile: Tile) -> Tile:
        """Change a standardised window and its valid pixels in the same way, to the size of a tile."""
        if tile.pixels is None:
            return Tile(tile.window, np.zeros(self._shape[1:], bool), np.zeros(self._shape, np.float32))
        pixels, mask = resize_masked(tile.pixels, tile.valid[None], *self._shape[1:])
        no_labels = np.zeros(self._shape[1:], np.uint8)
        with self._lock:
            changed = self._augmentation(pixels, no_labels, seed=self._seed_of(tile.window, 0), mask=mask)
        return Tile(tile.window, changed[2], changed[0])

    def zoomed(self, window: Window, extent: Window) -> Window:
        """Return the larger or smaller window about the centre of one, as far as the slide reaches."""
        tile_px = self._shape[1]
        zoom = draw_zoom(self._scale, np.random.default_rng((self._seed, window.row, window.col, 2)))
        if zoom == 1:
            return window
        size = zoomed_px(tile_px, zoom, extent.shape)
        row = _centred(window.row, tile_px, size, extent.row, extent.height)
        col = _centred(window.col, tile_px, size, extent.col, extent.width)
        return Window(row, col, size, size)

    def stained(self, source: Reads) -> Reads:
        """Return the source with the colours of its windows changed, before they are standardised."""
        return source if self._stain is None else _StainedSource(source, self._changed_stain)

    def _changed_stain(self, image: GeoImage, window: Window) -> GeoImage:
        assert self._stain is not None
        with self._lock:
            return self._stain(image, seed=self._seed_of(window, 1))

    def _seed_of(self, window: Window, number: int) -> int:
        # The seeds of albumentations have 32 bits.
        place = np.random.SeedSequence((self._seed, window.row, window.col, number))
        return int(place.generate_state(1)[0] >> 1)


def _centred(start: int, tile_px: int, size: int, first: int, length: int) -> int:
    """Return the first pixel of a window about the centre of another, moved inside as far as it fits."""
    return max(first, min(start + (tile_px - size) // 2, first + length - size))


class _StainedSource:
    """Source whose windows are changed when they are read."""

    def __init__(self, source: Reads, change: Callable[[GeoImage, Window], GeoImage]) -> None:
        self._source = source
        self._change = change

    def read(self, window: Window) -> GeoImage:
        return self._change(self._source.read(window), window)


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
        seed: Seed of order, windows and augmentation; None to keep the given order.
        augment: Augmentation of the windows; None for none.
        salvages: Whether damaged pixels count as invalid, with a warning, instead of being an error.
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
        augment: AugmentConfig | None = None,
        salvages: bool = False,
    ) -> None:
        super().__init__(slides, store, max_windows=max_windows, seed=seed)
        self.spec = spec
        self.slide_mpp_override = slide_mpp_override
        self.augment = augment
        self.salvages = salvages

    def __getitem__(self, index: int) -> tuple[SlideWindows, Tensor]:
        """Return the windows of a slide and its class index; with a seed, any index >= 0 is allowed."""
        found, kept, label = self._drawn(index)
        rectangles = np.array([[w.row, w.col, w.height, w.width] for w in found.windows], np.int64)
        chosen = rectangles if kept is None else rectangles[kept]
        path = self.slides.paths[self._chosen(index)]
        seed = int(np.random.SeedSequence((self.seed or 0, index)).generate_state(1)[0])
        override, salvages = self.slide_mpp_override, self.salvages
        slide = SlideWindows(path, chosen, self.spec, override, augment=self.augment, seed=seed, salvages=salvages)
        return slide, label


def collate_windows(bags: Sequence[tuple[SlideWindows, Tensor]]) -> WindowBatch:
    """Collate slides and their labels."""
    slides, labels = zip(*bags, strict=True)
    return list(slides), torch.stack(labels)
