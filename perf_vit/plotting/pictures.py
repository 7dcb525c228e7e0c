"""RGB pictures of imagery, PNG output, and figures with their text."""

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
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage

from perf_vit.errors import InputError, OutputError
from perf_vit.files import staged
from perf_vit.text import printable
from perf_vit.types import GeoImage, Source

__all__ = [
    "SOFTWARE",
    "add_legend",
    "color_bands",
    "figure_height",
    "figure_name",
    "has_tissue",
    "label_font",
    "label_text",
    "natural_bands",
    "rgb_from",
    "save_figure",
    "save_png",
    "stretch_limits",
    "tissue_picture",
]

SOFTWARE = "perf_vit"
"""Value of the tag "Software" of pictures, by which a search for images knows them as outputs."""

# Longer names would leave no room for the plot.
_MAX_CHARS = 40


def label_text(name: str) -> str:
    r"""Shorten a name for a picture and escape characters that the font lacks, such as "\u6f22".

    Without the escapes, all such names would be equal rows of boxes.
    """
    shown = "".join(char if _has_letter(char) else char.encode("unicode_escape").decode() for char in printable(name))
    return shown if len(shown) <= _MAX_CHARS else f"{shown[: _MAX_CHARS - 1]}…"


def label_font(size: int) -> ImageFont.FreeTypeFont:
    """Return the font of all pictures (Latin, Greek, Cyrillic, Arabic and Hebrew letters) at a height in pixels."""
    return ImageFont.truetype(str(_font_file()), size)


@cache
def _has_letter(char: str) -> bool:
    return bool(_letters().get_char_index(ord(char)))


@cache
def _letters() -> FT2Font:
    return FT2Font(str(_font_file()))


def _font_file() -> Path:
    # Part of matplotlib, whose figures also use it.
    return Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def figure_name(name: str) -> str:
    r"""Escape a name for matplotlib, which would parse text between two $ as a formula."""
    return label_text(name).replace("$", r"\$")


def figure_height(num_labels: int) -> float:
    """Return the height of a figure with a legend of `num_labels` entries, in inches."""
    return max(5.0, 1.5 + 0.22 * num_labels)


def add_legend(axes: Any, lines: Sequence[Any], labels: Sequence[str]) -> None:
    """Add a legend with all labels, including those with a leading underscore, which matplotlib omits."""
    legend = axes.legend(lines, [f"line {number}" for number in range(len(lines))])
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)


Picture = npt.NDArray[np.uint8]

_FIGURE_DPI = 110
_STRETCH_SAMPLES = 1_000_000


