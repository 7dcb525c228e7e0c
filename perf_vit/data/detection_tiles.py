"""Tile datasets of object detection, and checks that objects lie on valid pixels."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from perf_vit.data.augmentation import draw_log_uniform
from perf_vit.data.samplers import DetectionSampler
from perf_vit.errors import DataWarning, InputError
from perf_vit.labels.objects import ImageRecord, objects_in
from perf_vit.models import accepts_bands, repeat_grey_band, standardized
from perf_vit.sources import open_source
from perf_vit.tiling import grid_windows
from perf_vit.transforms import Augmentation, Normalizer, StainJitter, resize_with_objects, turn, turn_with_objects
from perf_vit.types import BoolArray, GeoImage, ObjectLabels, OpenInput, Source, Window

__all__ = [
    "DetectionGrid",
    "DetectionImages",
    "DetectionSample",
    "DetectionTiles",
    "ObjectValidity",
    "check_object_validity",
    "collate_objects",
]

DetectionSample = tuple[Tensor, ObjectLabels, Tensor]
"""Tile [C, h, w] float32, objects, and valid pixels [h, w] bool."""

DetectionBatch = tuple[list[Tensor], list[ObjectLabels], list[Tensor] | None]
"""Tiles, objects, and valid pixels, None if all pixels are valid."""

FloatArray = npt.NDArray[np.float32]


class DetectionImages:
    """Images with the same number of bands and their objects, read by window.

    Grey images among RGB ones are read as three equal bands.

    Args:
        records: Image records.
        open_input: Function that opens an image by path.
        min_visible: Objects with a smaller visible fraction in a window are ignored there.

    Raises:
        InputError: There is no image, one can't be opened, or the numbers of bands differ.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        *,
        open_input: OpenInput = open_source,
        min_visible: float = 0.3,
    ) -> None:
        if not records:
            raise InputError("expected labelled images to cut tiles from, got none")
        self.records = list(records)
        self.min_visible = min_visible
        self.sources = [record.labelled(open_closed(record.path, open_input)) for record in self.records]
        self.num_bands = common_bands(self.sources)

    def read(self, index: int, window: Window, owned: Window | None = None) -> tuple[GeoImage, ObjectLabels]:
        """Read a window of an image and its objects, in window coordinates.

        Ignored are objects without a valid pixel, objects with too small a visible fraction and, if `owned` is given,
        objects with their centre outside of it.

        Args:
            index: Image index.
            window: Window of the image.
            owned: Part of the image whose object centres count.
        """
        source = self.sources[index]
        image = self._colored(source.read(window))
        # Close after each window, as there may be more images than the limit of open files.
        source.close()
        objects = objects_in(self.records[index], window, min_visible=self.min_visible, owned=owned)
        if image.valid.all():
            return image, objects
        unseen = ~touch_valid(objects.boxes_xyxy, image.valid)
        return image, dataclasses.replace(objects, ignored=objects.ignored | unseen)

    def read_reduced(self, index: int, max_size_px: int) -> GeoImage:
        """Read an image at lower resolution, for statistics."""
        image = self._colored(self.sources[index].read_reduced(max_size_px))
        self.sources[index].close()
        return image

    def _colored(self, image: GeoImage) -> GeoImage:
        return repeat_grey_band(image, self.num_bands)


