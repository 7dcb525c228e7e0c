"""Slides with bounds, as MIRAX has them: properties that OpenSlide reads are those of a file and more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import pytest
from slides import write_pyramid

BOUNDS = {"x": 96, "y": 64, "width": 300, "height": 220}
"""Scanned area of `bounded_slide` in pixels of level 0."""

PINK, GLASS = (228, 160, 196), (244, 244, 244)


def with_bounds(monkeypatch: pytest.MonkeyPatch, **bounds: int) -> None:
    """Let OpenSlide tell of bounds for every slide."""
    properties: Callable[[openslide.OpenSlide], dict[str, str]] = openslide.OpenSlide.properties.fget
    more = {f"openslide.bounds-{name}": str(value) for name, value in bounds.items()}
    monkeypatch.setattr(openslide.OpenSlide, "properties", property(lambda slide: {**properties(slide), **more}))


def bounded_slide(path: Path, box: tuple[int, int, int, int], *, height: int = 400, width: int = 480) -> Path:
    """A slide of 0.5 um a pixel: pink in a box (left, top, right, bottom) of level 0, else glass with some noise."""
    pixels = np.empty((height, width, 3), np.int16)
    pixels[:] = GLASS
    pixels[box[1] : box[3], box[0] : box[2]] = PINK
    pixels += np.random.default_rng(0).integers(-4, 5, (height, width, 1), dtype=np.int16)
    full = pixels.clip(0, 255).astype(np.uint8)
    levels = [full[:: 1 << k, :: 1 << k].copy() for k in range(3)]
    return write_pyramid(path, levels, aperio_mpp=0.5)
