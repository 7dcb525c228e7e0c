"""The same picture as a slide of 0.5 micrometres per pixel in each container, and what can be missing in them."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from dicom_slides import write_dicom_slide
from scipy.ndimage import gaussian_filter
from slides import write_zarr

TILE_PX = 64
COLOURS = ("red", "green", "blue")


def picture(height: int = 333, width: int = 245, *, seed: int = 0) -> np.ndarray:
    """Smooth colours, which JPEG keeps within a few values, [H, W, 3] uint8."""
    noise = np.random.default_rng(seed).standard_normal((height, width, 3))
    smooth = gaussian_filter(noise, (12, 12, 0))
    return (140 + 70 * smooth / np.abs(smooth).max()).round().astype(np.uint8)


def levels_of(pixels: np.ndarray, num_levels: int = 2) -> list[np.ndarray]:
    """Every second pixel of the level before, rounded down."""
    found = [pixels]
    for _ in range(num_levels - 1):
        height, width = found[-1].shape[0] // 2 * 2, found[-1].shape[1] // 2 * 2
        found.append(np.ascontiguousarray(found[-1][:height:2, :width:2]))
    return found


def write_pages(
    path: Path, levels: Sequence[np.ndarray], *, bigtiff: bool = False, aperio: bool = False, **options: Any
) -> Path:
    """A pyramid of pages, in which OpenSlide finds the levels; with extrasamples if there are four colours."""
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as writer:
        for k, level in enumerate(levels):
            stated: dict[str, Any] = {"resolution": (2e4 / 2**k,) * 2, "resolutionunit": "CENTIMETER"}
            if aperio:
                stated = {"description": "Aperio Image Library\r\n|AppMag = 20|MPP = 0.5"}
            writer.write(
                _tiles(level),
                shape=level.shape,
                dtype=level.dtype,
                tile=(TILE_PX, TILE_PX),
                photometric="rgb",
                subfiletype=int(k > 0),
                metadata=None,
                extrasamples=["unassalpha"] * (level.shape[-1] - 3),
                **{"compression": "zlib", **stated, **options},
            )
    return path


def _tiles(level: np.ndarray) -> Iterator[np.ndarray]:
    """Tiles row by row, filled up with the nearest pixels, which cause no artefacts of JPEG."""
    more = [(0, -side % TILE_PX) for side in level.shape[:2]]
    padded = np.pad(level, (*more, (0, 0)), mode="edge")
    for row in range(0, padded.shape[0], TILE_PX):
        for col in range(0, padded.shape[1], TILE_PX):
            yield np.ascontiguousarray(padded[row : row + TILE_PX, col : col + TILE_PX])


def write_ome(path: Path, levels: Sequence[np.ndarray], axes: str) -> Path:
    """A pyramid of sub-images. Axes YXS: samples interleaved; SYX: in planes; CYX: in channels of their own."""
    pages = [level if axes == "YXS" else np.ascontiguousarray(level.transpose(2, 0, 1)) for level in levels]
    size = {f"PhysicalSize{axis}": 0.5 for axis in "XY"} | {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
    options: dict[str, Any] = {"tile": (TILE_PX, TILE_PX), "compression": "zlib"}
    if axes == "CYX":
        options |= {"photometric": "minisblack"}
        size["Channel"] = {"Name": [*COLOURS, "alpha"][: levels[0].shape[-1]]}
    else:
        options |= {"photometric": "rgb", "planarconfig": "contig" if axes == "YXS" else "separate"}
        options |= {"extrasamples": ["unassalpha"] * (levels[0].shape[-1] - 3)}
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(pages[0], subifds=len(pages) - 1, metadata={"axes": axes, **size}, **options)
        for page in pages[1:]:
            writer.write(page, subfiletype=1, **options)
    return path


def write_ome_zarr(path: Path, levels: Sequence[np.ndarray], version: str) -> Path:
    planes = [np.ascontiguousarray(level.transpose(2, 0, 1)) for level in levels]
    return write_zarr(path, planes, version, names=(*COLOURS, "alpha")[: len(planes[0])])


@dataclass(frozen=True)
class Container:
    """A way to store a slide.

    Attributes:
        write: Writes levels [H, W, C] to a folder and returns the path to open.
        drop_tile: Removes the tile of a level at (row, column) of its grid of 64 px; None if it must have all.
        has_alpha: Whether it can hold a fourth colour, opacity.
        largest_error: Largest difference of a value, of lossy compression.
    """

    write: Callable[[Path, Sequence[np.ndarray]], Path]
    drop_tile: Callable[[Path, int, int, int], None] | None
    has_alpha: bool = True
    largest_error: int = 0


def drop_tiff_tile(path: Path, level: int, row: int, col: int) -> None:
    """Leave 0 bytes of a tile in all pages and planes of a level, as sparse TIFFs do."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for page in tiff.series[0].levels[level].pages if tiff.is_ome else [tiff.pages[level]]:
            offsets, counts = list(page.dataoffsets), list(page.databytecounts)
            height, width = page.keyframe.imagelength, page.keyframe.imagewidth
            across = -(-width // TILE_PX)
            plane = across * -(-height // TILE_PX)
            for first in range(0, len(offsets), plane):
                offsets[first + row * across + col] = counts[first + row * across + col] = 0
            tags = page.aspage().tags
            tags["TileOffsets"].overwrite(offsets)
            tags["TileByteCounts"].overwrite(counts)


def drop_chunk(path: Path, level: int, row: int, col: int) -> None:
    """Remove the files of a chunk in all channels."""
    is_old = (path / str(level) / ".zarray").is_file()
    found = list((path / str(level)).glob(f"*.{row}.{col}" if is_old else f"c/*/{row}/{col}"))
    assert found
    for file in found:
        os.remove(file)


CONTAINERS = {
    "pyramidal TIFF": Container(lambda folder, levels: write_pages(folder / "a.tif", levels), drop_tiff_tile),
    "BigTIFF": Container(lambda folder, levels: write_pages(folder / "a.tif", levels, bigtiff=True), drop_tiff_tile),
    "SVS, JPEG": Container(
        lambda folder, levels: write_pages(
            folder / "a.svs", levels, aperio=True, compression="jpeg", compressionargs={"level": 95}
        ),
        drop_tiff_tile,
        has_alpha=False,
        largest_error=6,
    ),
    "OME-TIFF, interleaved": Container(
        lambda folder, levels: write_ome(folder / "a.ome.tif", levels, "YXS"), drop_tiff_tile
    ),
    "OME-TIFF, planar": Container(
        lambda folder, levels: write_ome(folder / "a.ome.tif", levels, "SYX"), drop_tiff_tile
    ),
    "OME-TIFF, channels": Container(
        lambda folder, levels: write_ome(folder / "a.ome.tif", levels, "CYX"), drop_tiff_tile
    ),
    "OME-Zarr 0.4": Container(lambda folder, levels: write_ome_zarr(folder / "a.ome.zarr", levels, "0.4"), drop_chunk),
    "OME-Zarr 0.5": Container(lambda folder, levels: write_ome_zarr(folder / "a.ome.zarr", levels, "0.5"), drop_chunk),
    # TILED_FULL has all tiles.
    "DICOM": Container(lambda folder, levels: write_dicom_slide(folder / "dicom", list(levels)), None, has_alpha=False),
}