class DetectionTiles(Dataset[DetectionSample]):
    """Augmented training tiles; item i depends on (seed, i) only, whatever the number of workers.

    Windows without valid pixels are drawn again, up to ten times. A zoom reads a larger or smaller window and resizes
    it, so it needs no padding.

    Args:
        images: Images and objects.
        sampler: Sampler of windows.
        normalizer: Normalizer of the pixels; invalid ones become 0.
        tile_px: Tile size in pixels.
        tiles_per_epoch: Number of tiles per epoch.
        seed: Seed of windows and augmentation.
        flips: Whether to apply the eight symmetries of the square.
        scale: Zoom range (min, max).
        colors: Gain and offset of the bands, see `Augmentation`; None for none.
        stain: Stain jitter, applied before the normalizer; None for none.
        resolution: Pixel size range (min, max) of tiles, instead of `scale`, in the unit of `pixel_sizes`.
        pixel_sizes: Pixel size of each image; required with `resolution`.
    """

    def __init__(
        self,
        images: DetectionImages,
        sampler: DetectionSampler,
        normalizer: Normalizer,
        *,
        tile_px: int,
        tiles_per_epoch: int,
        seed: int,
        flips: bool = True,
        scale: tuple[float, float] = (1.0, 1.0),
        colors: Augmentation | None = None,
        stain: StainJitter | None = None,
        resolution: tuple[float, float] | None = None,
        pixel_sizes: Sequence[float] | None = None,
    ) -> None:
        self.images = images
        self.sampler = sampler
        self.normalizer = normalizer
        self.tile_px = tile_px
        self.tiles_per_epoch = tiles_per_epoch
        self.seed = seed
        self.flips = flips
        self.scale = scale
        self.colors = colors
        self.stain = stain
        self.resolution = resolution
        self.pixel_sizes = None if pixel_sizes is None else np.asarray(pixel_sizes)

    def __len__(self) -> int:
        return self.tiles_per_epoch

    def __getitem__(self, index: int) -> DetectionSample:
        """Return tile, objects and valid pixels; any index >= 0 is allowed."""
        rng = np.random.default_rng((self.seed, index))
        _, _, image, objects = self._read(rng)
        if self.stain is not None:
            image = self.stain(image, int(rng.integers(2**31)))
        pixels, mask, objects = resize_with_objects(
            standardized(image, self.normalizer), image.mask, objects, self.tile_px, self.tile_px
        )
        symmetry = int(rng.integers(8)) if self.flips else 0
        if self.colors is not None:
            pixels = _recolored(pixels, mask, self.colors, int(rng.integers(2**31)))
        pixels, objects = turn_with_objects(pixels, objects, symmetry)
        return torch.from_numpy(pixels), objects, torch.from_numpy(turn(np.asarray(mask.any(0)), symmetry))

    def describe(self, index: int) -> str:
        """Return image and window of a sample."""
        chosen, window, *_ = self._read(np.random.default_rng((self.seed, index)))
        return f"{self.images.records[chosen].path}, {window}"

    def _read(self, rng: np.random.Generator) -> tuple[int, Window, GeoImage, ObjectLabels]:
        """Return an image, a window of it with a valid pixel, and what it holds."""
        size_px = self._draw_size(rng)
        for _ in range(10):
            chosen, window = self.sampler.draw(rng, size_px)
            image, objects = self.images.read(chosen, window)
            if image.valid.any():
                break
        return chosen, window, image, objects

    def _draw_size(self, rng: np.random.Generator) -> int | Sequence[int]:
        """Draw the size of the window in pixels, or one size per image."""
        if self.resolution is None:
            return max(1, round(self.tile_px / draw_log_uniform(self.scale, rng)))
        assert self.pixel_sizes is not None
        sizes = np.rint(self.tile_px * draw_log_uniform(self.resolution, rng) / self.pixel_sizes)
        return np.maximum(1, sizes).astype(int).tolist()


