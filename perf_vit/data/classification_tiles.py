"""Datasets of whole images with one label each, as tiles of one size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from perf_vit.data.base import order_of_turn
from perf_vit.data.detection_tiles import common_bands, open_closed
from perf_vit.errors import InputError
from perf_vit.labels.tables import ImageTargets
from perf_vit.sources import open_source
from perf_vit.tiling import random_window
from perf_vit.transforms import Augmentation, Normalizer, StainJitter, resize_masked, with_bands
from perf_vit.types import BoolArray, GeoImage, OpenInput, Source, Window

__all__ = [
    "ClassificationImages",
    "ClassificationTiles",
    "ClassificationViews",
    "SceneSample",
    "image_tile",
    "middle_window",
]

FloatArray = npt.NDArray[np.float32]

SceneSample = tuple[Tensor, Tensor, Tensor]
"""Tile [C, tile_px, tile_px] float32, its target, and valid pixels [tile_px, tile_px] bool."""

# Draws of a part before the image's middle is taken.
_TURNS = 10


class ClassificationImages:
    """Labelled images with one number of bands; a grey one among images of three bands is read as three equal ones.

    Args:
        labelled: the images.
        open_input: opens an image by its path, with the options of a model or a config.

    Raises:
        InputError: no image, one that can't be opened, or different numbers of bands.
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
        """An image at lower resolution, for statistics."""
        source = self.sources[index]
        image = with_bands(source.read_reduced(max_size_px), self.num_bands)
        source.close()
        return image

    def target(self, index: int) -> Tensor:
        """Class index, or [K] targets."""
        return torch.as_tensor(self.labelled.targets[index])


class ClassificationTiles(Dataset[SceneSample]):
    """Augmented tiles to train on; item i is a function of (seed, i) alone, whatever the number of workers.

    A tile is a random part of an image, with a valid pixel in it if ten draws give one, or the whole image resized.
    Every image comes once in as many tiles as there are images, in an order of that round's own; balanced, each class
    comes as often as the others.

    Args:
        images: where tiles come from.
        normalizer: applied to the pixels; invalid ones become 0.
        augmentation: applied to tiles.
        tile_px: side of a tile, in pixels.
        resize: resize whole images; else tiles are parts at full resolution.
        length: tiles an epoch.
        seed: decides order, places and augmentation.
        balanced: draw classes alike; only for one class an image.
        stain: applied before the normalizer; None for none.
    """

    def __init__(
        self,
        images: ClassificationImages,
        normalizer: Normalizer,
        augmentation: Augmentation,
        *,
        tile_px: int,
        resize: bool,
        length: int,
        seed: int,
        balanced: bool = False,
        stain: StainJitter | None = None,
    ) -> None:
        self.images = images
        self.normalizer = normalizer
        self.augmentation = augmentation
        self.tile_px = tile_px
        self.resize = resize
        self.length = length
        self.seed = seed
        self.stain = stain
        targets = images.labelled.targets
        self._by_class = [np.flatnonzero(targets == index) for index in np.unique(targets)] if balanced else None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> SceneSample:
        """Tile, target and valid pixels; any index >= 0 is allowed."""
        rng = np.random.default_rng((self.seed, index))
        chosen = self._choose(index, rng)
        source = self.images.sources[chosen]
        image = self._read(source, rng)
        source.close()
        stain = None if self.stain is None else partial(self.stain, seed=int(rng.integers(2**31)))
        pixels, mask = _tile_of(image, source.path, self.normalizer, self.tile_px, resize=self.resize, recolor=stain)
        no_labels = np.zeros(pixels.shape[1:], np.uint8)
        pixels, _, valid = self.augmentation(pixels, no_labels, seed=int(rng.integers(2**31)), mask=mask)
        return torch.from_numpy(pixels), self.images.target(chosen), torch.from_numpy(valid)

    def _read(self, source: Source, rng: np.random.Generator) -> GeoImage:
        """The whole image, or a random part; one without a valid pixel is drawn anew, and is the middle in the end."""
        if self.resize:
            return _reduced(source, self.tile_px)
        for _ in range(_TURNS):
            image = source.read(random_window(source.extent, self.tile_px, rng))
            if image.valid.any():
                return image
        return source.read(middle_window(source, self.tile_px))

    def _choose(self, index: int, rng: np.random.Generator) -> int:
        if self._by_class is not None:
            return int(rng.choice(self._by_class[int(rng.integers(len(self._by_class)))]))
        turn, position = divmod(index, len(self.images))
        return int(order_of_turn(self.seed, turn, len(self.images))[position])


