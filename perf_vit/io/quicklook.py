"""Pictures for people: scenes stretched to visible contrast, maps in colour, both in one PNG."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from perf_vit.errors import InputError, OutputError
from perf_vit.io._staging import staged
from perf_vit.io.lettering import lettered, lettering_font
from perf_vit.io.sources import open_source
from perf_vit.types import IGNORE_INDEX, GeoImage, LabelArray, Source

__all__ = [
    "colorize",
    "default_colormap",
    "natural_bands",
    "rgb_from",
    "save_figure",
    "save_png",
    "write_map_quicklook",
]

Picture = npt.NDArray[np.uint8]
Color = tuple[int, int, int, int]

_BACKGROUND: Color = (64, 64, 64, 255)
# Okabe and Ito, "Color Universal Design" (2008): told apart with any colour vision.
_OKABE_ITO = ("e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "d55e00", "cc79a7")
_PANEL_PX = 1024
_MIN_PANEL_PX = 512
_MARGIN_PX = 12
_LEGEND_PX = 28
# A colour patch and the gap before its name.
_ENTRY_PX = 26
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


def colorize(labels: LabelArray, colormap: Mapping[int, tuple[int, ...]]) -> Picture:
    """Colour class indices; those without a colour are transparent.

    Args:
        labels: [H, W] uint8.
        colormap: class index to (red, green, blue) or (red, green, blue, alpha).

    Returns:
        [H, W, 4] uint8.
    """
    table = np.zeros((256, 4), np.uint8)
    for index, color in colormap.items():
        table[index] = (*color, 255)[:4]
    return table[labels]


def default_colormap(num_classes: int, background: int | None = None) -> dict[int, Color]:
    """One opaque colour a class: colours that differ with any colour vision, and dark grey for the background.

    `IGNORE_INDEX` is transparent.
    From the eighth class on colours differ in hue and lightness only as well as so many can.

    Args:
        num_classes: classes, at most 255.
        background: index of the class that is background, if one is.
    """
    colors = [_opaque(bytes.fromhex(code)) for code in _OKABE_ITO]
    colors += [_generated(index) for index in range(max(0, num_classes - len(colors)))]
    if background is not None:
        colors.insert(background, _BACKGROUND)
    return {**dict(enumerate(colors[:num_classes])), IGNORE_INDEX: (0, 0, 0, 0)}


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


def write_map_quicklook(
    source: Source,
    map_path: str | Path,
    path: str | Path,
    classes: Sequence[str],
    *,
    background: int | None = None,
    multilabel: bool = False,
) -> None:
    """Write a scene and its map side by side, or one above the other, with a legend.

    Args:
        source: the scene.
        map_path: the scene's map, a band of class indices or a band of probabilities a class.
        path: the PNG to write.
        classes: names for the legend, in the order of the class indices.
        background: index of the class that is background, if one is; it is dark grey.
        multilabel: the map has a band of 0 and 1, or of probabilities, a class, of which several may be true: where
            they are, the likeliest or last is shown.

    Raises:
        InputError: the scene or the map can't be read.
        OutputError: the picture can't be written.
    """
    names = ["none", *classes] if multilabel else list(classes)
    colors = default_colormap(len(names), 0 if multilabel else background)
    result = open_source(map_path)
    image = result.read_reduced(_PANEL_PX)
    result.close()
    labels = _shown_labels(image) if multilabel else _class_indices(image)
    scene = rgb_from(source.read_reduced(_PANEL_PX), natural_bands(source))
    painted = colorize(labels, colors)
    painted[painted[..., 3] == 0] = 255
    panels = [_enlarge(scene), _enlarge(painted[..., :3])]
    save_png(path, _with_legend(_beside(panels), names, colors))


def _stretch(band: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> Picture:
    values = band[valid]
    if values.size == 0:
        return np.zeros(band.shape, np.uint8)
    sample = values[:: max(1, values.size // _STRETCH_SAMPLES)].astype(np.float64)
    low, high = np.percentile(sample, (2, 98))
    scaled = (np.where(valid, band, low).astype(np.float64) - low) / max(high - low, np.finfo(float).tiny)
    return np.round(scaled.clip(0, 1) * 255).astype(np.uint8)


def _opaque(rgb: Sequence[int]) -> Color:
    red, green, blue = rgb
    return red, green, blue, 255


def _generated(index: int) -> Color:
    # Steps of the golden ratio never come close to an earlier hue for long.
    hue = (0.11 + index * 0.618034) % 1
    lightness = (0.35, 0.55, 0.75)[index % 3]
    return _opaque([round(255 * channel) for channel in colorsys.hls_to_rgb(hue, lightness, 0.7)])


def _class_indices(image: GeoImage) -> LabelArray:
    best = image.pixels[0] if len(image.pixels) == 1 else np.nan_to_num(image.pixels, nan=-1).argmax(0)
    return np.where(image.valid, best, IGNORE_INDEX).astype(np.uint8)


def _shown_labels(image: GeoImage) -> LabelArray:
    """0 where no class is true, or the number of one that is, from 1 on."""
    scores = np.where(image.valid, np.nan_to_num(image.pixels, nan=0), 0)
    # Quantised probabilities go up to 254, labels and other probabilities to 1.
    half = 127 if scores.max() > 1 else 0.5
    # Of several the last.
    best = len(scores) - 1 - scores[::-1].argmax(0)
    return np.where(image.valid, np.where(scores.max(0) > half, best + 1, 0), IGNORE_INDEX).astype(np.uint8)


def natural_bands(source: Source) -> list[int] | None:
    """Where the bands called red, green and blue are ("Red", "red_B4"), if there are all three."""
    words = [re.findall("[a-z]+", name.lower()) for name in source.band_names]
    found = [next((i for i, name in enumerate(words, 1) if color in name), 0) for color in ("red", "green", "blue")]
    return found if all(found) else None


def _enlarge(picture: Picture) -> Picture:
    factor = max(1, _MIN_PANEL_PX // max(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def _beside(panels: Sequence[Picture]) -> Picture:
    height, width = panels[0].shape[:2]
    axis = 0 if width > 2 * height else 1
    gap = np.full((_MARGIN_PX, width, 3) if axis == 0 else (height, _MARGIN_PX, 3), 255, np.uint8)
    joined = np.concatenate([panels[0], gap, panels[1]], axis=axis)
    return np.pad(joined, ((_MARGIN_PX, _MARGIN_PX), (_MARGIN_PX, _MARGIN_PX), (0, 0)), constant_values=255)


def _with_legend(picture: Picture, classes: Sequence[str], colors: Mapping[int, Color]) -> Picture:
    """Add rows of colour patches and class names below."""
    font, classes = lettering_font(16), [lettered(name) for name in classes]
    widths = [_ENTRY_PX + int(font.getlength(name)) + 2 * _MARGIN_PX for name in classes]
    missing = max(0, max(widths) + _MARGIN_PX - picture.shape[1])
    places, num_lines = _legend_places(widths, picture.shape[1] + missing)
    canvas = np.pad(picture, ((0, num_lines * _LEGEND_PX), (0, missing), (0, 0)), constant_values=255)
    drawn = Image.fromarray(canvas)
    draw = ImageDraw.Draw(drawn)
    for index, (name, (x, line)) in enumerate(zip(classes, places, strict=True)):
        y = picture.shape[0] + line * _LEGEND_PX
        draw.rectangle((x, y, x + 18, y + 18), fill=colors[index][:3])
        draw.text((x + _ENTRY_PX, y + 9), name, fill=(0, 0, 0), font=font, anchor="lm")
    return np.asarray(drawn)


def _legend_places(widths: Sequence[int], width: int) -> tuple[list[tuple[int, int]], int]:
    """(x, line) of each entry, in pixels and lines, and the number of lines."""
    places = []
    x, line = _MARGIN_PX, 0
    for entry in widths:
        if x > _MARGIN_PX and x + entry > width:
            x, line = _MARGIN_PX, line + 1
        places.append((x, line))
        x += entry
    return places, line + 1