class DetectionGrid(Dataset[DetectionSample]):
    """All tiles of a grid over each image, in order and without augmentation, for validation.

    An object counts in the tile that owns its centre and is ignored in the others, so metrics count it at most once.

    Args:
        images: Images and objects.
        normalizer: Normalizer of the pixels; invalid ones become 0.
        tile_px: Tile size in pixels.
    """

    def __init__(self, images: DetectionImages, normalizer: Normalizer, *, tile_px: int) -> None:
        self.images = images
        self.normalizer = normalizer
        self.tile_px = tile_px
        self.tiles = [
            (index, window, owned)
            for index, record in enumerate(images.records)
            for window, owned in _grid_with_owners(record.extent, tile_px)
        ]

    def __len__(self) -> int:
        return len(self.tiles)

    def describe(self, index: int) -> str:
        """Return image and window of a sample."""
        chosen, window, *_ = self.tiles[index]
        return f"{self.images.records[chosen].path}, {window}"

    def __getitem__(self, index: int) -> DetectionSample:
        """Return tile, objects and valid pixels."""
        image, objects = self.images.read(*self.tiles[index])
        return torch.from_numpy(standardized(image, self.normalizer)), objects, torch.from_numpy(image.valid)


def collate_objects(samples: Sequence[DetectionSample]) -> DetectionBatch:
    """Collate samples to lists, as the number of objects differs between tiles."""
    images, objects, valid = zip(*samples, strict=True)
    return list(images), list(objects), None if all(each.all() for each in valid) else list(valid)


def _grid_with_owners(extent: Window, tile_px: int) -> list[tuple[Window, Window]]:
    """Return the windows of a grid and the part of each that no earlier window covers."""
    found = []
    windows = grid_windows(extent, tile_px, overlap=0)
    rows = _owned_starts(sorted({window.row for window in windows}), tile_px)
    cols = _owned_starts(sorted({window.col for window in windows}), tile_px)
    for window in windows:
        row, col = rows[window.row], cols[window.col]
        found.append((window, Window(row, col, window.row_stop - row, window.col_stop - col)))
    return found


def _owned_starts(starts: list[int], size: int) -> dict[int, int]:
    """Map each start to the first pixel not covered by the previous window."""
    return {
        start: max(start, before + size) for before, start in zip([starts[0] - size, *starts], starts, strict=False)
    }


def open_closed(path: str, open_input: OpenInput) -> Source:
    """Open a source and close its file, as there may be more images than the limit of open files."""
    source = open_input(path)
    source.close()
    return source


def common_bands(sources: Sequence[Source]) -> int:
    """Return the number of bands of images; grey images may occur among images of three bands.

    Raises:
        InputError: The numbers of bands differ.
    """
    most = max(sources, key=lambda source: source.num_bands)
    for source in sources:
        if not accepts_bands(source.num_bands, most.num_bands):
            raise InputError(
                f"{source.path} has {source.num_bands} bands, {most.path} {most.num_bands}; choose common ones with "
                "data.bands"
            )
    return most.num_bands


def touch_valid(boxes_xyxy: npt.NDArray[np.number], valid: BoolArray) -> BoolArray:
    """Return whether each box covers a valid pixel, [n]."""
    starts, stops = np.floor(boxes_xyxy[:, :2]).astype(int), np.ceil(boxes_xyxy[:, 2:]).astype(int)
    spans = zip(starts.tolist(), stops.tolist(), strict=True)
    touches = [valid[top:bottom, left:right].any() for (left, top), (right, bottom) in spans]
    return np.array(touches, bool)


def _recolored(pixels: FloatArray, mask: BoolArray, colors: Augmentation, seed: int) -> FloatArray:
    return colors(pixels, np.zeros(pixels.shape[1:], np.uint8), seed, mask)[0]


# Number and longest side of the images to check: a subset of those that statistics are measured on.
_IMAGES = 16

_SIDE_PX = 256

# Maximum number of objects per image to check again at full resolution, and the part of each in pixels.
_AGAIN = 16

_AGAIN_PX = 512


