"""Bands of rasters: selection, validity, nodata, scale and offset."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from rasterio.enums import ColorInterp, MaskFlags

from perf_vit.errors import InputError, warn_once
from perf_vit.sources._gdal import color_kinds, read_window
from perf_vit.types import BoolArray, Window

__all__ = [
    "BandLayout",
    "Palette",
    "PixelArray",
    "PixelOptions",
    "alpha_bands",
    "choose_bands",
    "colormap_of",
    "common_dtype",
    "fits",
    "holds_data",
    "is_finite",
    "is_nodata_by_band",
    "mask_bands",
    "names_of",
    "nodata_values",
    "warn_of_alpha",
]

_OPACITY = ("alpha", "opacity", "transparen", "mask", "valid")


def choose_bands(dataset: Any, path: str, bands: Sequence[int | str] | None) -> tuple[int, ...]:
    """1-based numbers of the bands to read.

    Args:
        dataset: an open rasterio dataset.
        path: its name in errors.
        bands: numbers or names; None for all but alpha bands.

    Raises:
        InputError: the file has no such band.
    """
    if dataset.count == 0:
        parts = dataset.subdatasets
        hint = f"open one of its {len(parts)} subdatasets, such as {parts[0]}" if parts else "choose another file"
        raise InputError(f"{path} has no bands; {hint}")
    if bands is None:
        alpha = alpha_bands(dataset)
        return tuple(i for i in dataset.indexes if i not in alpha) or tuple(dataset.indexes)
    names = names_of(dataset, dataset.indexes)
    numbers = tuple(_number_of(band, names, path) if isinstance(band, str) else band for band in bands)
    wrong = [band for band in numbers if not 1 <= band <= dataset.count]
    if wrong or not numbers:
        got = f"got {wrong[0]}" if wrong else "got none"
        raise InputError(f"bands of {path} must be names or numbers from 1 to {dataset.count}, which it has; {got}")
    return numbers


def names_of(dataset: Any, bands: Sequence[int]) -> tuple[str, ...]:
    """Descriptions of bands, "band_1" and so on where they have none."""
    # Of all bands at each access, which takes minutes for thousands.
    names = dataset.descriptions
    return tuple(names[band - 1] or f"band_{band}" for band in bands)


def alpha_bands(dataset: Any) -> tuple[int, ...]:
    """Numbers of the bands that hold opacity: those tagged alpha, unless their description is another word.

    GDAL tags the fourth band of every TIFF of 8 bits that it writes without being told what the band is.
    """
    bands = zip(color_kinds(dataset), dataset.descriptions, strict=True)
    return tuple(i for i, (kind, text) in enumerate(bands, 1) if kind == ColorInterp.alpha and _is_opacity(text))


def _is_opacity(description: str | None) -> bool:
    text = (description or "").lower()
    return not text or re.fullmatch(r"band[ _]?\d+", text) is not None or any(word in text for word in _OPACITY)


def warn_of_alpha(path: str, band: int, num_bands: int) -> None:
    """Tell, once a process, that a band is taken as a mask."""
    every = ", ".join(str(number) for number in range(1, num_bands + 1))
    warn_once(
        "alpha",
        f"band {band} of {path} is tagged as alpha and taken as a mask: where it is 0, pixels are not valid; so are "
        f"those of other files. If it is data, such as near infrared, read it with bands=[{every}] (data.bands)",
    )


def common_dtype(dataset: Any, path: str, bands: Sequence[int]) -> np.dtype[Any]:
    """The dtype that holds the pixels of all these bands.

    Raises:
        InputError: the pixels are complex.
    """
    dtypes = dataset.dtypes
    names = {dtypes[band - 1] for band in bands}
    if any(name.startswith("complex") for name in names):
        raise InputError(f"{path} holds complex pixels; write their magnitude to a file and open that")
    return np.result_type(*names)


def colormap_of(dataset: Any, band: int) -> dict[int, tuple[int, int, int, int]] | None:
    """Value to (red, green, blue, alpha), None where the band has no palette."""
    if color_kinds(dataset)[band - 1] != ColorInterp.palette:
        return None
    return dict(dataset.colormap(band))


def _number_of(name: str, names: Sequence[str], path: str) -> int:
    places = [number for number, known in enumerate(names, 1) if known == name]
    if len(places) == 1:
        return places[0]
    if places:
        raise InputError(f"bands {', '.join(map(str, places))} of {path} are all called {name!r}; give a number")
    lower = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    hint = f"; did you mean {lower[near[0]]!r}" if near else ""
    raise InputError(f"{path} has no band {name!r}{hint}; its bands are {', '.join(names)}")


def holds_data(pixels: npt.NDArray[Any], nodata: Sequence[float | None]) -> BoolArray:
    """True where a value is finite and not nodata.

    Args:
        pixels: [C, H, W].
        nodata: one value a band, None where a band has none.

    Returns:
        [C, H, W], or [1, H, W] where all bands are alike.
    """
    mask = np.ones((1, *pixels.shape[1:]), bool)
    if any(value is not None for value in nodata):
        # NaN differs from itself, so it is no nodata here and not finite below.
        missing = np.stack(
            [
                np.zeros(band.shape, bool) if value is None else band == band.dtype.type(value)
                for band, value in zip(pixels, nodata, strict=True)
            ]
        )
        mask = ~(missing if is_nodata_by_band(nodata, pixels.dtype) else np.asarray(missing.all(0, keepdims=True)))
    return mask & is_finite(pixels) if pixels.dtype.kind == "f" else mask


def is_finite(pixels: npt.NDArray[Any]) -> BoolArray:
    """True where a value is a number that float32, the networks' dtype, can hold."""
    return np.isfinite(pixels) if pixels.dtype.itemsize <= 4 else np.abs(pixels) <= np.finfo(np.float32).max


