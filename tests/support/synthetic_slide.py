"""A generated whole slide of any size.

python tests/support/synthetic_slide.py slide.svs 60000 60000 --mpp 0.5
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
import typer
from scipy.ndimage import gaussian_filter, zoom

__all__ = ["make_slide"]

_NUM_TEXTURES = 16
_GLASS = (242, 241, 244)
_STROMA = (226, 168, 202)
_NUCLEUS = (96, 62, 142)


def make_slide(
    path: Path,
    height: int,
    width: int,
    *,
    mpp: float | None = 0.5,
    tile_px: int = 256,
    tissue_share: float = 0.1,
    seed: int = 0,
) -> Path:
    """Write a pyramidal tiled TIFF of pink tissue with violet nuclei on glass.

    Memory holds one tile at a time, and glass is compressed once: 60,000 x 60,000 pixels take seconds. Levels 1, 2, ...
    are means of 2 x 2, 4 x 4, ... pixels, up to a level of one tile.

    Args:
        path: `.svs` for Aperio's description with the pixel size; else OpenSlide's generic TIFF with resolution tags.
        height: rows of level 0.
        width: columns of level 0.
        mpp: micrometres per pixel of level 0, None to say nothing about it.
        tile_px: side of the file's tiles, a power of 2 from 16 on.
        tissue_share: about how much of the slide is tissue.
        seed: decides everything.

    Returns:
        The path.
    """
    rng = np.random.default_rng(seed)
    kinds = _kinds(rng, -(-height // tile_px), -(-width // tile_px), tissue_share)
    bank = np.stack([np.full((tile_px, tile_px, 3), _GLASS, np.uint8), *_textures(rng, tile_px, mpp or 0.5)])
    num_levels = 1
    while max(height, width) >> (num_levels - 1) > tile_px and 1 << num_levels <= tile_px:
        num_levels += 1
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for level in range(num_levels):
            pyramid = _Level(-(-height // (1 << level)), -(-width // (1 << level)), level)
            _write_level(writer, pyramid, _reduced(bank, level), kinds, mpp, path.suffix.lower() == ".svs")
    return path


@dataclass(frozen=True, slots=True)
class _Level:
    height: int
    width: int
    level: int


def _write_level(
    writer: Any, level: _Level, bank: npt.NDArray[np.uint8], kinds: npt.NDArray[np.int64], mpp: float | None, svs: bool
) -> None:
    side = bank.shape[1]
    tile_px = side << level.level
    place: dict[str, Any] = {}
    description = None
    if svs:
        shown = "" if mpp is None else f"|MPP = {mpp:g}"
        description = f"Aperio Image Library\r\n{level.width}x{level.height} ({tile_px}x{tile_px})|AppMag = 20{shown}"
    elif mpp is not None:
        per_cm = 1e4 / (mpp * (1 << level.level))
        place = {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
    writer.write(
        _tiles(level, bank, kinds),
        shape=(level.height, level.width, 3),
        dtype=np.uint8,
        tile=(tile_px, tile_px),
        photometric="rgb",
        compression="zlib",
        subfiletype=1 if level.level else 0,
        description=description,
        metadata=None,
        software=False,
        **place,
    )


def _tiles(level: _Level, bank: npt.NDArray[np.uint8], kinds: npt.NDArray[np.int64]) -> Iterator[bytes]:
    """Compressed tiles of a level, row by row; `bank` holds the textures at the level's resolution."""
    across = 1 << level.level
    tile_px = bank.shape[1] * across
    glass = zlib.compress(np.full((tile_px, tile_px, 3), _GLASS, np.uint8).tobytes(), 9)
    single = [zlib.compress(tile.tobytes(), 1) for tile in bank] if across == 1 else []
    for row in range(-(-level.height // tile_px)):
        for col in range(-(-level.width // tile_px)):
            held = np.zeros((across, across), np.int64)
            part = kinds[row * across : (row + 1) * across, col * across : (col + 1) * across]
            held[: part.shape[0], : part.shape[1]] = part
            if not held.any():
                yield glass
            elif across == 1:
                yield single[held[0, 0]]
            else:
                yield zlib.compress(bank[held].transpose(0, 2, 1, 3, 4).tobytes(), 1)


def _kinds(rng: np.random.Generator, rows: int, cols: int, tissue_share: float) -> npt.NDArray[np.int64]:
    """Which texture each tile of level 0 shows, 0 for glass; [rows, cols]."""
    coarse = gaussian_filter(rng.standard_normal((32, 32)), 3.0)
    field = zoom(coarse, (rows / 32, cols / 32), order=1, grid_mode=True, mode="nearest")[:rows, :cols]
    tissue = field > np.quantile(field, 1 - tissue_share) if field.size > 1 else np.ones((rows, cols), bool)
    return np.where(tissue, rng.integers(1, _NUM_TEXTURES + 1, (rows, cols)), 0)


def _textures(rng: np.random.Generator, side: int, mpp: float) -> Iterator[npt.NDArray[np.uint8]]:
    """Tissue with nuclei of 6 to 10 micrometres, none cut by the tile's edge; [side, side, 3]."""
    y, x = np.mgrid[:side, :side]
    for _ in range(_NUM_TEXTURES):
        # Few different values: the file stays small.
        tile = _STROMA + 12 * np.rint(2 * gaussian_filter(rng.standard_normal((side, side)), 2.0)[..., None])
        for _ in range(max(1, side * side // 1600)):
            radius = min(rng.uniform(3, 5) / mpp, side / 4)
            center_y, center_x = rng.uniform(radius, side - radius, 2)
            tile[(y - center_y) ** 2 + (x - center_x) ** 2 <= radius**2] = _NUCLEUS
        yield np.clip(tile, 0, 255).astype(np.uint8)


def _reduced(bank: npt.NDArray[np.uint8], level: int) -> npt.NDArray[np.uint8]:
    count, side = bank.shape[0], bank.shape[1] >> level
    blocks = bank.reshape(count, side, 1 << level, side, 1 << level, 3)
    return np.asarray(np.rint(blocks.mean((2, 4))), np.uint8)


if __name__ == "__main__":
    typer.run(make_slide)
