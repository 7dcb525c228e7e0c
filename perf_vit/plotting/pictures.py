"""RGB pictures of imagery: contrast stretch, natural colours, PNG; figures and their text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageFont

from perf_vit.errors import InputError, OutputError
from perf_vit.files import staged
from perf_vit.text import printable
from perf_vit.types import GeoImage, Source

__all__ = [
    "add_legend",
    "figure_height",
    "figure_name",
    "lettered",
    "lettering_font",
    "natural_bands",
    "rgb_from",
    "save_figure",
    "save_png",
]

# A longer name would leave no room for what is drawn.
_MAX_CHARS = 40


def lettered(name: str) -> str:
    r"""A name for a picture: characters without a letter in the font are escaped, as "\u6f22", and long names cut.

    Boxes in their place would make all such names look the same.
    """
    shown = "".join(char if _has_letter(char) else char.encode("unicode_escape").decode() for char in printable(name))
    return shown if len(shown) <= _MAX_CHARS else f"{shown[: _MAX_CHARS - 1]}…"


def lettering_font(size: int) -> ImageFont.FreeTypeFont:
    """The font of all pictures, which has Latin, Greek, Cyrillic, Arabic and Hebrew letters, in pixels of height."""
    return ImageFont.truetype(str(_font_file()), size)


@cache
def _has_letter(char: str) -> bool:
    return bool(_letters().get_char_index(ord(char)))


@cache
def _letters() -> FT2Font:
    return FT2Font(str(_font_file()))


def _font_file() -> Path:
    # It comes with matplotlib, whose figures use it too.
    return Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def figure_name(name: str) -> str:
    r"""A name as figures show it literally: a pair of $ would begin and end a formula, \$ is a dollar."""
    return lettered(name).replace("$", r"\$")


def figure_height(num_labels: int) -> float:
    """Inches that a figure needs for a legend of as many labels."""
    return max(5.0, 1.5 + 0.22 * num_labels)


def add_legend(axes: Any, lines: Sequence[Any], labels: Sequence[str]) -> None:
    """Add a legend with all labels, those that begin with an underscore too, which matplotlib leaves out."""
    legend = axes.legend(lines, [f"line {number}" for number in range(len(lines))])
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)


Picture = npt.NDArray[np.uint8]


_FIGURE_DPI = 110


_STRETCH_SAMPLES = 1_000_000


def rgb_from(image: GeoImage, bands: Sequence[int] | None = None) -> Picture:
    """Stretch bands between their 2nd and 98th percentile to a picture; invalid pixels are white.

    Args:
        image: pixels and valid mask.
        bands: 1-based numbers of the red, green and blue band, or of one grey band; by default the first three
            bands, or the first where there are fewer.

    Returns:
        [H, W, 3] uint8.

    Raises:
        InputError: neither one band nor three, or not in the image.
    """
    count = len(image.pixels)
    chosen = list(bands or ([1, 2, 3] if count >= 3 else [1]))
    if len(chosen) not in (1, 3) or not all(1 <= band <= count for band in chosen):
        raise InputError(f"expected one or three of the bands 1 to {count} for a picture, got {chosen}")
    mask = np.broadcast_to(image.mask, image.pixels.shape)
    channels = [_stretch(image.pixels[band - 1], mask[band - 1]) for band in chosen]
    picture = np.stack(channels * (3 // len(channels)), axis=-1)
    picture[~image.valid] = 255
    return picture


def save_png(path: str | Path, picture: Picture) -> None:
    """Write a picture [H, W, 3] or [H, W, 4], which appears when it is complete.

    Raises:
        OutputError: it can't be written there.
    """
    target = Path(path)
    with staged(target) as folder:
        try:
            Image.fromarray(picture).save(folder / target.name, format="PNG")
        except OSError as error:
            raise OutputError(f"can't write {path}: {error.strerror or error}") from error


def save_figure(path: str | Path, figure: Any) -> None:
    """Write a figure of matplotlib; it appears when it is complete.

    Raises:
        OutputError: nothing can be written there.
    """
    target = Path(path)
    with staged(target) as folder:
        try:
            figure.savefig(folder / target.name, dpi=_FIGURE_DPI)
        except OSError as error:
            raise OutputError(f"can't write {path}: {error.strerror}; choose another output") from error


def _stretch(band: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> Picture:
    values = band[valid]
    if values.size == 0:
        return np.zeros(band.shape, np.uint8)
    sample = values[:: max(1, values.size // _STRETCH_SAMPLES)].astype(np.float64)
    low, high = np.percentile(sample, (2, 98))
    scaled = (np.where(valid, band, low).astype(np.float64) - low) / max(high - low, np.finfo(float).tiny)
    return np.round(scaled.clip(0, 1) * 255).astype(np.uint8)


def natural_bands(source: Source) -> list[int] | None:
    """Where the bands called red, green and blue are ("Red", "red_B4"), if there are all three."""
    words = [re.findall("[a-z]+", name.lower()) for name in source.band_names]
    found = [next((i for i, name in enumerate(words, 1) if color in name), 0) for color in ("red", "green", "blue")]
    return found if all(found) else None
