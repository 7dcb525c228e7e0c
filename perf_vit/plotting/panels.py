"""Panels of pictures: classes, errors and outlines of objects over imagery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import shapely
from PIL import Image, ImageDraw

from perf_vit.geometry.boxes import oriented_box_corners
from perf_vit.plotting.colors import Color
from perf_vit.plotting.pictures import Picture, color_bands, label_font, label_text, rgb_from
from perf_vit.types import IGNORE_INDEX, BoolArray, GeoImage

__all__ = [
    "ERROR_COLOR",
    "enlarged",
    "error_panel",
    "on_white",
    "outlined",
    "outlined_polygons",
    "standardized_picture",
    "with_color_bar",
]

ERROR_COLOR = (213, 0, 120)
"""Colour of wrong pixels: no class has it, and it differs from grey imagery with any colour vision."""

_LINE_PX = 2

# Share of the imagery under errors that is left, so that errors stand out.
_IMAGERY = 0.45


def standardized_picture(pixels: npt.NDArray[Any], spec: Any) -> Picture:
    """Return an RGB picture of a network's input, [H, W, 3]: 8-bit imagery as it was, other imagery stretched.

    Args:
        pixels: Standardised pixels, [C, H, W].
        spec: Input spec of the network, with its normalizer and the bands of its training images, if known.
    """
    normalizer, trained = getattr(spec, "normalizer", None), getattr(spec, "trained_on", None)
    values, bands = np.asarray(pixels, np.float64), None
    if normalizer is not None:
        values = values * np.array(normalizer.std)[:, None, None] + np.array(normalizer.mean)[:, None, None]
    if trained is not None:
        bands = color_bands(trained.names)
        if trained.dtype == "uint8":
            values = np.rint(values).clip(0, 255).astype(np.uint8)
    return rgb_from(GeoImage(pixels=values, valid=np.ones(values.shape[1:], bool)), bands)


def on_white(painted: Picture) -> Picture:
    """Return an RGBA picture as RGB, [H, W, 3], with white for what is transparent."""
    painted = painted.copy()
    painted[painted[..., 3] == 0] = 255
    return painted[..., :3]


def error_panel(picture: Picture, truth: npt.NDArray[Any], predicted: npt.NDArray[Any]) -> Picture:
    """Return faded imagery with wrong pixels in `ERROR_COLOR`; unlabelled pixels count as neither.

    Args:
        picture: Imagery, [H, W, 3].
        truth: Class indices, [H, W], or 0 and 1 per class, [K, H, W]; `IGNORE_INDEX` for unlabelled pixels.
        predicted: Predicted classes in the form of `truth`.
    """
    wrong = (truth != predicted) & (truth != IGNORE_INDEX)
    grey = picture.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    faded = np.rint(255 - _IMAGERY * (255 - grey)).astype(np.uint8)
    faded[wrong.any(axis=0) if wrong.ndim == 3 else wrong] = ERROR_COLOR
    return faded


def outlined(
    picture: Picture, objects: Any, keep: BoolArray, kind: str, colors: Mapping[int, Color] | Sequence[Color]
) -> Picture:
    """Draw the outlines of objects of a tile.

    Args:
        picture: Imagery, [H, W, 3].
        objects: Labels or detections, in pixels of the picture.
        keep: Objects to draw, [n].
        kind: Kind of geometry to draw: "boxes", "oriented_boxes" or "masks".
        colors: Colour of each class.
    """
    # Labels may have several geometries; prefer the one that the network predicts.
    masks = _array(objects.masks)[keep] if kind == "masks" and objects.masks is not None else None
    corners = None if masks is not None else _corners(objects, kind)[keep]
    drawn = picture.copy()
    for number, label in enumerate(_array(objects.labels)[keep]):
        color = colors[int(label)][:3]
        if masks is not None:
            drawn[_edge(masks[number])] = color
        elif corners is not None:
            drawn = _with_line(drawn, corners[number], color)
    return drawn


def outlined_polygons(
    picture: Picture,
    polygons: Sequence[Any] | npt.NDArray[Any],
    colors: Sequence[Sequence[int]],
    scale_xy: tuple[float, float],
) -> Picture:
    """Draw the outlines of polygons, each in its colour; later ones are on top.

    Args:
        picture: Imagery, [H, W, 3].
        polygons: Shapely polygons or multipolygons, in pixels of the source.
        colors: Colour of each polygon.
        scale_xy: Pixels of the picture in one of the source, along x and y.
    """
    drawn = Image.fromarray(picture)
    draw = ImageDraw.Draw(drawn)
    for polygon, color in zip(polygons, colors, strict=True):
        for ring in shapely.get_rings(polygon):
            points = shapely.get_coordinates(ring) * scale_xy - 0.5
            draw.line([tuple(point) for point in points.tolist()], fill=tuple(color[:3]), width=_LINE_PX)
    return np.asarray(drawn)


def _corners(objects: Any, kind: str) -> npt.NDArray[np.floating[Any]]:
    """Return the corners of boxes, [n, 4, 2]."""
    if kind == "oriented_boxes" and objects.oriented_boxes is not None:
        return oriented_box_corners(_array(objects.oriented_boxes).astype(np.float64))
    boxes = _array(objects.boxes_xyxy).astype(np.float64)
    return np.stack([boxes[:, [0, 1]], boxes[:, [2, 1]], boxes[:, [2, 3]], boxes[:, [0, 3]]], axis=1)


def _with_line(picture: Picture, corners: npt.NDArray[np.floating[Any]], color: tuple[int, ...]) -> Picture:
    drawn = Image.fromarray(picture)
    # Coordinates refer to pixel edges, lines are drawn at pixel centres.
    points = [tuple(point) for point in (corners - 0.5).tolist()]
    ImageDraw.Draw(drawn).line([*points, points[0]], fill=color)
    return np.array(drawn)


def _edge(mask: BoolArray) -> BoolArray:
    """Return the pixels of a mask that have a neighbour outside it."""
    inner = np.pad(mask, 1)
    return mask & ~(inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:])


def _array(values: Any) -> npt.NDArray[Any]:
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


_BAR_PX = 18
_TEXT_PX = 20


def with_color_bar(picture: Picture, title: str, colormap: str, ends: tuple[str, str]) -> Picture:
    """Add a title above a picture and a colour bar on its right.

    Args:
        picture: Picture, [H, W, 3].
        title: Title; it is cut at the picture's right edge.
        colormap: Name of a matplotlib colour map.
        ends: Labels of the lowest and the highest colour.
    """
    font, texts = label_font(_TEXT_PX), [label_text(end) for end in ends]
    gap, top = _TEXT_PX // 2, 2 * _TEXT_PX
    right = _BAR_PX + 3 * gap + int(max(font.getlength(text) for text in texts))
    height = max(picture.shape[0], 4 * _TEXT_PX)
    canvas = np.full((top + height, max(picture.shape[1], 10 * _TEXT_PX) + right, 3), 255, np.uint8)
    canvas[top : top + picture.shape[0], : picture.shape[1]] = picture
    left = picture.shape[1] + gap
    shades = matplotlib.colormaps[colormap](np.linspace(1, 0, height))[:, None, :3] * 255
    canvas[top : top + height, left : left + _BAR_PX] = np.rint(shades)
    drawn = Image.fromarray(canvas)
    draw, x = ImageDraw.Draw(drawn), left + _BAR_PX + gap
    draw.text((gap, _TEXT_PX), label_text(title), fill="black", font=font, anchor="lm")
    draw.text((x, top + height - 1), texts[0], fill="black", font=font, anchor="ld")
    draw.text((x, top), texts[1], fill="black", font=font, anchor="la")
    return np.asarray(drawn)


def enlarged(picture: Picture, size_px: int) -> Picture:
    """Repeat the pixels of a small picture up to about a size."""
    factor = max(1, size_px // max(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)
