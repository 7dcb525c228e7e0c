"""Slides with any number of channels, read by tile or chunk from arrays."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from perf_vit.errors import DamagedDataError, InputError
from perf_vit.sources._bands import is_finite
from perf_vit.sources._gdal import PerThread
from perf_vit.sources.slides.pyramid import Level, PyramidReader, true_downsample
from perf_vit.types import BoolArray, Window

__all__ = ["ArrayReader", "OpenArrays", "stored_mask"]

_COLOURS = ("red", "green", "blue")


@dataclass(frozen=True, slots=True)
class OpenArrays:
    """Open file: one array per level with common axes, and metadata.

    Attributes:
        arrays: Zarr array of each level, finest first.
        axes: Letter of each axis: Y, X, C (channels), S (colours), others of length 1.
        mpp_yx: Micrometres per pixel of level 0 that the file states; None for none.
        names: Channel names; empty for channels without name.
        close: Function that closes the file.
        alpha: Index of the band that is opacity, or None.
        objective_power: Magnification of the objective that the file states; None for none.
    """

    arrays: Sequence[Any]
    axes: str
    mpp_yx: tuple[float, float] | None
    names: tuple[str, ...]
    close: Callable[[], None]
    alpha: int | None = None
    objective_power: float | None = None


class ArrayReader(PyramidReader):
    """Levels from arrays with axes Y and X, at most one of C (channels) and S (colours), and other axes of length 1.

    Args:
        path: Name of the file.
        open_arrays: Function that opens it.
        format_name: Name of the format.

    Raises:
        InputError: The file can't be opened, or its axes or pixels aren't supported.
    """

    def __init__(self, path: str, open_arrays: Callable[[str], OpenArrays], format_name: str) -> None:
        self._path = path
        self.format = format_name
        self._handle = PerThread(functools.partial(open_arrays, path))
        opened = self._handle.get()
        sizes = [dict(zip(opened.axes, array.shape, strict=True)) for array in opened.arrays]
        self._axes = opened.axes
        self._check(sizes[0], np.dtype(opened.arrays[0].dtype))
        self.dtype = np.dtype(opened.arrays[0].dtype).newbyteorder("=")
        self.levels = _levels([(size["Y"], size["X"]) for size in sizes])
        self.mpp_yx = opened.mpp_yx
        self.objective_power = opened.objective_power
        self._band_axis = "S" if "S" in sizes[0] else "C"
        self.alpha = opened.alpha
        given, count = _COLOURS if self._band_axis == "S" else opened.names, sizes[0].get(self._band_axis, 1)
        names = list(_channel_names(given, count))
        if self.alpha is not None:
            names[self.alpha] = "alpha"
        self.band_names = tuple(names)
        # Colours may be channels as well, as in all of OME-Zarr.
        is_colour = tuple(name.lower() for name in names[:3]) == _COLOURS
        if is_colour and names[3:] == ["alpha"]:
            self.alpha = len(_COLOURS)
        self.fill = 255 if is_colour and self.dtype == np.uint8 else 0

    def read(self, level: int, window: Window) -> tuple[npt.NDArray[Any], BoolArray]:
        """Read pixels [C, h, w] and a mask of finite and stored ones, [C, h, w] or [1, h, w].

        Raises:
            DamagedDataError: The file is damaged there.
            InputError: The system can't read it.
        """
        return self._read_slice(level, window, slice(0, len(self.band_names)))

    def read_bands(self, level: int, window: Window, bands: Sequence[int]) -> tuple[npt.NDArray[Any], BoolArray]:
        """Read some bands as `read` does, and decode no chunks of others."""
        step = self.bands_per_chunk(level)
        parts = _runs({band // step for band in bands}, step, len(self.band_names))
        read = [self._read_slice(level, window, part) for part in parts]
        held = [band for part in parts for band in range(part.start, part.stop)]
        order = [held.index(band) for band in bands]
        pixels = np.concatenate([pixels for pixels, _ in read])[order]
        if all(len(mask) == 1 and mask.all() for _, mask in read):
            return pixels, read[0][1]
        masks = [np.broadcast_to(mask, found.shape) for found, mask in read]
        return pixels, np.concatenate(masks)[order]

    def bands_per_chunk(self, level: int) -> int:
        """Return the number of bands in a chunk of a level."""
        if self._band_axis not in self._axes:
            return 1
        return int(self._handle.get().arrays[level].chunks[self._axes.index(self._band_axis)])

    def _read_slice(self, level: int, window: Window, bands: slice) -> tuple[npt.NDArray[Any], BoolArray]:
        places: dict[str, Any] = {"Y": slice(window.row, window.row_stop), "X": slice(window.col, window.col_stop)}
        places |= {"C": slice(None), "S": slice(None), self._band_axis: bands}
        try:
            array, chosen = self._handle.get().arrays[level], tuple(places.get(axis, 0) for axis in self._axes)
            found, stored = np.asarray(array[chosen]), stored_mask(array, chosen)
        # Errors of the codecs have no common base class.
        except Exception as error:
            what = (
                f"can't read rows {window.row} to {window.row_stop}, columns {window.col} to {window.col_stop} of "
                f"level {level} of {self._path}: {' '.join(str(error).split())}"
            )
            # Errors of the system have a number, e.g. for a missing disk.
            if isinstance(error, OSError) and error.errno is not None:
                raise InputError(what) from error
            raise DamagedDataError(f"{what}; the file may be truncated or damaged") from error
        kept = [axis for axis in self._axes if axis in places]
        if len(kept) == 2:
            found, kept = found[None], ["C", *kept]
        order = [kept.index(self._band_axis), kept.index("Y"), kept.index("X")]
        pixels = np.ascontiguousarray(found.transpose(order), dtype=self.dtype)
        mask = is_finite(pixels) if self.dtype.kind == "f" else np.ones((1, *window.shape), bool)
        if stored is None:
            return pixels, mask
        return pixels, mask & stored.reshape(found.shape).transpose(order)

    def close(self) -> None:
        """Close this thread's handle."""
        self._handle.close()

    def _check(self, size: Mapping[str, int], dtype: np.dtype[Any]) -> None:
        shape = ", ".join(f"{axis} {length}" for axis, length in size.items())
        others = [axis for axis, length in size.items() if axis not in "YXCS" and length > 1]
        if others or not {"Y", "X"} <= set(size) or ({"C", "S"} <= set(size) and size["C"] > 1 and size["S"] > 1):
            raise InputError(
                f"{self._path} must be one image of rows Y, columns X and channels C or colours S, got axes {shape}; "
                "write one plane of it to a file and open that"
            )
        if size.get("S", 3) not in (3, 4):
            raise InputError(f"{self._path} must have 3 or 4 colours S a pixel, got axes {shape}")
        if dtype.kind not in "uif":
            raise InputError(f"{self._path} must hold integers or floating-point numbers, got {dtype}")


