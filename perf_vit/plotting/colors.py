"""Colours of classes that differ with any colour vision."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np

from perf_vit.plotting.pictures import Picture
from perf_vit.types import IGNORE_INDEX, LabelArray

__all__ = ["colorize", "default_colormap"]

Color = tuple[int, int, int, int]

_BACKGROUND: Color = (64, 64, 64, 255)

# Okabe and Ito, "Color Universal Design" (2008): told apart with any colour vision.
_OKABE_ITO = ("e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "d55e00", "cc79a7")


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


def _opaque(rgb: Sequence[int]) -> Color:
    red, green, blue = rgb
    return red, green, blue, 255


def _generated(index: int) -> Color:
    # Steps of the golden ratio never come close to an earlier hue for long.
    hue = (0.11 + index * 0.618034) % 1
    lightness = (0.35, 0.55, 0.75)[index % 3]
    return _opaque([round(255 * channel) for channel in colorsys.hls_to_rgb(hue, lightness, 0.7)])