def rgb_from(
    image: GeoImage, bands: Sequence[int] | None = None, limits: Sequence[tuple[float, float]] | None = None
) -> Picture:
    """Return an RGB picture: three bands of 8 bits as they are, others stretched between two percentiles.

    The stretch is from the 2nd to the 98th percentile of each band. Invalid pixels are white.

    Args:
        image: Pixels and valid mask.
        bands: 1-based indices of the red, green and blue band, or of one grey band; None for the first three bands, or
            the first if there are fewer.
        limits: Result of `stretch_limits`, for pictures of several parts of a source; None for those of the image.

    Returns:
        RGB image, [H, W, 3] uint8.

    Raises:
        InputError: There are neither one nor three bands, or a band doesn't exist.
    """
    chosen = _chosen_bands(image, bands)
    if image.pixels.dtype == np.uint8 and len(chosen) == 3:
        channels = [image.pixels[band - 1] for band in chosen]
    else:
        mask = np.broadcast_to(image.mask, image.pixels.shape)
        spans = limits or stretch_limits(image, bands)
        channels = [
            _stretch(image.pixels[band - 1], mask[band - 1], span) for band, span in zip(chosen, spans, strict=True)
        ]
    picture = np.stack(channels * (3 // len(channels)), axis=-1)
    picture[~image.valid] = 255
    return picture


def stretch_limits(image: GeoImage, bands: Sequence[int] | None = None) -> list[tuple[float, float]]:
    """Return the values of each band that become black and white; see `rgb_from`."""
    mask = np.broadcast_to(image.mask, image.pixels.shape)
    return [_limits(image.pixels[band - 1][mask[band - 1]]) for band in _chosen_bands(image, bands)]


def _chosen_bands(image: GeoImage, bands: Sequence[int] | None) -> list[int]:
    count = len(image.pixels)
    chosen = list(bands or ([1, 2, 3] if count >= 3 else [1]))
    if len(chosen) not in (1, 3) or not all(1 <= band <= count for band in chosen):
        raise InputError(f"expected one or three of the bands 1 to {count} for a picture, got {chosen}")
    return chosen


def save_png(path: str | Path, picture: Picture) -> None:
    """Write a picture, [H, W, 3] or [H, W, 4], atomically.

    Raises:
        OutputError: The path isn't writable.
    """
    target = Path(path)
    with staged(target) as folder:
        try:
            mark = PngInfo()
            mark.add_text("Software", SOFTWARE)
            Image.fromarray(picture).save(folder / target.name, format="PNG", pnginfo=mark)
        except OSError as error:
            raise OutputError(f"can't write {path}: {error.strerror or error}") from error


def save_figure(path: str | Path, figure: Any) -> None:
    """Write a matplotlib figure, atomically.

    Raises:
        OutputError: The path isn't writable.
    """
    target = Path(path)
    with staged(target) as folder:
        try:
            metadata = {"Software": SOFTWARE} if target.suffix.lower() == ".png" else None
            figure.savefig(folder / target.name, dpi=_FIGURE_DPI, metadata=metadata)
        except OSError as error:
            raise OutputError(f"can't write {path}: {error.strerror}; choose another output") from error


def _limits(values: npt.NDArray[Any]) -> tuple[float, float]:
    if values.size == 0:
        return 0.0, 0.0
    sample = values[:: max(1, values.size // _STRETCH_SAMPLES)].astype(np.float64)
    low, high = np.percentile(sample, (2, 98))
    return float(low), float(high)


def _stretch(band: npt.NDArray[Any], valid: npt.NDArray[np.bool_], limits: tuple[float, float]) -> Picture:
    low, high = limits
    scaled = (np.where(valid, band, low).astype(np.float64) - low) / max(high - low, np.finfo(float).tiny)
    return np.round(scaled.clip(0, 1) * 255).astype(np.uint8)


def natural_bands(source: Source) -> list[int] | None:
    """Return the 1-based indices of the bands named red, green and blue ("Red", "red_B4"), None unless all exist."""
    return color_bands(source.band_names)


def color_bands(names: Sequence[str]) -> list[int] | None:
    """Return the 1-based indices of the names with red, green and blue; see `natural_bands`."""
    words = [re.findall("[a-z]+", name.lower()) for name in names]
    found = [next((i for i, name in enumerate(words, 1) if color in name), 0) for color in ("red", "green", "blue")]
    return found if all(found) else None


_TISSUE_COLOR = (0, 160, 60)


def has_tissue(source: Source) -> bool:
    """Return whether a source is a slide opened with `tissue`."""
    return getattr(source, "options", {}).get("tissue") is not None


def tissue_picture(source: Source, max_size_px: int = 1024) -> Picture:
    """Draw a whole slide with the outline of its tissue: the first picture to look at.

    Args:
        source: Slide, opened with `tissue`.
        max_size_px: Maximum size of the longest side in pixels.

    Returns:
        RGB picture, [H, W, 3].
    """
    image = source.read_reduced(max_size_px)
    everything = np.ones((1, *image.valid.shape), bool)
    picture = rgb_from(GeoImage.from_mask(image.pixels, everything, None, image.transform, image.mpp)).copy()
    rim = image.valid & ~ndimage.binary_erosion(image.valid, np.ones((3, 3)), iterations=2)
    picture[rim] = _TISSUE_COLOR
    return picture