class ObjectValidity:
    """Source wrapper that records which objects cover a valid pixel while its windows are read.

    Args:
        source: Source to read from.
        boxes_xyxy: Boxes of the objects in source pixels, [n, 4].

    Attributes:
        seen: Whether each object covers a valid pixel in the windows read so far, [n] bool.
    """

    def __init__(self, source: Source, boxes_xyxy: npt.NDArray[np.floating]) -> None:
        self._source = source
        self._starts = np.floor(boxes_xyxy[:, :2]).astype(np.int64)
        self._stops = np.ceil(boxes_xyxy[:, 2:]).astype(np.int64)
        self.seen: BoolArray = np.zeros(len(boxes_xyxy), bool)

    @property
    def extent(self) -> Window:
        """Window of all pixels."""
        return self._source.extent

    def read(self, window: Window) -> GeoImage:
        """Read pixels and valid mask of a window; thread-safe."""
        image = self._source.read(window)
        corner, size = (window.col, window.row), (window.width, window.height)
        inside = np.hstack([np.clip(xy - corner, 0, size) for xy in (self._starts, self._stops)])
        near = np.flatnonzero((inside[:, 2:] > inside[:, :2]).all(axis=1) & ~self.seen)
        # Threads only set values to True, so they don't conflict.
        self.seen[near[touch_valid(inside[near], image.valid)]] = True
        return image


def check_object_validity(images: DetectionImages, part: str, seed: int) -> None:
    """Warn about objects without valid pixels; raise if all objects lack them. Checks a sample of 16 images.

    Args:
        images: Images and objects.
        part: "training" or "validation", for messages.
        seed: Seed of the sample.

    Raises:
        InputError: No object covers a valid pixel.
    """
    with_objects = [index for index, record in enumerate(images.records) if (~record.ignored).any()]
    order = np.random.default_rng(seed).permutation(len(with_objects))[:_IMAGES]
    unseen, number, first = 0, 0, ""
    for index in (with_objects[place] for place in order.tolist()):
        record, valid = images.records[index], images.read_reduced(index, _SIDE_PX).valid
        hidden = _number_hidden(images, index, valid)
        unseen, number = unseen + hidden, number + int((~record.ignored).sum())
        first = first or (record.path if hidden else "")
    if not unseen:
        return
    text = f"{unseen} of {number} objects in the {len(order)} {part} images checked cover no valid pixel"
    if unseen == number and len(order) == len(with_objects):
        raise InputError(f"{text}, the first in {first}; check the nodata value, NaN and the position of the labels")
    warnings.warn(f"{text} and are ignored, the first in {first}", DataWarning, stacklevel=3)


def _number_hidden(images: DetectionImages, index: int, valid: BoolArray) -> int:
    """Estimate the number of objects of an image without valid pixels.

    Some of those that cover none at lower resolution are read again; the others are assumed to be alike.
    """
    record = images.records[index]
    hidden = record.boxes_xyxy[~_touch_valid(record, valid) & ~record.ignored]
    some = np.random.default_rng(index).permutation(hidden)[:_AGAIN].tolist()
    seen = [_has_valid_pixel(images, index, box) for box in some]
    return round(len(hidden) * (1 - sum(seen) / len(seen))) if seen else 0


def _has_valid_pixel(images: DetectionImages, index: int, box_xyxy: list[float]) -> bool:
    left, top, right, bottom = math.floor(box_xyxy[0]), math.floor(box_xyxy[1]), *map(math.ceil, box_xyxy[2:])
    window = Window(top, left, min(bottom - top, _AGAIN_PX), min(right - left, _AGAIN_PX))
    return bool(images.read(index, window)[0].valid.any())


def _touch_valid(record: ImageRecord, valid: BoolArray) -> BoolArray:
    """Return whether each box covers a valid pixel of a low-resolution mask, [n]."""
    scale = np.array([valid.shape[1] / record.width, valid.shape[0] / record.height])
    left_top = np.floor(record.boxes_xyxy[:, :2] * scale).astype(int)
    right_bottom = np.maximum(np.ceil(record.boxes_xyxy[:, 2:] * scale).astype(int), left_top + 1)
    return np.array(
        [valid[y0:y1, x0:x1].any() for (x0, y0), (x1, y1) in zip(left_top, right_bottom, strict=True)], bool
    )
