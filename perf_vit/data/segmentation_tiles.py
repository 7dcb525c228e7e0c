"""Tile datasets of segmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from perf_vit.data.augmentation import draw_log_uniform, draw_zoom, zoomed_px
from perf_vit.data.samplers import SegmentationSampler
from perf_vit.labels import LabelSource
from perf_vit.tiling import grid_windows, random_window
from perf_vit.transforms import Augmentation, Normalizer, StainJitter, resize_with_labels
from perf_vit.types import IGNORE_INDEX, BoolArray, GeoImage, LabelArray, Source, Window

__all__ = [
    "LabelledSource",
    "LabelledTile",
    "SegmentationGrid",
    "SegmentationTiles",
]

LabelledTile = tuple[Tensor, Tensor, Tensor]
"""Tile [C, h, w] float32, labels [(K,) h, w] int64, and valid pixels [h, w] bool."""


@dataclass(frozen=True, slots=True)
class LabelledSource:
    """Source with labels on the same pixel grid, and the region to use.

    Attributes:
        source: Source of the pixels.
        labels: Labels on the same grid.
        region: Region of both to use.
        keep_open: Whether to keep the source's file open after a read; False if there may be more sources than the
            limit of open files.
    """

    source: Source
    labels: LabelSource
    region: Window
    keep_open: bool = True

    def has_labels(self, tile_px: int, seed: int = 0) -> bool:
        """Return whether any pixel is valid and labelled.

        Windows are read in random order until one has such a pixel; all are read only if there is none.
        """
        windows = grid_windows(self.region, tile_px, overlap=0)
        for index in np.random.default_rng(seed).permutation(len(windows)):
            window = windows[index]
            labelled = (self.labels.read(window) != IGNORE_INDEX) & _inside(self.region, window)
            # Reading the labels is enough for most windows without any.
            if labelled.any() and (self._pixels(window).valid & labelled).any():
                return True
        return False

    def may_teach(self, window: Window) -> bool:
        """Return whether any pixel of a window is labelled, whatever its validity: reads the labels only."""
        return bool(((self.labels.read(window) != IGNORE_INDEX) & _inside(self.region, window)).any())

    def read(self, window: Window, normalizer: Normalizer) -> tuple[npt.NDArray[np.float32], LabelArray]:
        """Return standardised pixels [C, H, W] and labels [(K,) H, W], `IGNORE_INDEX` where invalid or outside."""
        image, labels = self.read_image(window)
        return normalizer(image), labels

    def read_image(self, window: Window) -> tuple[GeoImage, LabelArray]:
        """Return the source's pixels and the labels of `read`."""
        image = self._pixels(window)
        return image, self._labels_where(image.valid, window, self.labels.read(window))

    def read_labels(self, window: Window) -> LabelArray:
        """Return the labels of `read`; pixels are read only if there are labels."""
        labels = self.labels.read(window)
        if (labels == IGNORE_INDEX).all():
            return labels
        return self._labels_where(self._pixels(window).valid, window, labels)

    def read_reduced(self, max_size_px: int) -> GeoImage:
        """Read the region at lower resolution, for statistics."""
        image = self.source.read_reduced(max_size_px, self.region)
        self._release()
        return image

    def _pixels(self, window: Window) -> GeoImage:
        image = self.source.read(window)
        self._release()
        return image

    def _release(self) -> None:
        if not self.keep_open:
            self.source.close()

    def _labels_where(self, valid: BoolArray, window: Window, labels: LabelArray) -> LabelArray:
        usable = valid & _inside(self.region, window)
        return np.where(usable, labels, np.uint8(IGNORE_INDEX))


def _inside(region: Window, window: Window) -> npt.NDArray[np.bool_]:
    inside = np.zeros(window.shape, bool)
    shared = region.intersect(window)
    if shared is not None:
        inside[shared.slices_in(window)] = True
    return inside


