"""Datasets of objects: tiles cut from images of any size, with the objects in them."""

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
from perf_vit.data.samplers import Places
from perf_vit.errors import DataWarning, InputError
from perf_vit.labels.objects import ImageRecord, objects_in
from perf_vit.sources import open_source
from perf_vit.tiling import grid_windows
from perf_vit.transforms import (
    Augmentation,
    Normalizer,
    StainJitter,
    bands_fit,
    resize_with_objects,
    turn,
    turn_with_objects,
    with_bands,
)
from perf_vit.types import BoolArray, GeoImage, ObjectLabels, OpenInput, Source, Window

__all__ = [
    "ObjectGrid",
    "ObjectImages",
    "ObjectSample",
    "ObjectWindows",
    "SeenObjects",
    "check_objects_seen",
    "collate_objects",
    "standardized",
]

ObjectSample = tuple[Tensor, ObjectLabels, Tensor]
"""Tile [C, h, w] float32, its objects, and valid pixels [h, w] bool."""

ObjectBatch = tuple[list[Tensor], list[ObjectLabels], list[Tensor] | None]
"""Tiles, their objects, and their valid pixels, None where all pixels are."""

FloatArray = npt.NDArray[np.float32]


class ObjectImages:
    """Images with one number of bands, and the objects in any window of them.

    A grey image among images of three bands is read as three equal ones.

    Args:
        records: the images.
        open_input: opens an image by its path, with the options of a model or a config.
        min_visible: objects of which a smaller share lies in a window are ignored there.

    Raises:
        InputError: no image, one that can't be opened, or different numbers of bands.
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
        self.sources = [open_closed(record.path, open_input) for record in self.records]
        self.num_bands = common_bands(self.sources)

    def read(self, index: int, window: Window, owned: Window | None = None) -> tuple[GeoImage, ObjectLabels]:
        """Pixels of a window of an image, and its objects in the window's pixels.

        Objects without a valid pixel under them are ignored, and those of which too little is visible or, where `owned`
        is given, whose centre lies outside it.
        """
        source = self.sources[index]
        image = self._colored(source.read(window))
        # Closed after each window: there may be more images than a process may hold open.
        source.close()
        objects = objects_in(self.records[index], window, min_visible=self.min_visible, owned=owned)
        if image.valid.all():
            return image, objects
        unseen = ~touch_valid(objects.boxes_xyxy, image.valid)
        return image, dataclasses.replace(objects, ignored=objects.ignored | unseen)

    def read_reduced(self, index: int, max_size_px: int) -> GeoImage:
        """An image at lower resolution, for statistics."""
        image = self._colored(self.sources[index].read_reduced(max_size_px))
        self.sources[index].close()
        return image

    def _colored(self, image: GeoImage) -> GeoImage:
        return with_bands(image, self.num_bands)


class ObjectWindows(Dataset[ObjectSample]):
    """Augmented tiles to train on; item i is a function of (seed, i) alone, whatever the number of workers.

    A window without a valid pixel is drawn anew, up to ten times. A zoom reads a larger or smaller window and resizes
    it, so it uncovers nothing.

    Args:
        images: where tiles come from.
        places: decides where they lie.
        normalizer: applied to the pixels; invalid ones become 0.
        tile_px: side of a tile, in pixels.
        length: tiles an epoch.
        seed: decides places and augmentation.
        flips: turn and mirror each tile into one of the eight symmetries of the square.
        scale: (smallest, largest) zoom.
        colors: gain and offset of the bands, see `Augmentation`; None for none.
        stain: applied before the normalizer; None for none.
        resolution: instead of `scale`, (smallest, largest) pixel size of a tile, in the unit of `pixel_sizes`.
        pixel_sizes: pixel size of each image; needed with `resolution`.
    """

    def __init__(
        self,
        images: ObjectImages,
        places: Places,
        normalizer: Normalizer,
        *,
        tile_px: int,
        length: int,
        seed: int,
        flips: bool = True,
        scale: tuple[float, float] = (1.0, 1.0),
        colors: Augmentation | None = None,
        stain: StainJitter | None = None,
        resolution: tuple[float, float] | None = None,
        pixel_sizes: Sequence[float] | None = None,
    ) -> None:
        self.images = images
        self.places = places
        self.normalizer = normalizer
        self.tile_px = tile_px
        self.length = length
        self.seed = seed
        self.flips = flips
        self.scale = scale
        self.colors = colors
        self.stain = stain
        self.resolution = resolution
        self.pixel_sizes = None if pixel_sizes is None else np.asarray(pixel_sizes)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> ObjectSample:
        """Tile, its objects and valid pixels; any index >= 0 is allowed."""
        rng = np.random.default_rng((self.seed, index))
        size_px = self._draw_size(rng)
        for _ in range(10):
            image, objects = self.images.read(*self.places.draw(rng, size_px))
            if image.valid.any():
                break
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

    def _draw_size(self, rng: np.random.Generator) -> int | Sequence[int]:
        """Side of the window that becomes a tile, in pixels, or one of each image."""
        if self.resolution is None:
            return max(1, round(self.tile_px / draw_log_uniform(self.scale, rng)))
        assert self.pixel_sizes is not None
        sizes = np.rint(self.tile_px * draw_log_uniform(self.resolution, rng) / self.pixel_sizes)
        return np.maximum(1, sizes).astype(int).tolist()


class ObjectGrid(Dataset[ObjectSample]):
    """Every tile of a grid over every image, in order and as it is, to validate on.

    An object counts in the one tile that owns its centre and is ignored in the others, so a metric counts each object
    at most once.

    Args:
        images: where tiles come from.
        normalizer: applied to the pixels; invalid ones become 0.
        tile_px: side of a tile, in pixels.
    """

    def __init__(self, images: ObjectImages, normalizer: Normalizer, *, tile_px: int) -> None:
        self.images = images
        self.normalizer = normalizer
        self.tile_px = tile_px
        self.places = [
            (index, window, owned)
            for index, record in enumerate(images.records)
            for window, owned in _grid_with_owners(record.extent, tile_px)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> ObjectSample:
        """Tile, its objects and valid pixels."""
        image, objects = self.images.read(*self.places[index])
        return torch.from_numpy(standardized(image, self.normalizer)), objects, torch.from_numpy(image.valid)


def collate_objects(samples: Sequence[ObjectSample]) -> ObjectBatch:
    """A batch of lists, since every tile has another number of objects."""
    images, objects, valid = zip(*samples, strict=True)
    return list(images), list(objects), None if all(each.all() for each in valid) else list(valid)


def _grid_with_owners(extent: Window, tile_px: int) -> list[tuple[Window, Window]]:
    """Windows of a grid, and of each the part that no earlier one holds."""
    found = []
    windows = grid_windows(extent, tile_px, overlap=0)
    rows = _owned_starts(sorted({window.row for window in windows}), tile_px)
    cols = _owned_starts(sorted({window.col for window in windows}), tile_px)
    for window in windows:
        row, col = rows[window.row], cols[window.col]
        found.append((window, Window(row, col, window.row_stop - row, window.col_stop - col)))
    return found


def _owned_starts(starts: list[int], size: int) -> dict[int, int]:
    """For each start, the first pixel that the window before it doesn't hold."""
    return {
        start: max(start, before + size) for before, start in zip([starts[0] - size, *starts], starts, strict=False)
    }


