"""A zoomable picture: layers of tiles, coarse to fine, inside the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from perf_vit.plotting.pictures import Picture
from perf_vit.reporting.page import picture_uri
from perf_vit.sources.pixel_size import pixel_areas
from perf_vit.text import to_json
from perf_vit.types import GeoImage, Source, Window

__all__ = ["Preview", "picture_layer", "pixel_size", "read_picture", "shape_layer"]

_TILE_PX = 512

_SIZE_PX = 4096

# A page of 10 MB opens at once, also from a mail.
_MAX_BYTES = 8_000_000

_UNITS = {"m2": "m", "um2": "µm", "px": "px"}


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A zoomable picture.

    Attributes:
        size: Height and width in pixels of the source.
        layers: Layers from bottom to top, as `picture_layer` and `shape_layer` give them.
        pixel_size: Size of a pixel of the source and its unit, for a scale bar.
    """

    kind: ClassVar[str] = "preview"
    size: tuple[int, int]
    layers: Sequence[dict[str, Any]]
    pixel_size: tuple[float, str] | None = None

    @property
    def json(self) -> str:
        """Data of the viewer, fit for an element of the page."""
        height, width = self.size
        size, unit = self.pixel_size or (None, "")
        content = {"width": width, "height": height, "unit_per_px": size, "unit": unit, "layers": list(self.layers)}
        return to_json(content, ascii_only=True).replace("</", "<\\/")


def pixel_size(source: Source) -> tuple[float, str]:
    """Return the size of a pixel in the middle of a source and its unit: m, µm or px."""
    areas, unit = pixel_areas(source, np.array([[source.width / 2, source.height / 2]]))
    return math.sqrt(areas[0]), _UNITS[unit]


def picture_layer(
    name: str, picture: Picture, *, opacity: float = 1.0, shown: bool = True, max_bytes: int = _MAX_BYTES // 2
) -> dict[str, Any]:
    """Cut a picture into tiles of several levels.

    Levels that would need too many bytes are left out, the finest first.

    Args:
        name: Name of the layer.
        picture: Imagery, [H, W, 3], or classes with transparent pixels, [H, W, 4].
        opacity: Opacity from 0 to 1.
        shown: Whether the layer is shown at first.
        max_bytes: Size of all tiles.
    """
    smooth = picture.shape[-1] == 3
    levels: list[dict[str, Any]] = []
    used = 0
    for reduced in _levels(picture, smooth=smooth):
        tiles = []
        for tile in _tiles(reduced):
            tiles.append(picture_uri(tile))
            used += len(tiles[-1])
            if used > max_bytes:
                break
        if used > max_bytes and levels:
            break
        height, width = reduced.shape[:2]
        rows, cols = -(-height // _TILE_PX), -(-width // _TILE_PX)
        levels.append({"width": width, "tile": _TILE_PX, "rows": rows, "cols": cols, "tiles": tiles})
    return {"name": name, "levels": levels, "opacity": opacity, "shown": shown, "smooth": smooth}


def shape_layer(name: str, shapes: Sequence[tuple[str, Sequence[float]]], *, shown: bool = True) -> dict[str, Any]:
    """Return a layer of lines.

    Args:
        name: Name of the layer.
        shapes: Colour in CSS and x, y, x, y, ... of each line, in pixels of the source.
        shown: Whether the layer is shown at first.
    """
    rounded = [[color, [round(float(value), 1) for value in points]] for color, points in shapes]
    return {"name": name, "shapes": rounded, "opacity": 1.0, "shown": shown, "smooth": False}


def _levels(picture: Picture, *, smooth: bool) -> Iterator[Picture]:
    """Yield a picture at sizes from one tile to its own, coarse to fine."""
    height, width = picture.shape[:2]
    steps = max(0, math.ceil(math.log2(max(height, width) / _TILE_PX)))
    for step in range(steps, -1, -1):
        size = max(1, math.ceil(width / 2**step)), max(1, math.ceil(height / 2**step))
        how = Image.Resampling.BOX if smooth else Image.Resampling.NEAREST
        yield picture if step == 0 else np.asarray(Image.fromarray(picture).resize(size, how))


def _tiles(picture: Picture) -> Iterator[Picture]:
    for row in range(0, picture.shape[0], _TILE_PX):
        for col in range(0, picture.shape[1], _TILE_PX):
            yield picture[row : row + _TILE_PX, col : col + _TILE_PX]


def read_picture(
    source: Source, draw: Callable[[GeoImage], Picture], max_size_px: int = _SIZE_PX, window: Window | None = None
) -> Picture:
    """Draw a source at reduced resolution block by block: only one block is in memory with all its bands.

    Args:
        source: Raster, mosaic or slide.
        draw: Makes a picture [h, w, C] of pixels.
        max_size_px: Longest side of the picture; smaller sources are not enlarged.
        window: Part of the source; all of it by default.
    """
    part = window or source.extent
    step = max(1, math.ceil(max(part.shape) / max_size_px))
    height, width = -(-part.height // step), -(-part.width // step)
    rows = []
    for row in range(0, height, _TILE_PX):
        blocks = []
        for col in range(0, width, _TILE_PX):
            size = min(_TILE_PX, width - col), min(_TILE_PX, height - row)
            top, left = part.row + row * step, part.col + col * step
            block = Window(
                top, left, min(size[1] * step, part.row_stop - top), min(size[0] * step, part.col_stop - left)
            )
            drawn = draw(source.read_reduced(max(1, math.ceil(max(block.shape) / step)), block))
            if drawn.shape[1::-1] != size:
                drawn = np.asarray(Image.fromarray(drawn).resize(size, Image.Resampling.NEAREST))
            blocks.append(drawn)
        rows.append(np.concatenate(blocks, axis=1))
    return np.concatenate(rows, axis=0)