class SegmentationTiles(Dataset[LabelledTile]):
    """Augmented training tiles; item `i` of epoch `e` depends on (seed, e * tiles_per_epoch + i) only.

    Without a sampler, windows are random; those without labelled pixels are drawn again, up to ten times, which is
    enough where most windows have some.

    Args:
        sources: Labelled sources; each gives tiles in proportion to its number of pixels.
        normalizer: Normalizer, applied before augmentation.
        augmentation: Augmentation of image and labels.
        tile_px: Tile size in pixels.
        tiles_per_epoch: Number of tiles per epoch.
        seed: Seed of windows and augmentation, whatever the number of workers.
        scale: Zoom range (min, max). A larger or smaller window is read and resized, up to the size of the region.
        stain: Stain jitter, applied before the normalizer; None for none.
        resolution: Pixel size range (min, max) of tiles, instead of `scale`, in the unit of `pixel_sizes`.
        pixel_sizes: Pixel size of each source; required with `resolution`.
        sampler: Sampler of windows; None for random windows.
    """

    def __init__(
        self,
        sources: Sequence[LabelledSource],
        normalizer: Normalizer,
        augmentation: Augmentation,
        *,
        tile_px: int,
        tiles_per_epoch: int,
        seed: int,
        scale: tuple[float, float] = (1.0, 1.0),
        stain: StainJitter | None = None,
        resolution: tuple[float, float] | None = None,
        pixel_sizes: Sequence[float] | None = None,
        sampler: SegmentationSampler | None = None,
    ) -> None:
        self.sources = tuple(sources)
        areas = [float(source.region.height * source.region.width) for source in self.sources]
        self._shares = np.cumsum(areas) / sum(areas)
        self.normalizer = normalizer
        self.augmentation = augmentation
        self.tile_px = tile_px
        self.tiles_per_epoch = tiles_per_epoch
        self.seed = seed
        self.scale = scale
        self.stain = stain
        self.resolution = resolution
        self.pixel_sizes = pixel_sizes
        self.sampler = sampler

    def __len__(self) -> int:
        return self.tiles_per_epoch

    def __getitem__(self, index: int) -> LabelledTile:
        """Return tile, labels and valid pixels; any index >= 0 is allowed."""
        rng = np.random.default_rng((self.seed, index))
        _, _, image, labels = self._read(index, rng)
        if self.stain is not None:
            image = self.stain(image, int(rng.integers(2**31)))
        pixels, mask, labels = resize_with_labels(
            self.normalizer(image), image.mask, labels, self.tile_px, self.tile_px
        )
        pixels, labels, valid = self.augmentation(pixels, labels, seed=int(rng.integers(2**31)), mask=mask)
        return torch.from_numpy(pixels), torch.from_numpy(labels).long(), torch.from_numpy(valid)

    def describe(self, index: int) -> str:
        """Return image and window of a sample."""
        chosen, window, *_ = self._read(index, np.random.default_rng((self.seed, index)))
        return f"{self.sources[chosen].source.path}, {window}"

    def _read(self, index: int, rng: np.random.Generator) -> tuple[int, Window, GeoImage, LabelArray]:
        """Return a source, a window of it with a label, and what it holds."""
        size_px = self._draw_size(rng)
        for _ in range(10):
            chosen, window = self._draw(index, rng, size_px)
            image, labels = self.sources[chosen].read_image(window)
            if self.sampler is not None or (labels != IGNORE_INDEX).any():
                break
        return chosen, window, image, labels

    def _draw(self, index: int, rng: np.random.Generator, size_px: Callable[[int], int]) -> tuple[int, Window]:
        """Return the index of a source and a window of it."""
        if self.sampler is not None:
            return self.sampler.draw(index, rng, size_px)
        chosen = self._choose(rng)
        return chosen, random_window(self.sources[chosen].region, size_px(chosen), rng)

    def _draw_size(self, rng: np.random.Generator) -> Callable[[int], int]:
        """Draw a zoom or pixel size; return the function from the index of a source to the window size there."""
        if self.resolution is not None:
            pixel_size, own = draw_log_uniform(self.resolution, rng), self.pixel_sizes
            return lambda source: window_px(self.tile_px, pixel_size, None if own is None else own[source])
        zoom = draw_zoom(self.scale, rng)
        return lambda source: zoomed_px(self.tile_px, zoom, self.sources[source].region.shape)

    def _choose(self, rng: np.random.Generator) -> int:
        # A single source needs no random number.
        return 0 if len(self.sources) == 1 else int(np.searchsorted(self._shares, rng.random(), side="right"))


def window_px(tile_px: int, pixel_size: float | None, source_pixel_size: float | None) -> int:
    """Return the window size in source pixels of a tile with a given pixel size; `tile_px` if that is None."""
    if pixel_size is None:
        return tile_px
    assert source_pixel_size is not None
    return max(1, round(tile_px * pixel_size / source_pixel_size))


class SegmentationGrid(Dataset[LabelledTile]):
    """All labelled tiles of a grid over the region, without augmentation; each pixel counts once.

    If there are several, tiles without a labelled pixel are left out: they say nothing and cost a forward pass. Windows
    at the end are shifted back to the edge; pixels already covered by an earlier window are ignored in the
    labels.

    Args:
        source: Labelled source.
        normalizer: Normalizer of the pixels.
        tile_px: Tile size in pixels.
    """

    def __init__(self, source: LabelledSource, normalizer: Normalizer, *, tile_px: int) -> None:
        self.source = source
        self.normalizer = normalizer
        windows = grid_windows(source.region, tile_px, overlap=0)
        self._row_stops = _previous_stops(sorted({w.row for w in windows}), tile_px)
        self._col_stops = _previous_stops(sorted({w.col for w in windows}), tile_px)
        self.windows = [w for w in windows if source.may_teach(w)] if len(windows) > 1 else windows

    def __len__(self) -> int:
        return len(self.windows)

    def describe(self, index: int) -> str:
        """Return image and window of a sample."""
        return f"{self.source.source.path}, {self.windows[index]}"

    def __getitem__(self, index: int) -> LabelledTile:
        """Return tile, labels and valid pixels."""
        window = self.windows[index]
        image, labels = self.source.read_image(window)
        labels[..., : max(0, self._row_stops[window.row] - window.row), :] = IGNORE_INDEX
        labels[..., : max(0, self._col_stops[window.col] - window.col)] = IGNORE_INDEX
        pixels = torch.from_numpy(self.normalizer(image))
        return pixels, torch.from_numpy(labels).long(), torch.from_numpy(image.valid)


def _previous_stops(starts: list[int], size: int) -> dict[int, int]:
    """Map each start to the end of the previous window."""
    return {start: before + size for before, start in zip([starts[0] - size, *starts], starts, strict=False)}