def is_nodata_by_band(nodata: Sequence[float | None], dtype: np.dtype[Any]) -> bool:
    """Whether a nodata value means a missing value in its band alone, or only where all bands hold theirs.

    0, and any value of 8-bit pixels, may be data, too: the red of a dark green pixel, the blue of a yellow one.
    """
    return dtype.itemsize > 1 and any(value not in (None, 0) for value in nodata)


def nodata_values(
    dataset: Any, path: str, bands: Sequence[int], dtype: np.dtype[Any], given: float | None
) -> tuple[float | None, ...]:
    """The nodata value of each band: the one given, or what the file declares and its pixels can hold.

    Raises:
        InputError: the pixels can't hold the value given.
    """
    if given is not None:
        if not fits(given, dtype):
            raise InputError(f"nodata of {path} must be a value of its {dtype} pixels, got {given}")
        return (given,) * len(bands)
    # Of all bands at each access, which takes minutes for thousands.
    nodata = dataset.nodatavals
    declared = [nodata[band - 1] for band in bands]
    # Files often declare what their pixels can't hold, -9999 in bytes: then no pixel is missing.
    return tuple(value if value is not None and fits(value, dtype) else None for value in declared)


def fits(value: float, dtype: np.dtype[Any]) -> bool:
    """Whether pixels of a dtype can hold a value."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return not math.isfinite(value) or bool(np.isfinite(dtype.type(value)))
    limits = np.iinfo(dtype)
    return math.isfinite(value) and value == int(value) and limits.min <= value <= limits.max


def mask_bands(dataset: Any, bands: Sequence[int]) -> tuple[int, ...]:
    """Bands whose mask band, inside the file or beside it, is to be read: none, one for all, or each."""
    derived = {MaskFlags.all_valid, MaskFlags.nodata, MaskFlags.alpha}
    # As above.
    of_all = dataset.mask_flag_enums
    flags = [set(of_all[band - 1]) for band in bands]
    masked = [each for each in flags if not derived & each]
    if not masked:
        return ()
    return (bands[0],) if all(MaskFlags.per_dataset in each for each in masked) else tuple(bands)


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