def open_closed(path: str, open_input: OpenInput) -> Source:
    """A source without an open file, as there may be more images than a process may hold open."""
    source = open_input(path)
    source.close()
    return source


def common_bands(sources: Sequence[Source]) -> int:
    """How many bands images have; grey ones may lie among those of three.

    Raises:
        InputError: different numbers of bands.
    """
    most = max(sources, key=lambda source: source.num_bands)
    for source in sources:
        if not bands_fit(source.num_bands, most.num_bands):
            raise InputError(
                f"{source.path} has {source.num_bands} bands, {most.path} {most.num_bands}; choose common ones with "
                "data.bands"
            )
    return most.num_bands


def standardized(image: GeoImage, normalizer: Normalizer) -> FloatArray:
    """A detector's input, [C, H, W]: the same of an image in training, validation, evaluation and prediction.

    Args:
        image: with the normalizer's bands, or grey where these are three.
        normalizer: applied to the pixels; invalid ones become 0.

    Raises:
        InputError: another number of bands.
    """
    return normalizer(with_bands(image, len(normalizer.mean)))


def touch_valid(boxes_xyxy: npt.NDArray[np.number], valid: BoolArray) -> BoolArray:
    """Whether there is a valid pixel under each box, [n]."""
    starts, stops = np.floor(boxes_xyxy[:, :2]).astype(int), np.ceil(boxes_xyxy[:, 2:]).astype(int)
    spans = zip(starts.tolist(), stops.tolist(), strict=True)
    touches = [valid[top:bottom, left:right].any() for (left, top), (right, bottom) in spans]
    return np.array(touches, bool)