def _levels(sizes: Sequence[tuple[int, int]]) -> tuple[Level, ...]:
    full = sizes[0]
    return tuple(
        Level(height, width, (true_downsample(full[0], height), true_downsample(full[1], width)))
        for height, width in sizes
    )


def _runs(chunks: set[int], step: int, count: int) -> list[slice]:
    """Return the bands of chunks, one slice for adjacent chunks."""
    starts = [chunk for chunk in sorted(chunks) if chunk - 1 not in chunks]
    stops = [chunk + 1 for chunk in sorted(chunks) if chunk + 1 not in chunks]
    return [slice(start * step, min(stop * step, count)) for start, stop in zip(starts, stops, strict=True)]


def _channel_names(names: Sequence[str], count: int) -> tuple[str, ...]:
    given = tuple(names) + ("",) * count
    return tuple(given[index] or f"band_{index + 1}" for index in range(count))


def stored_mask(array: Any, selection: Sequence[int | slice]) -> BoolArray | None:
    """Return which selected pixels lie in chunks, shards or TIFF tiles that are stored.

    Zarr reads missing chunks as the fill value. Writers omit chunks with fill values only, which can't be told from
    lost files. An array without fill value must have all chunks.

    Args:
        array: Zarr array, of a folder or of `tifffile`.
        selection: Index or slice per axis, inside the array.

    Returns:
        Mask in the shape of `array[selection]`; None if all are stored.

    Raises:
        DamagedDataError: A chunk of an array without fill value is missing.
    """
    starts, stops = zip(
        *(_bounds(part, length) for part, length in zip(selection, array.shape, strict=True)), strict=True
    )
    sizes = array.shards or array.chunks
    spans = (range(start // n, -(-stop // n)) for start, stop, n in zip(starts, stops, sizes, strict=True))
    missing = _missing(array, list(itertools.product(*spans)))
    if not missing:
        return None
    mask = np.ones([stop - start for start, stop in zip(starts, stops, strict=True)], bool)
    for cell in missing:
        place = zip(cell, sizes, starts, strict=True)
        mask[tuple(slice(max(0, i * n - start), (i + 1) * n - start) for i, n, start in place)] = False
    return mask[tuple(0 if isinstance(part, int) else slice(None) for part in selection)]


def _missing(array: Any, cells: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the positions of chunks that aren't stored."""
    keys = [array.metadata.encode_chunk_key(cell) for cell in cells]
    root = getattr(array.store, "root", None)
    if root is None:
        store_keys = [f"{array.path}/{key}".lstrip("/") for key in keys]
        found = import_module("zarr.core.sync").sync(_exist(array.store, store_keys))
        return [cell for cell, is_stored in zip(cells, found, strict=True) if not is_stored]
    files = [os.path.join(os.fspath(root), array.path, key) for key in keys]
    missing = [(cell, file) for cell, file in zip(cells, files, strict=True) if not os.path.exists(file)]
    if missing and array.metadata.fill_value is None:
        raise DamagedDataError(f"the chunk {missing[0][1]} is missing")
    return [cell for cell, _ in missing]


async def _exist(store: Any, keys: Sequence[str]) -> list[bool]:
    return [await store.exists(key) for key in keys]


def _bounds(part: int | slice, length: int) -> tuple[int, int]:
    if isinstance(part, int):
        return part, part + 1
    start, stop, _ = part.indices(length)
    return start, stop
