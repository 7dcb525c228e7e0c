"""How a file's bands become pixels and a valid mask, whatever grid they are read on."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from perf_vit.errors import InputError
from perf_vit.io._bands import alpha_bands, choose_bands, colormap_of, common_dtype, names_of, warn_of_alpha
from perf_vit.io._gdal import read_window
from perf_vit.io._nodata import holds_data, is_nodata_by_band, mask_bands, nodata_values
from perf_vit.types import BoolArray, Window

__all__ = ["BandLayout", "Palette", "PixelArray", "PixelOptions"]

PixelArray = npt.NDArray[Any]

Palette = Literal["keep", "expand"]

# Formats in which alpha can be nothing else.
_TRUE_ALPHA = {"PNG", "WEBP", "GIF"}


@dataclass(frozen=True, kw_only=True)
class PixelOptions:
    """What the user says about a file's pixels; `open_source` describes each."""

    bands: Sequence[int | str] | None = None
    nodata: float | None = None
    palette: Palette = "keep"
    apply_scale: bool = False

    def __post_init__(self) -> None:
        if self.palette not in ("keep", "expand"):
            raise InputError(f'palette must be "keep" or "expand", got {self.palette!r}')


@dataclass(frozen=True, kw_only=True)
class BandLayout:
    """The bands of one file.

    Attributes:
        path: of the file.
        bands: 1-based numbers of the bands in the file.
        alpha_bands: numbers of the file's alpha bands; those that are read as data are none.
        mask_bands: bands whose mask band is read; one where the file has one for all.
        raw_dtype: of the bands in the file; the common one where they differ.
        raw_nodata: value of missing pixels of each band in the file, before scaling and colours.
        dtype: of the pixels that `read` gives.
        nodata: value that `read`'s missing pixels have, None if there is none.
        names: one a band that `read` gives.
        colormap: value to (red, green, blue, alpha) of the pixels that `read` gives.
        colors: [values, 4], the palette that `read` replaces values by.
        scaling: (scale, offset) of each band that `read` applies.
    """

    path: str
    bands: tuple[int, ...]
    alpha_bands: tuple[int, ...]
    mask_bands: tuple[int, ...]
    raw_dtype: np.dtype[Any]
    raw_nodata: tuple[float | None, ...]
    dtype: np.dtype[Any]
    nodata: float | None
    names: tuple[str, ...]
    colormap: dict[int, tuple[int, int, int, int]] | None
    colors: npt.NDArray[np.uint8] | None
    scaling: tuple[tuple[float, float], ...] | None

    @classmethod
    def of(cls, dataset: Any, path: str, options: PixelOptions) -> BandLayout:
        """Describe an open file.

        Raises:
            InputError: the options don't fit the file.
        """
        bands = choose_bands(dataset, path, options.bands)
        raw_dtype = common_dtype(dataset, path, bands)
        raw_nodata = nodata_values(dataset, path, bands, raw_dtype, options.nodata)
        given: dict[str, Any] = {
            "dtype": raw_dtype,
            "nodata": next((value for value in raw_nodata if value is not None), None),
            "names": names_of(dataset, bands),
            "colormap": colormap_of(dataset, bands[0]),
            "colors": None,
            "scaling": None,
        }
        if options.palette == "expand" and given["colormap"]:
            given |= _expanded(given["colormap"], path, bands)
        elif options.apply_scale:
            given |= _scaled(dataset, bands)
        # A band that is read as data masks nothing.
        alpha = tuple(band for band in alpha_bands(dataset) if band not in bands)
        if alpha and dataset.driver not in _TRUE_ALPHA:
            warn_of_alpha(path, alpha[0], dataset.count)
        return cls(
            path=path,
            bands=bands,
            alpha_bands=alpha,
            mask_bands=mask_bands(dataset, bands),
            raw_dtype=raw_dtype,
            raw_nodata=raw_nodata,
            **given,
        )

    def read(self, dataset: Any, window: Window, out_shape: tuple[int, int]) -> tuple[PixelArray, BoolArray]:
        """Read a window inside the open file.

        Returns:
            Pixels [C, *out_shape] and which hold data, [C, *out_shape] or [1, *out_shape].

        Raises:
            InputError: the file is damaged there.
        """
        read = functools.partial(read_window, dataset, self.path, window)
        pixels = read(indexes=self.bands, out_shape=(len(self.bands), *out_shape), out_dtype=self.raw_dtype)
        mask = holds_data(pixels, self.raw_nodata)
        if self.alpha_bands:
            mask = mask & (read(indexes=self.alpha_bands, out_shape=(len(self.alpha_bands), *out_shape)) > 0).all(0)
        if self.mask_bands:
            shape = (len(self.mask_bands), *out_shape)
            mask = mask & (read(masks=True, indexes=self.mask_bands, out_shape=shape) > 0)
        return self.finish(pixels, mask)

    @property
    def mask_name(self) -> str | None:
        """What masks pixels beside nodata values, in words."""
        names = [f"band {band} (alpha)" for band in self.alpha_bands]
        return ", ".join([*names, *(["mask band"] if self.mask_bands else [])]) or None

    @property
    def nodata_by_band(self) -> bool:
        """See `is_nodata_by_band`."""
        return is_nodata_by_band(self.raw_nodata, self.raw_dtype)

    def finish(self, raw: PixelArray, mask: BoolArray) -> tuple[PixelArray, BoolArray]:
        """Colours instead of palette values, or scaled values, where they were asked for, and which hold data."""
        if self.colors is not None:
            colored = self.colors[np.minimum(raw[0].astype(np.intp), len(self.colors) - 1)]
            return np.ascontiguousarray(np.moveaxis(colored[..., :3], -1, 0)), mask & (colored[..., 3] > 0)
        if self.scaling is None:
            return raw, mask
        scale, offset = np.array(self.scaling).T[..., None, None]
        pixels = (raw * scale + offset).astype(np.float32)
        np.copyto(pixels, np.nan, where=~mask)
        return pixels, mask


def _expanded(colormap: Mapping[int, Sequence[int]], path: str, bands: Sequence[int]) -> dict[str, Any]:
    if len(bands) != 1:
        raise InputError(f'palette="expand" needs one band of {path}, got {len(bands)}; choose it with bands=')
    # One transparent row more: values that the palette doesn't name have no colour.
    colors = np.zeros((max(colormap) + 2, 4), np.uint8)
    for value, color in colormap.items():
        colors[value] = color
    return {
        "dtype": np.dtype(np.uint8),
        "nodata": None,
        "names": ("red", "green", "blue"),
        "colormap": None,
        "colors": colors,
    }


def _scaled(dataset: Any, bands: Sequence[int]) -> dict[str, Any]:
    scales, offsets = dataset.scales, dataset.offsets
    scaling = tuple((scales[band - 1], offsets[band - 1]) for band in bands)
    return {"dtype": np.dtype(np.float32), "nodata": float("nan"), "colormap": None, "scaling": scaling}