def _recolored(pixels: FloatArray, mask: BoolArray, colors: Augmentation, seed: int) -> FloatArray:
    return colors(pixels, np.zeros(pixels.shape[1:], np.uint8), seed, mask)[0]


# Images to look at, and their longest side: a part of those that statistics are measured on.
_IMAGES = 16

_SIDE_PX = 256

# Objects of an image that are looked at again at full resolution, and as much of each.
_AGAIN = 16

_AGAIN_PX = 512


class SeenObjects:
    """A source that notes which objects have a valid pixel under them, as its windows are read.

    Args:
        source: to read from.
        boxes_xyxy: of objects, in the source's pixels, [n, 4].

    Attributes:
        seen: [n] bool, of the windows read so far.
    """

    def __init__(self, source: Source, boxes_xyxy: npt.NDArray[np.floating]) -> None:
        self._source = source
        self._starts = np.floor(boxes_xyxy[:, :2]).astype(np.int64)
        self._stops = np.ceil(boxes_xyxy[:, 2:]).astype(np.int64)
        self.seen: BoolArray = np.zeros(len(boxes_xyxy), bool)

    @property
    def extent(self) -> Window:
        """The window of all pixels."""
        return self._source.extent

    def read(self, window: Window) -> GeoImage:
        """Pixels and valid mask of a window; any thread may call it."""
        image = self._source.read(window)
        corner, size = (window.col, window.row), (window.width, window.height)
        inside = np.hstack([np.clip(xy - corner, 0, size) for xy in (self._starts, self._stops)])
        near = np.flatnonzero((inside[:, 2:] > inside[:, :2]).all(axis=1) & ~self.seen)
        # Threads only ever set what is true, so none undoes another's work.
        self.seen[near[touch_valid(inside[near], image.valid)]] = True
        return image


def check_objects_seen(images: ObjectImages, part: str, seed: int) -> None:
    """Tell about how many objects lie on no valid pixel, and refuse images of which all do; 16 images stand for more.

    Args:
        images: with their objects.
        part: training or validation, for messages.
        seed: decides which images are looked at.

    Raises:
        InputError: no object of any image has a valid pixel under it.
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
    text = f"{unseen} of {number} objects of the {len(order)} {part} images looked at have no valid pixel under them"
    if unseen == number and len(order) == len(with_objects):
        raise InputError(f"{text}, the first in {first}; check the nodata value, NaN and the labels' place")
    warnings.warn(f"{text} and are ignored, the first in {first}", DataWarning, stacklevel=3)


def _number_hidden(images: ObjectImages, index: int, valid: BoolArray) -> int:
    """Objects of an image without a valid pixel.

    What the image at lower resolution says of some is looked at again, and the others are taken to be like these.
    """
    record = images.records[index]
    hidden = record.boxes_xyxy[~_touch_valid(record, valid) & ~record.ignored]
    some = np.random.default_rng(index).permutation(hidden)[:_AGAIN].tolist()
    seen = [_has_valid_pixel(images, index, box) for box in some]
    return round(len(hidden) * (1 - sum(seen) / len(seen))) if seen else 0


def _has_valid_pixel(images: ObjectImages, index: int, box_xyxy: list[float]) -> bool:
    left, top, right, bottom = math.floor(box_xyxy[0]), math.floor(box_xyxy[1]), *map(math.ceil, box_xyxy[2:])
    window = Window(top, left, min(bottom - top, _AGAIN_PX), min(right - left, _AGAIN_PX))
    return bool(images.read(index, window)[0].valid.any())


def _touch_valid(record: ImageRecord, valid: BoolArray) -> BoolArray:
    """Whether there is a valid pixel under each box, as far as an image at lower resolution tells, [n]."""
    scale = np.array([valid.shape[1] / record.width, valid.shape[0] / record.height])
    left_top = np.floor(record.boxes_xyxy[:, :2] * scale).astype(int)
    right_bottom = np.maximum(np.ceil(record.boxes_xyxy[:, 2:] * scale).astype(int), left_top + 1)
    return np.array(
        [valid[y0:y1, x0:x1].any() for (x0, y0), (x1, y1) in zip(left_top, right_bottom, strict=True)], bool
    )
