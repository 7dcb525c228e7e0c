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
    """Return the 1-based numbers of the bands to read.

    Args:
        dataset: Open rasterio dataset.
        path: Its name, for errors.
        bands: Numbers or names; None for all but alpha bands.

    Raises:
        InputError: A band doesn't exist.
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
    """Return the descriptions of bands; "band_1" and so on if they have none."""
    # Accessed once, as it reads all bands each time, which takes minutes for thousands.
    names = dataset.descriptions
    return tuple(names[band - 1] or f"band_{band}" for band in bands)


def alpha_bands(dataset: Any) -> tuple[int, ...]:
    """Return the numbers of opacity bands: those tagged as alpha, unless their description says otherwise.

    GDAL tags the fourth band of every 8-bit TIFF that it writes without further information.
    """
    bands = zip(color_kinds(dataset), dataset.descriptions, strict=True)
    return tuple(i for i, (kind, text) in enumerate(bands, 1) if kind == ColorInterp.alpha and _is_opacity(text))


def _is_opacity(description: str | None) -> bool:
    text = (description or "").lower()
    return not text or re.fullmatch(r"band[ _]?\d+", text) is not None or any(word in text for word in _OPACITY)


def warn_of_alpha(path: str, band: int, num_bands: int) -> None:
    """Warn once per process that a band is taken as a mask."""
    every = ", ".join(str(number) for number in range(1, num_bands + 1))
    warn_once(
        "alpha",
        f"band {band} of {path} is tagged as alpha and taken as a mask: where it is 0, pixels are not valid; so are "
        f"those of other files. If it is data, such as near infrared, read it with bands=[{every}] (data.bands)",
    )


def common_dtype(dataset: Any, path: str, bands: Sequence[int]) -> np.dtype[Any]:
    """Return the dtype that holds the pixels of all bands.

    Raises:
        InputError: The pixels are complex.
    """
    dtypes = dataset.dtypes
    names = {dtypes[band - 1] for band in bands}
    if any(name.startswith("complex") for name in names):
        raise InputError(f"{path} holds complex pixels; write their magnitude to a file and open that")
    return np.result_type(*names)


def colormap_of(dataset: Any, band: int) -> dict[int, tuple[int, int, int, int]] | None:
    """Return a mapping of values to (red, green, blue, alpha); None if the band has no palette."""
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
    """Return True where a value is finite and not nodata.

    Args:
        pixels: Pixels, [C, H, W].
        nodata: Nodata value of each band, or None.

    Returns:
        Mask, [C, H, W], or [1, H, W] if it is the same for all bands.
    """
    mask = np.ones((1, *pixels.shape[1:]), bool)
    if any(value is not None for value in nodata):
        # NaN never equals nodata here, but isn't finite below.
        missing = np.stack(
            [
                np.zeros(band.shape, bool) if value is None else band == band.dtype.type(value)
                for band, value in zip(pixels, nodata, strict=True)
            ]
        )
        mask = ~(missing if is_nodata_by_band(nodata, pixels.dtype) else np.asarray(missing.all(0, keepdims=True)))
    return mask & is_finite(pixels) if pixels.dtype.kind == "f" else mask


def is_finite(pixels: npt.NDArray[Any]) -> BoolArray:
    """Return True where a value is finite in float32, the networks' dtype."""
    return np.isfinite(pixels) if pixels.dtype.itemsize <= 4 else np.abs(pixels) <= np.finfo(np.float32).max


def is_nodata_by_band(nodata: Sequence[float | None], dtype: np.dtype[Any]) -> bool:
    """Return whether nodata marks missing values per band, or only where all bands have it.

    0, and any value of 8-bit pixels, may also be data: the red of a dark green pixel, the blue of a yellow one.
    """
    return dtype.itemsize > 1 and any(value not in (None, 0) for value in nodata)


