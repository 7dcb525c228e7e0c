"""Tile datasets of image classification and regression."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from perf_vit.data.augmentation import draw_zoom, zoomed_px
from perf_vit.data.base import shuffled_indices
from perf_vit.data.detection_tiles import common_bands, open_closed
from perf_vit.errors import InputError
from perf_vit.labels.tables import ImageTargets
from perf_vit.models import image_tile, middle_window, repeat_grey_band
from perf_vit.models.tiles import reduced, standard_tile
from perf_vit.sources import open_source
from perf_vit.tiling import random_window
from perf_vit.transforms import Augmentation, Normalizer, StainJitter
from perf_vit.types import GeoImage, OpenInput, Source, Window

__all__ = [
    "ClassificationImages",
    "ClassificationSample",
    "ClassificationTiles",
    "ClassificationViews",
]

FloatArray = npt.NDArray[np.float32]

ClassificationSample = tuple[Tensor, Tensor, Tensor]
"""Tile [C, tile_px, tile_px] float32, target, and valid pixels [tile_px, tile_px] bool."""

# Number of random crops to try before the central one.
_TURNS = 10


class ClassificationImages:
    """Labelled images with the same number of bands; grey images among RGB ones are read as three equal bands.

    Args:
        labelled: Labelled images.
        open_input: Function that opens an image by path.

    Raises:
        InputError: There is no image, one can't be opened, or the numbers of bands differ.
    """

    def __init__(self, labelled: ImageTargets, open_input: OpenInput = open_source) -> None:
        if not len(labelled):
            raise InputError("expected labelled images, got none")
        self.labelled = labelled
        self.sources = [open_closed(path, open_input) for path in labelled.paths]
        self.num_bands = common_bands(self.sources)

    def __len__(self) -> int:
        return len(self.sources)

    def read_reduced(self, index: int, max_size_px: int) -> GeoImage:
        """Read an image at lower resolution, for statistics."""
        source = self.sources[index]
        image = repeat_grey_band(source.read_reduced(max_size_px), self.num_bands)
        source.close()
        return image

    def target(self, index: int) -> Tensor:
        """Return the class index, or regression targets [K]."""
        return torch.as_tensor(self.labelled.targets[index])


class ClassificationTiles(Dataset[ClassificationSample]):
    """Augmented training tiles; item i depends on (seed, i) only, whatever the number of workers.

    A tile is a random crop of an image, with a valid pixel if one of ten draws has one, or the whole image resized. A
    zoom of z makes it a crop of tile_px / z pixels, or of 1 / z of the image's sides, resized, as far as the image
    reaches. Each pass shows every image once in random order; if `balanced`, classes are drawn equally often.

    Args:
        images: Labelled images.
        normalizer: Normalizer of the pixels; invalid ones become 0.
        augmentation: Augmentation of the tiles.
        tile_px: Tile size in pixels.
        resize: Whether to resize whole images; otherwise tiles are crops at full resolution.
        tiles_per_epoch: Number of tiles per epoch.
        seed: Seed of order, crops and augmentation.
        balanced: Whether to draw classes equally often; single-label only.
        scale: Zoom range (min, max).
        whole: Whether each tile must hold its whole image; a zoom then cuts nothing off.
        stain: Stain jitter, applied before the normalizer; None for none.
    """

    def __init__(
        self,
        images: ClassificationImages,
        normalizer: Normalizer,
        augmentation: Augmentation,
        *,
        tile_px: int,
        resize: bool,
        tiles_per_epoch: int,
        seed: int,
        balanced: bool = False,
        scale: tuple[float, float] = (1.0, 1.0),
        whole: bool = False,
        stain: StainJitter | None = None,
    ) -> None:
        self.images = images
        self.normalizer = normalizer
        self.augmentation = augmentation
        self.tile_px = tile_px
        self.resize = resize
        self.tiles_per_epoch = tiles_per_epoch
        self.seed = seed
        self.scale = scale
        self.whole = whole
        self.stain = stain
        targets = images.labelled.targets
        self._by_class = [np.flatnonzero(targets == index) for index in np.unique(targets)] if balanced else None

    def __len__(self) -> int:
        return self.tiles_per_epoch

    def describe(self, index: int) -> str:
        """Return the path of the image of a sample."""
        return self.images.sources[self._choose(index, np.random.default_rng((self.seed, index)))].path

    def __getitem__(self, index: int) -> ClassificationSample:
        """Return tile, target and valid pixels; any index >= 0 is allowed."""
        rng = np.random.default_rng((self.seed, index))
        chosen = self._choose(index, rng)
        source = self.images.sources[chosen]
        image = self._read(source, rng)
        source.close()
        stain = None if self.stain is None else partial(self.stain, seed=int(rng.integers(2**31)))
        pixels, mask = standard_tile(image, source.path, self.normalizer, self.tile_px, resize=True, recolor=stain)
        no_labels = np.zeros(pixels.shape[1:], np.uint8)
        pixels, _, valid = self.augmentation(pixels, no_labels, seed=int(rng.integers(2**31)), mask=mask)
        return torch.from_numpy(pixels), self.images.target(chosen), torch.from_numpy(valid)

    def _read(self, source: Source, rng: np.random.Generator) -> GeoImage:
        """Read the whole image, or a random crop with a valid pixel; the central crop if several draws have none."""
        zoom = draw_zoom(self.scale, rng)
        if self.resize:
            return reduced(source, self.tile_px, _part(source, zoom, rng) if zoom > 1 else None)
        size_px = zoomed_px(self.tile_px, zoom, source.size)
        if self.whole:
            return source.read(middle_window(source, max(size_px, *source.size)))
        for _ in range(_TURNS):
            image = source.read(random_window(source.extent, size_px, rng))
            if image.valid.any():
                return image
        return source.read(middle_window(source, size_px))

    def _choose(self, index: int, rng: np.random.Generator) -> int:
        if self._by_class is not None:
            return int(rng.choice(self._by_class[int(rng.integers(len(self._by_class)))]))
        turn, position = divmod(index, len(self.images))
        return int(shuffled_indices(self.seed, turn, len(self.images))[position])


def _part(source: Source, zoom: float, rng: np.random.Generator) -> Window:
    """Draw a window whose sides are 1 / zoom of the image's."""
    height, width = (max(1, round(side / zoom)) for side in source.size)
    row, col = int(rng.integers(source.height - height + 1)), int(rng.integers(source.width - width + 1))
    return Window(row, col, height, width)


class ClassificationViews(Dataset[ClassificationSample]):
    """One tile per image as in prediction: the central crop, or the whole image resized.

    Args:
        images: Labelled images.
        normalizer: Normalizer of the pixels; invalid ones become 0.
        tile_px: Tile size in pixels.
        resize: Whether to resize whole images; otherwise tiles are crops at full resolution.
        whole: Whether each tile must hold its whole image.
    """

    def __init__(
        self, images: ClassificationImages, normalizer: Normalizer, *, tile_px: int, resize: bool, whole: bool = False
    ) -> None:
        self.images = images
        self.normalizer = normalizer
        self.tile_px = tile_px
        self.resize = resize
        self.whole = whole

    def __len__(self) -> int:
        return len(self.images)

    def describe(self, index: int) -> str:
        """Return the path of an image."""
        return self.images.sources[index].path

    def __getitem__(self, index: int) -> ClassificationSample:
        """Return tile, target and valid pixels."""
        source = self.images.sources[index]
        place = None if self.resize else middle_window(source, self.tile_px, whole=self.whole)
        pixels, valid = image_tile(source, self.normalizer, self.tile_px, place)
        source.close()
        return torch.from_numpy(pixels), self.images.target(index), torch.from_numpy(valid)
