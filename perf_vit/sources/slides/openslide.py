"""Whole slides of all formats of OpenSlide 4."""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ImageCms

from perf_vit.errors import DamagedDataError, InputError, extra, reason_line, warn_once
from perf_vit.sources._gdal import PerThread, check_exists, check_name
from perf_vit.sources.files import register_source
from perf_vit.sources.slides.pyramid import Level, PyramidReader, true_downsample
from perf_vit.threads import num_processors
from perf_vit.types import BoolArray, Window

__all__ = ["OpenSlideReader", "import_slide_library"]

_BLOCK_PX = 512

# For each processor: a thread reads a window of a few tiles at a time, and the next thread the one beside it.
_CACHE_BYTES = 8 * 2**20


def import_slide_library(name: str, path: str) -> Any:
    """Import a package of the extra `slides`.

    Raises:
        MissingPackageError: The package isn't installed, or doesn't find its binary.
    """
    with extra("slides", path):
        try:
            return importlib.import_module(name)
        except OSError as error:
            raise ImportError(reason_line(error), name=name) from error


@dataclass(frozen=True, slots=True)
class _Handle:
    """Open slide with its colour transform, if requested."""

    slide: Any
    to_srgb: Any

    def close(self) -> None:
        self.slide.close()


@register_source(".bif", ".czi", ".dcm", ".mrxs", ".ndpi", ".scn", ".svs", ".svslide", ".vms", ".vmu")
class OpenSlideReader(PyramidReader):
    """Levels of a slide read by OpenSlide; label and macro images, which may identify the patient, are never read.

    Args:
        path: Slide.
        to_srgb: Whether to convert with the slide's colour profile, if it has one.

    Raises:
        InputError: The slide can't be opened.
        MissingPackageError: OpenSlide isn't installed.
    """

    dtype = np.dtype(np.uint8)
    band_names: tuple[str, ...] = ("red", "green", "blue")
    # Glass without tissue is white.
    fill = 255

    def __init__(self, path: str, *, to_srgb: bool = False) -> None:
        self._path = path
        self._handle = PerThread(functools.partial(_open, path, to_srgb))
        slide = self._handle.get().slide
        self.format = slide.properties.get("openslide.vendor", "unknown")
        self._downsamples = tuple(float(value) for value in slide.level_downsamples)
        self.levels = _levels(slide.level_dimensions)
        self.mpp_yx = _mpp_yx(slide.properties)
        self.objective_power = _number(slide.properties, "openslide.objective-power")
        self.bounds = _bounds(slide.properties, self.levels[0])

    def read(self, level: int, window: Window) -> tuple[npt.NDArray[Any], BoolArray]:
        """Read pixels [3, h, w], white where not scanned, and a mask of scanned pixels, [1, h, w].

        Raises:
            DamagedDataError: The slide is damaged there.
        """
        if self._downsamples[level].is_integer():
            return self._read_at(level, window)
        # OpenSlide positions are whole pixels of level 0. Where these aren't whole pixels of the level, it shifts
        # by the rest; fixed block positions make this shift independent of the window.
        pixels = np.empty((3, *window.shape), np.uint8)
        mask = np.empty((1, *window.shape), bool)
        for block in _blocks(window):
            part = block.intersect(window)
            assert part is not None
            rows, cols = part.slices_in(window)
            block_rows, block_cols = part.slices_in(block)
            block_pixels, block_mask = self._read_at(level, block)
            pixels[:, rows, cols] = block_pixels[:, block_rows, block_cols]
            mask[:, rows, cols] = block_mask[:, block_rows, block_cols]
        return pixels, mask

    def close(self) -> None:
        """Close this thread's handle."""
        self._handle.close()

    def _read_at(self, level: int, window: Window) -> tuple[npt.NDArray[Any], BoolArray]:
        handle = self._handle.get()
        place = tuple(round(at * self._downsamples[level]) for at in (window.col, window.row))
        try:
            picture = handle.slide.read_region(place, level, (window.width, window.height))
        except _openslide().OpenSlideError as error:
            # OpenSlide handles are unusable after an error; a new one can read other regions.
            self.close()
            raise DamagedDataError(
                f"can't read rows {window.row} to {window.row_stop}, columns {window.col} to {window.col_stop} of "
                f"level {level} of {self._path}: {_reason(error)}; the file may be truncated or damaged"
            ) from error
        alpha = np.asarray(picture)[..., 3] > 0
        if handle.to_srgb is not None:
            picture = ImageCms.applyTransform(picture.convert("RGB"), handle.to_srgb)
        pixels = np.array(np.asarray(picture)[..., :3].transpose(2, 0, 1), order="C")
        pixels[:, ~alpha] = self.fill
        return pixels, alpha[None]