def nodata_values(
    dataset: Any, path: str, bands: Sequence[int], dtype: np.dtype[Any], given: float | None
) -> tuple[float | None, ...]:
    """Return the nodata value of each band: the one given, or the declared one if the dtype can represent it.

    Raises:
        InputError: The dtype can't represent the value given.
    """
    if given is not None:
        if not fits(given, dtype):
            raise InputError(f"nodata of {path} must be a value of its {dtype} pixels, got {given}")
        return (given,) * len(bands)
    # Accessed once, as it reads all bands each time, which takes minutes for thousands.
    nodata = dataset.nodatavals
    declared = [nodata[band - 1] for band in bands]
    # Files often declare values outside the dtype, such as -9999 for bytes: then no pixel is missing.
    return tuple(value if value is not None and fits(value, dtype) else None for value in declared)


def fits(value: float, dtype: np.dtype[Any]) -> bool:
    """Return whether a dtype can represent a value."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return not math.isfinite(value) or bool(np.isfinite(dtype.type(value)))
    limits = np.iinfo(dtype)
    return math.isfinite(value) and value == int(value) and limits.min <= value <= limits.max


def mask_bands(dataset: Any, bands: Sequence[int]) -> tuple[int, ...]:
    """Return the bands whose mask band (internal or side-car) is read: none, one for all, or each."""
    derived = {MaskFlags.all_valid, MaskFlags.nodata, MaskFlags.alpha}
    # Accessed once, as above.
    of_all = dataset.mask_flag_enums
    flags = [set(of_all[band - 1]) for band in bands]
    masked = [each for each in flags if not derived & each]
    if not masked:
        return ()
    return (bands[0],) if all(MaskFlags.per_dataset in each for each in masked) else tuple(bands)


PixelArray = npt.NDArray[Any]

Palette = Literal["keep", "expand"]

# Formats in which an alpha band is always opacity.
_TRUE_ALPHA = {"PNG", "WEBP", "GIF"}


@dataclass(frozen=True, kw_only=True)
class PixelOptions:
    """Options for the pixels of a file, described in `open_source`."""

    bands: Sequence[int | str] | None = None
    nodata: float | None = None
    palette: Palette = "keep"
    apply_scale: bool = False

    def __post_init__(self) -> None:
        if self.palette not in ("keep", "expand"):
            raise InputError(f'palette must be "keep" or "expand", got {self.palette!r}')


@dataclass(frozen=True, kw_only=True)
class BandLayout:
    """Bands of a file.

    Attributes:
        path: Path of the file.
        bands: 1-based numbers of the bands to read.
        alpha_bands: Numbers of the file's alpha bands, without those read as data.
        mask_bands: Bands whose mask band is read; one if the file has one for all.
        raw_dtype: Data type of the bands in the file; the common one if they differ.
        raw_nodata: Nodata value of each band in the file, before scaling and colours.
        dtype: Data type of the pixels that `read` returns.
        nodata: Value of missing pixels that `read` returns, or None.
        names: Name of each band that `read` returns.
        colormap: Value to (red, green, blue, alpha) of the pixels that `read` returns.
        colors: Palette that `read` applies, [values, 4].
        scaling: Scale and offset of each band that `read` applies.
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
            InputError: An option doesn't fit the file.
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
        # An alpha band that is read as data is not a mask.
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
            Pixels [C, *out_shape] and their mask, [C, *out_shape] or [1, *out_shape].

        Raises:
            InputError: The file is damaged there.
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
        """Description of the masks in addition to nodata values, or None."""
        names = [f"band {band} (alpha)" for band in self.alpha_bands]
        return ", ".join([*names, *(["mask band"] if self.mask_bands else [])]) or None

    @property
    def nodata_by_band(self) -> bool:
        """See `is_nodata_by_band`."""
        return is_nodata_by_band(self.raw_nodata, self.raw_dtype)

    def finish(self, raw: PixelArray, mask: BoolArray) -> tuple[PixelArray, BoolArray]:
        """Apply palette or scaling, if requested, and return pixels and mask."""
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
    # One additional transparent row for values without a colour.
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