class ClassificationViews(Dataset[SceneSample]):
    """One tile an image, as prediction sees it: the middle of the image, or all of it, resized.

    Args:
        images: what to look at.
        normalizer: applied to the pixels; invalid ones become 0.
        tile_px: side of a tile, in pixels.
        resize: resize whole images; else tiles are parts at full resolution.
    """

    def __init__(self, images: ClassificationImages, normalizer: Normalizer, *, tile_px: int, resize: bool) -> None:
        self.images = images
        self.normalizer = normalizer
        self.tile_px = tile_px
        self.resize = resize

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> SceneSample:
        """Tile, target and valid pixels."""
        source = self.images.sources[index]
        place = None if self.resize else middle_window(source, self.tile_px)
        pixels, valid = image_tile(source, self.normalizer, self.tile_px, place)
        source.close()
        return torch.from_numpy(pixels), self.images.target(index), torch.from_numpy(valid)


def middle_window(source: Source, tile_px: int) -> Window:
    """The tile in the middle of an image; along an axis shorter than a tile it begins at the image's start."""
    row, col = (max(0, (side - tile_px) // 2) for side in source.size)
    return Window(row, col, tile_px, tile_px)


def image_tile(
    source: Source,
    normalizer: Normalizer,
    tile_px: int,
    window: Window | None,
) -> tuple[FloatArray, BoolArray]:
    """Standardised pixels of an image, [C, tile_px, tile_px], and which are valid, [tile_px, tile_px].

    Args:
        source: the image.
        normalizer: applied to the pixels; invalid ones become 0.
        tile_px: side of the tile.
        window: the part that becomes the tile; None to resize all of the image, bilinear and without aliasing.

    Raises:
        InputError: the image can't be read, has no valid pixel there, or another number of bands.
    """
    image = _reduced(source, tile_px) if window is None else source.read(window)
    pixels, mask = _tile_of(image, source.path, normalizer, tile_px, resize=window is None)
    return pixels, np.asarray(mask.any(0))


def _tile_of(
    image: GeoImage,
    path: str,
    normalizer: Normalizer,
    tile_px: int,
    *,
    resize: bool,
    recolor: Callable[[GeoImage], GeoImage] | None = None,
) -> tuple[FloatArray, BoolArray]:
    """The tile of an image that was read, and its mask; `recolor` changes colours before they are standardised.

    Raises:
        InputError: no valid pixel, or another number of bands.
    """
    if not image.valid.any():
        raise InputError(f"{path} has no valid pixel in its tile of {tile_px} px; leave it out, or check nodata")
    image = with_bands(image, len(normalizer.mean))
    if recolor is not None:
        image = recolor(image)
    try:
        pixels = normalizer(image)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return resize_masked(pixels, image.mask, tile_px, tile_px) if resize else (pixels, image.mask)


def _reduced(source: Source, tile_px: int) -> GeoImage:
    # Larger images are reduced as they are read, to at least twice the tile, which leaves the fine resizing sharp.
    return source.read_reduced(_reduced_size(source, tile_px))


def _reduced_size(source: Source, tile_px: int) -> int:
    shortest = min(source.size)
    return max(1, -(-max(source.size) * min(shortest, 2 * tile_px) // shortest))
