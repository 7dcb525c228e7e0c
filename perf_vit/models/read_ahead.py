"""Windows read ahead of a model in threads, damaged windows, and the transfer of what was read to its device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perf_vit.errors import DamagedDataError
from perf_vit.threads import num_processors
from perf_vit.types import BoolArray, GeoImage, Source, Window

__all__ = [
    "Entry",
    "Reads",
    "SalvagingReader",
    "Tile",
    "load_ahead",
    "read_ahead",
    "read_tile",
    "to_device",
    "valid_pixels",
    "window_batches",
]

FloatArray = npt.NDArray[np.float32]

# Side of the smallest piece that a damaged window is read in: a tile of most files is no smaller.
_SALVAGE_PX = 64

Item = TypeVar("Item")

Loaded = TypeVar("Loaded")


class Entry(Protocol):
    """A tile, or something that holds one."""

    @property
    def pixels(self) -> FloatArray | None:
        """Input of the model, [C, h, w]; None to skip it."""

    @property
    def valid(self) -> BoolArray:
        """Valid pixels, [h, w]."""


class Reads(Protocol):
    """What the engine reads from: anything that gives a window's pixels and valid mask."""

    def read(self, window: Window) -> GeoImage:
        """Pixels and valid mask of a window, padded where it reaches past the edge; from any thread."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A window, ready for the model.

    Attributes:
        window: where it lies.
        valid: [h, w], where the source has data.
        pixels: the model's input, [C, h, w]; None where no pixel is valid.
    """

    window: Window
    valid: BoolArray
    pixels: FloatArray | None


class SalvagingReader:
    """A source that gives what can be read of a damaged window: the rest is invalid.

    A window that is damaged is read again in quarters, and these likewise, down to 64 px. Any other error, such as that
    of a server that doesn't deliver, ends the reading: a later try may get these pixels.

    Args:
        source: where pixels come from.
        on_damage: called with each piece that can't be read and the reason; from several threads.
    """

    def __init__(self, source: Source, on_damage: Callable[[Window, str], None]) -> None:
        self._source = source
        self._on_damage = on_damage

    def read(self, window: Window) -> GeoImage:
        """Pixels and valid mask of a window."""
        try:
            return self._source.read(window)
        except DamagedDataError as error:
            pixels = np.zeros((self._source.num_bands, *window.shape), self._source.dtype)
            mask = np.zeros(pixels.shape, bool)
            if max(window.shape) <= _SALVAGE_PX:
                self._on_damage(window, str(error))
                return GeoImage.from_mask(pixels, mask)
        for quarter in _quarters(window):
            part = self.read(quarter)
            rows, cols = quarter.slices_in(window)
            pixels[:, rows, cols], mask[:, rows, cols] = part.pixels, part.mask
        return GeoImage.from_mask(pixels, mask)


def _quarters(window: Window) -> list[Window]:
    rows = _halves(window.row, window.height)
    cols = _halves(window.col, window.width)
    return [Window(row, col, height, width) for row, height in rows for col, width in cols]


def _halves(start: int, length: int) -> list[tuple[int, int]]:
    """Cut on multiples of the smallest piece, on which tiles of files begin."""
    if length <= _SALVAGE_PX:
        return [(start, length)]
    middle = -(-(start + length // 2) // _SALVAGE_PX) * _SALVAGE_PX
    if not start < middle < start + length:
        middle = start + length // 2
    return [(start, middle - start), (middle, start + length - middle)]


def load_ahead(
    items: Iterable[Item], load: Callable[[Item], Loaded], *, num_threads: int, depth: int
) -> Generator[Loaded, None, None]:
    """Load items in threads and yield the results in the order of the items, however long each takes.

    Items are taken from their iterable by the caller's thread.

    Args:
        items: Items to load.
        load: Function that loads an item; called from several threads.
        num_threads: Number of threads.
        depth: Maximum number of items that are loaded or being loaded and not yet taken.

    Raises:
        Exception: Whatever `load` raises, in the item's turn; no further item is loaded.
    """
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="perf_vit-reader")
    todo = iter(items)
    try:
        waiting: deque[Future[Loaded]] = deque(pool.submit(load, item) for item in islice(todo, depth))
        while waiting:
            loaded = waiting.popleft().result()
            waiting.extend(pool.submit(load, item) for item in islice(todo, 1))
            yield loaded
    finally:
        pool.shutdown(cancel_futures=True)


def read_ahead(
    windows: Iterable[Window],
    source: Reads,
    normalize: Callable[[GeoImage], FloatArray],
    *,
    num_threads: int,
    depth: int,
) -> Generator[Tile, None, None]:
    """Read and normalise windows of a source in threads and yield a tile per window, in order; see `load_ahead`.

    Args:
        windows: Windows to read.
        source: Source of the pixels.
        normalize: Function from pixels to the model's input.
        num_threads: Number of threads that read.
        depth: Maximum number of windows that are held or being read.

    Raises:
        InputError: A window can't be read.
    """
    load = partial(read_tile, source, normalize)
    return load_ahead(windows, load, num_threads=num_threads, depth=depth)


def read_tile(source: Reads, normalize: Callable[[GeoImage], FloatArray], window: Window) -> Tile:
    """Read and normalise a window.

    Raises:
        InputError: It can't be read.
    """
    image = source.read(window)
    return Tile(window, image.valid, normalize(image) if image.valid.any() else None)


def to_device(tiles: Tensor, device: str | torch.device) -> Tensor:
    """Copy tiles [B, C, h, w] to a device.

    To a GPU, they are copied from pinned memory, while it computes, and laid out channels-last, as its convolutions
    are fastest on.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return tiles.to(device)
    return tiles.pin_memory().to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)


def valid_pixels(tiles: Sequence[Entry]) -> Tensor | None:
    """Valid pixels of some tiles, bool [B, h, w], None where all are."""
    if all(tile.valid.all() for tile in tiles):
        return None
    return torch.from_numpy(np.stack([tile.valid for tile in tiles]))


def window_batches(
    source: Reads,
    normalize: Callable[[GeoImage], FloatArray],
    windows: Iterable[Window],
    batch_size: int,
    *,
    num_readers: int | None = None,
    change: Callable[[Tile], Tile] | None = None,
) -> Generator[tuple[Tensor, Tensor | None], None, None]:
    """Read windows of one size in threads and yield them in order, in batches as a model takes them.

    Args:
        source: Source of the pixels; several threads read it.
        normalize: Function from pixels to the model's input.
        windows: Windows to read. Those without a valid pixel, of which tiles are missing at the level that is read, are
            windows of mean colours.
        batch_size: Number of windows in a batch.
        num_readers: Number of threads that read; None for one per processor.
        change: Function that changes each tile, such as an augmentation; called from these threads.

    Yields:
        Windows, [B, C, h, w], and their valid pixels, bool [B, h, w], None where all are.

    Raises:
        InputError: A window can't be read.
    """
    readers = num_readers or num_processors()

    def load(window: Window) -> Tile:
        tile = read_tile(source, normalize, window)
        return tile if change is None else change(tile)

    tiles = load_ahead(windows, load, num_threads=readers, depth=2 * batch_size + readers)
    with closing(tiles):
        while batch := list(islice(tiles, batch_size)):
            known = next((tile.pixels for tile in batch if tile.pixels is not None), None)
            if known is None:
                known = normalize(source.read(batch[0].window))
            # What isn't valid is 0, the mean.
            blank = np.zeros_like(known)
            pixels = np.stack([blank if tile.pixels is None else tile.pixels for tile in batch])
            yield torch.from_numpy(pixels), valid_pixels(batch)
