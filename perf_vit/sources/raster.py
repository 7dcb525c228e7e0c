"""Rasters of any size, read by window, with valid mask and EXIF orientation."""

from __future__ import annotations

import functools
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from affine import Affine
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from perf_vit.errors import InputError
from perf_vit.sources._bands import BandLayout, Palette, PixelArray, PixelOptions
from perf_vit.sources._gdal import PerThread, crs_name, open_dataset
from perf_vit.sources._grid import Bounds, Grid
from perf_vit.sources._remote import with_retries
from perf_vit.sources.base import BaseSource
from perf_vit.types import IGNORE_INDEX, BoolArray, GeoImage, Window

__all__ = ["Bounds", "OmeMapSource", "Orientation", "RasterSource", "orientation_of"]

_TAG = 0x0112

_BIG_TIFF = 43


@dataclass(frozen=True)
class Orientation:
    """EXIF orientation, which maps stored pixels to those that viewers show.

    Attributes:
        value: Value of the EXIF tag, 1 to 8; 1 for no change.
    """

    value: int = 1

    @property
    def transposes(self) -> bool:
        """Whether rows and columns are exchanged."""
        return self.value >= 5

    @property
    def flips(self) -> tuple[bool, bool]:
        """Whether rows and columns are reversed, after transposing."""
        return self.value in (3, 4, 7, 8), self.value in (2, 3, 6, 7)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Convert a stored size (height, width) to the shown size, and vice versa."""
        return (width, height) if self.transposes else (height, width)

    def stored_window(self, window: Window, size: tuple[int, int]) -> Window:
        """Return the stored window of a shown window.

        Args:
            window: Window inside the shown image.
            size: Shown size (height, width).
        """
        flip_rows, flip_cols = self.flips
        row = size[0] - window.row_stop if flip_rows else window.row
        col = size[1] - window.col_stop if flip_cols else window.col
        if self.transposes:
            return Window(col, row, window.width, window.height)
        return Window(row, col, window.height, window.width)

    def show(self, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Convert stored pixels [..., h, w] to those that viewers show."""
        shown = stored.swapaxes(-1, -2) if self.transposes else stored
        flip_rows, flip_cols = self.flips
        return np.ascontiguousarray(shown[..., :: -1 if flip_rows else 1, :: -1 if flip_cols else 1])


def orientation_of(dataset: Any, path: str) -> Orientation:
    """Return the EXIF orientation of an open image; 1 if it has a georeference.

    JPEGs may be remote; TIFF, PNG and WebP files must be local.
    """
    if dataset.crs is not None or not dataset.transform.is_identity or dataset.gcps[0] or dataset.rpcs:
        return Orientation()
    if dataset.driver == "JPEG":
        value = dataset.tags().get("EXIF_Orientation", "1").strip()
        return _checked(int(value) if value.isdigit() else 1)
    find = {"GTiff": _of_tiff, "PNG": _of_png, "WEBP": _of_webp}.get(dataset.driver)
    if find is None or not os.path.isfile(path):
        return Orientation()
    try:
        with open(path, "rb") as file:
            return _checked(find(file))
    # An invalid tag doesn't prevent reading the pixels.
    except (OSError, ValueError, SyntaxError, KeyError, struct.error):
        return Orientation()


def _checked(value: Any) -> Orientation:
    return Orientation(value if isinstance(value, int) and 1 <= value <= 8 else 1)


def _of_tiff(file: BinaryIO) -> Any:
    header = file.read(8)
    if header[2] == _BIG_TIFF or header[3] == _BIG_TIFF:
        header += file.read(8)
    directory = ImageFileDirectory_v2(header)
    file.seek(directory.next)
    directory.load(file)
    return directory.get(_TAG, 1)


def _of_png(file: BinaryIO) -> Any:
    """Read the orientation from the chunk eXIf, which may follow the pixels."""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf":
            exif = Image.Exif()
            exif.load(file.read(length))
            return exif.get(_TAG, 1)
        file.seek(length + 4, os.SEEK_CUR)
    return 1


def _of_webp(file: BinaryIO) -> Any:
    with Image.open(file) as image:
        return image.getexif().get(_TAG, 1)


