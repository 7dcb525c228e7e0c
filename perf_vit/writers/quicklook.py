"""Quicklooks: a scene and its map in one PNG, or a scene with its objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from perf_vit.geometry import Objects
from perf_vit.plotting import colorize, default_colormap, label_font, label_text, natural_bands, rgb_from, save_png
from perf_vit.plotting.colors import Color, shown_classes, shown_index
from perf_vit.plotting.panels import outlined_polygons
from perf_vit.plotting.pictures import Picture
from perf_vit.sources import open_map
from perf_vit.types import Source

__all__ = ["write_map_quicklook", "write_object_quicklook"]

_PANEL_PX = 1024

_MIN_PANEL_PX = 512

_MARGIN_PX = 12

_LEGEND_PX = 28

# Width of a colour patch and the gap before its name.
_ENTRY_PX = 26


def write_map_quicklook(
    source: Source,
    map_path: str | Path,
    path: str | Path,
    classes: Sequence[str],
    *,
    background: int | None = None,
    multilabel: bool = False,
    scale: float = 1.0,
) -> None:
    """Write a scene and its map side by side, or one above the other, with a legend.

    Args:
        source: Scene.
        map_path: Map of the scene, with one band of class indices or one band of probabilities per class.
        path: Output PNG.
        classes: Class names for the legend, in the order of the class indices.
        background: Index of the background class, drawn in dark grey; None for none.
        multilabel: Whether the map has a band of 0 and 1, or of probabilities, per class. Of several classes at a
            pixel, the most probable or last one is shown.
        scale: Factor from pixels of such a map to probabilities.

    Raises:
        InputError: The scene or the map can't be read.
        OutputError: The picture can't be written.
    """
    names = ["none", *classes] if multilabel else list(classes)
    colors = default_colormap(len(names), 0 if multilabel else background)
    with open_map(map_path) as result:
        image = result.read_reduced(_PANEL_PX)
    labels = shown_classes(image, multilabel=multilabel, scale=scale)
    scene = rgb_from(source.read_reduced(_PANEL_PX), natural_bands(source))
    painted = colorize(labels, colors)
    painted[painted[..., 3] == 0] = 255
    panels = [_enlarge(scene), _enlarge(painted[..., :3])]
    save_png(path, _with_legend(_beside(panels), names, colors))


def write_object_quicklook(source: Source, objects: Objects, path: str | Path, classes: Sequence[str]) -> None:
    """Write a scene with the outlines of its objects, and a legend.

    Args:
        source: Scene or slide.
        objects: Objects in pixels of the source.
        path: Output PNG.
        classes: Class names for the legend, in the order of the class indices.

    Raises:
        InputError: The scene can't be read.
        OutputError: The picture can't be written.
    """
    colors = default_colormap(len(classes))
    scene = _enlarge(rgb_from(source.read_reduced(2 * _PANEL_PX), natural_bands(source)))
    scale = scene.shape[1] / source.width, scene.shape[0] / source.height
    # The surest come last, on top.
    labels = objects.labels[::-1].tolist()
    drawn = outlined_polygons(scene, objects.polygons()[::-1], [colors[label] for label in labels], scale)
    save_png(path, _with_legend(_framed(drawn), classes, colors))


def _enlarge(picture: Picture) -> Picture:
    factor = max(1, _MIN_PANEL_PX // max(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def _beside(panels: Sequence[Picture]) -> Picture:
    height, width = panels[0].shape[:2]
    axis = 0 if width > 2 * height else 1
    gap = np.full((_MARGIN_PX, width, 3) if axis == 0 else (height, _MARGIN_PX, 3), 255, np.uint8)
    return _framed(np.concatenate([panels[0], gap, panels[1]], axis=axis))


def _framed(picture: Picture) -> Picture:
    return np.pad(picture, ((_MARGIN_PX, _MARGIN_PX), (_MARGIN_PX, _MARGIN_PX), (0, 0)), constant_values=255)


def _with_legend(picture: Picture, classes: Sequence[str], colors: Mapping[int, Color]) -> Picture:
    """Add rows of colour patches and class names below."""
    font, classes = label_font(16), [label_text(name) for name in classes]
    widths = [_ENTRY_PX + int(font.getlength(name)) + 2 * _MARGIN_PX for name in classes]
    missing = max(0, max(widths) + _MARGIN_PX - picture.shape[1])
    places, num_lines = _legend_places(widths, picture.shape[1] + missing)
    canvas = np.pad(picture, ((0, num_lines * _LEGEND_PX), (0, missing), (0, 0)), constant_values=255)
    drawn = Image.fromarray(canvas)
    draw = ImageDraw.Draw(drawn)
    for index, (name, (x, line)) in enumerate(zip(classes, places, strict=True)):
        y = picture.shape[0] + line * _LEGEND_PX
        draw.rectangle((x, y, x + 18, y + 18), fill=colors[int(shown_index(index))][:3])
        draw.text((x + _ENTRY_PX, y + 9), name, fill=(0, 0, 0), font=font, anchor="lm")
    return np.asarray(drawn)


def _legend_places(widths: Sequence[int], width: int) -> tuple[list[tuple[int, int]], int]:
    """Return (x, line) of each entry, in pixels and lines, and the number of lines."""
    places = []
    x, line = _MARGIN_PX, 0
    for entry in widths:
        if x > _MARGIN_PX and x + entry > width:
            x, line = _MARGIN_PX, line + 1
        places.append((x, line))
        x += entry
    return places, line + 1