def _blocks(window: Window) -> list[Window]:
    rows = range(window.row // _BLOCK_PX * _BLOCK_PX, window.row_stop, _BLOCK_PX)
    cols = range(window.col // _BLOCK_PX * _BLOCK_PX, window.col_stop, _BLOCK_PX)
    return [Window(row, col, _BLOCK_PX, _BLOCK_PX) for row in rows for col in cols]


def _openslide() -> Any:
    return importlib.import_module("openslide")


def _open(path: str, to_srgb: bool) -> _Handle:
    openslide = import_slide_library("openslide", path)
    check_name(path)
    check_exists(path)
    try:
        slide = openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise InputError(f"can't open {path} as a slide: {_reason(error)}") from error
    # Each handle, one for each slide and thread, would keep 32 MiB of its own: gigabytes for the slides of a training.
    slide.set_cache(_decoded_tiles(os.getpid()))
    return _Handle(slide, _srgb_transform(slide, path) if to_srgb else None)


@functools.cache
def _decoded_tiles(process: int) -> Any:
    """Return the cache of decoded tiles that all slides and threads of a process share.

    A forked process needs its own: another thread may have held the lock of this one.
    """
    return _openslide().OpenSlideCache(_CACHE_BYTES * num_processors())


def _srgb_transform(slide: Any, path: str) -> Any:
    """Return the conversion to sRGB; None, with a warning, if the slide has a profile that can't be used."""
    try:
        profile = slide.color_profile
        if profile is None:
            return None
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(profile, srgb, "RGB", "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC)
    # Which errors damaged profiles raise isn't documented: OSError, PyCMSError, ...
    except Exception as error:
        warn_once(
            f"profile of {path}",
            f"{path} is read without conversion to sRGB, because its ICC profile can't be used: {reason_line(error)}",
        )
        return None


def _levels(sizes: Any) -> tuple[Level, ...]:
    full_width, full_height = sizes[0]
    return tuple(
        Level(height, width, (true_downsample(full_height, height), true_downsample(full_width, width)))
        for width, height in sizes
    )


def _mpp_yx(properties: Any) -> tuple[float, float] | None:
    y, x = (_number(properties, f"openslide.mpp-{axis}") for axis in "yx")
    return None if y is None or x is None else (y, x)


def _number(properties: Any, name: str) -> float | None:
    """Return a property that is a number above 0; None for others."""
    try:
        number = float(properties[name])
    except (KeyError, ValueError):
        return None
    return number if number > 0 else None


def _bounds(properties: Any, full: Level) -> Window | None:
    """Return the scanned area, which QuPath shows; None if the file gives none, or all of level 0."""
    try:
        row, col, height, width = (
            int(properties[f"openslide.bounds-{side}"]) for side in ("y", "x", "height", "width")
        )
    except (KeyError, ValueError):
        return None
    whole = Window(0, 0, full.height, full.width)
    bounds = Window(row, col, height, width).intersect(whole)
    return None if bounds == whole else bounds


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or "unsupported or missing file"