class RasterSource(BaseSource):
    """Raster on disk or at a URL, opened by `open_source`.

    It can be pickled, forked and shared between threads; each opens its own file.

    Rotated rasters keep their pixels and have a rotated transform. Photos without georeference are read with their EXIF
    orientation applied, as viewers show them.

    Attributes:
        path: Path as given.
        height: Number of rows.
        width: Number of columns.
        bands: 1-based numbers of the bands that `read` returns.
        dtype: Data type of the pixels; the common one if bands differ.
        crs: CRS, or None.
        transform: Transform from pixels (column, row) to CRS coordinates; the identity if the file has none.
        nodata: Value of missing pixels; None if there is none that the dtype can represent.
        band_names: Descriptions of the bands; "band_1" and so on if they have none.
        placed_by_gcps: Whether only ground control points georeference it; pixels are read as stored.
        colormap: Value to (red, green, blue, alpha); None if the first band has no palette.
        mask_name: Mask in addition to nodata values, such as "band 4 (alpha)", or None.
        options: Options of `open_source` that it was opened with.
        opened_from: Input given to `open_source`; None for sources opened otherwise.
    """

    mpp: float | None = None
    _orientation = Orientation()

    def __init__(
        self,
        path: str | Path,
        *,
        bands: Sequence[int | str] | None = None,
        nodata: float | None = None,
        palette: Palette = "keep",
        apply_scale: bool = False,
        opened: Any = None,
    ) -> None:
        self.path = os.fspath(path)
        self._handle = PerThread(functools.partial(open_dataset, self.path), opened)
        dataset = self._handle.get()
        options = PixelOptions(bands=bands, nodata=nodata, palette=palette, apply_scale=apply_scale)
        self._layout = BandLayout.of(dataset, self.path, options)
        self._orientation = orientation_of(dataset, self.path)
        size = self._orientation.size(dataset.height, dataset.width)
        self._describe(self._layout, Grid(dataset.crs, dataset.transform, *size))
        gcps, _ = dataset.gcps
        self.placed_by_gcps = bool(gcps) and self.crs is None

    def _describe(self, layout: BandLayout, grid: Grid) -> None:
        self._grid = grid
        self.height, self.width = grid.height, grid.width
        self.crs = grid.crs
        self.transform: Affine = grid.transform
        self.bands = layout.bands
        self.dtype = layout.dtype
        self.nodata = layout.nodata
        self.band_names = layout.names
        self.colormap = layout.colormap
        self.mask_name = layout.mask_name

    @property
    def num_bands(self) -> int:
        """Number of bands that `read` returns."""
        return len(self.band_names)

    @property
    def files(self) -> list[str]:
        """Local files that GDAL reads: the raster, its side-car files, members of a virtual raster."""
        return list(self._handle.get().files)

    @property
    def orientation(self) -> int:
        """EXIF orientation applied while reading, 1 to 8; 1 for none."""
        return self._orientation.value

    @property
    def bounds(self) -> Bounds:
        """Bounds (left, bottom, right, top) in CRS units; for rotated rasters those of the box around them."""
        return self._grid.bounds

    def _read(self, window: Window) -> GeoImage:
        # A band is invalid outside the raster, if it is nodata or not finite, and if alpha or mask is 0; a pixel is
        # valid if any band is. Pixels outside have the nodata value, or 0.
        shared = window.intersect(self.extent)
        if shared == window:
            pixels, mask = self._read_again(window, window.shape)
        else:
            pixels = np.full((self.num_bands, *window.shape), self.nodata or 0, self.dtype)
            mask = np.zeros((1, *window.shape), bool)
            if shared is not None:
                rows, cols = shared.slices_in(window)
                pixels[:, rows, cols], inside = self._read_again(shared, shared.shape)
                mask = np.zeros((len(inside), *window.shape), bool)
                mask[:, rows, cols] = inside
        return GeoImage.from_mask(pixels, mask, self.crs, self.transform @ Affine.translation(window.col, window.row))

    def read_reduced(self, max_size_px: int, window: Window | None = None) -> GeoImage:
        """Read a window at lower resolution, subsampled or from overviews, for statistics and pictures.

        Args:
            max_size_px: Maximum size of the longest side of the result in pixels; smaller windows are not enlarged.
            window: Window inside the raster; None for all of it.

        Returns:
            Pixels [num_bands, h, w] by nearest neighbour, with the transform of the larger pixels.

        Raises:
            InputError: The window is outside of the raster, or the file is damaged there.
        """
        shared = (window or self.extent).intersect(self.extent)
        if shared is None:
            raise InputError(f"{window} must meet {self.path}, which is {self.height} rows x {self.width} columns")
        step = max(1.0, max(shared.shape) / max_size_px)
        height, width = (max(1, math.floor(side / step + 0.5)) for side in shared.shape)
        pixels, mask = self._read_again(shared, (height, width))
        scale = Affine.scale(shared.width / width, shared.height / height)
        return GeoImage.from_mask(
            pixels, mask, self.crs, self.transform @ Affine.translation(shared.col, shared.row) @ scale
        )

    def close(self) -> None:
        """Close this thread's file handle; the next read opens it again."""
        self._handle.close()

    def __repr__(self) -> str:
        layout = f"{self.height} x {self.width} px, {self.num_bands} x {self.dtype}, {crs_name(self.crs)}"
        return f"{type(self).__name__}({self.path!r}: {layout})"

    def _read_again(self, window: Window, out_shape: tuple[int, int]) -> tuple[PixelArray, BoolArray]:
        """Call `_read_inside`, with retries if a server fails."""
        return with_retries(functools.partial(self._read_inside, window, out_shape), self.close)

    def _read_inside(self, window: Window, out_shape: tuple[int, int]) -> tuple[PixelArray, BoolArray]:
        """Read pixels [C, *out_shape] of a window inside the raster, and their mask, [C or 1, *out_shape]."""
        stored = self._orientation.stored_window(window, self.size)
        read = self._layout.read(self._handle.get(), stored, self._orientation.size(*out_shape))
        if self.orientation == 1:
            return read
        return self._orientation.show(read[0]), self._orientation.show(read[1])


class OmeMapSource(RasterSource):
    """Map that is an OME-TIFF, with the values of its channels.

    A slide's colours are averaged at lower resolution, and have no nodata value.

    Args:
        path: Map as written by `write_ome_tiff`; in maps of 8 bits, 255 means no data.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, nodata=IGNORE_INDEX)
        # GDAL has a dataset for each channel, and opens the first one by the file's name.
        others = self._handle.get().subdatasets[1:]
        self._others = [RasterSource(name, nodata=IGNORE_INDEX) for name in others]
        self.bands = tuple(range(1, len(others) + 2))
        self.band_names = tuple(f"band_{band}" for band in self.bands)

    def close(self) -> None:
        """Close this thread's file handles; the next read opens them again."""
        super().close()
        for channel in self._others:
            channel.close()

    def _read_inside(self, window: Window, out_shape: tuple[int, int]) -> tuple[PixelArray, BoolArray]:
        first = super()._read_inside(window, out_shape)
        read = [first, *(channel._read_inside(window, out_shape) for channel in self._others)]
        mask = np.asarray(np.concatenate([mask for _, mask in read]).any(0, keepdims=True))
        return np.concatenate([pixels for pixels, _ in read]), mask
