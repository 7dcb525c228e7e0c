"""Which bands of a file are read, and what they are called."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from rasterio.enums import ColorInterp

from perf_vit.errors import InputError, warn_once
from perf_vit.io._gdal import color_kinds

__all__ = ["alpha_bands", "choose_bands", "colormap_of", "common_dtype", "names_of", "warn_of_alpha"]

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
