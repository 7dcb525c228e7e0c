"""Windows read ahead of the model, by a few threads, in order."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from perf_vit.errors import DamagedDataError
from perf_vit.types import BoolArray, GeoImage, Source, Window

__all__ = ["Reads", "SalvagingReader", "Tile", "read_ahead", "takes_valid", "valid_pixels"]

FloatArray = npt.NDArray[np.float32]

# Side of the smallest piece that a damaged window is read in: a tile of most files is no smaller.
_SALVAGE_PX = 64


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


def read_ahead(
    windows: Iterable[Window],
    source: Reads,
    normalize: Callable[[GeoImage], FloatArray],
    *,
    num_threads: int,
    depth: int,
) -> Generator[Tile, None, None]:
    """Read and normalise windows in threads and give them in their order, however long each takes.

    Args:
        windows: what to read.
        source: where pixels come from.
        normalize: pixels to the model's input.
        num_threads: readers.
        depth: windows that are held or on their way at most.

    Yields:
        One tile a window.

    Raises:
        InputError: a window can't be read.
    """

    def load(window: Window) -> Tile:
        image = source.read(window)
        return Tile(window, image.valid, normalize(image) if image.valid.any() else None)

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="perf_vit-reader")
    todo = iter(windows)
    try:
        waiting: deque[Future[Tile]] = deque(pool.submit(load, window) for window in islice(todo, depth))
        while waiting:
            tile = waiting.popleft().result()
            waiting.extend(pool.submit(load, window) for window in islice(todo, 1))
            yield tile
    finally:
        pool.shutdown(cancel_futures=True)


def takes_valid(model: Callable[..., Any]) -> bool:
    """Whether a model, or a function of tiles, has an argument `valid`: the valid pixels, bool [B, h, w], or None."""
    # The module that `torch.compile` returns takes any arguments and hands them on.
    function = getattr(model, "_orig_mod", model).forward if isinstance(model, nn.Module) else model
    try:
        return "valid" in inspect.signature(function).parameters
    except ValueError:
        # Functions written in C have no signature.
        return False


def valid_pixels(tiles: Sequence[Tile]) -> Tensor | None:
    """Valid pixels of some tiles, bool [B, h, w], None where all are."""
    if all(tile.valid.all() for tile in tiles):
        return None
    return torch.from_numpy(np.stack([tile.valid for tile in tiles]))


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
    middle = -(-(start + length // 2) // _SALVAGE_PX) * _SALVAGE_PX
    if length <= _SALVAGE_PX or not start < middle < start + length:
        middle = start + length // 2
    return [(start, length)] if length <= 1 else [(start, middle - start), (middle, start + length - middle)]
