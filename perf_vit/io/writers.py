"""Cloud-Optimised GeoTIFFs, written strip by strip and shown under their name when they are complete."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import rasterio
import rasterio.shutil
from affine import Affine

from perf_vit.errors import OutputError
from perf_vit.io._gdal import GDAL_ERRORS, plain_images_allowed, reason_of
from perf_vit.io._staging import staged

__all__ = ["CogWriter"]

_BLOCK_PX = 512


class CogWriter:
    """Write full-width strips of rows, in any order, into a Cloud-Optimised GeoTIFF.

    Strips go to a tiled file in a hidden folder beside the output; when the `with` block ends well, it is rewritten
    with overviews and moved to its name. After an exception nothing is left, and an earlier output is untouched.

        with CogWriter("map.tif", height=h, width=w, num_bands=1, dtype="uint8", crs=crs, transform=t) as writer:
            writer.write(0, strip)

    Args:
        path: the output; missing parent folders are made.
        height: rows.
        width: columns.
        num_bands: C.
        dtype: of the pixels.
        crs: None for none.
        transform: pixel (column, row) to CRS coordinates, None for none.
        nodata: value of missing pixels.
        colormap: value to (red, green, blue, alpha), 0 to 255; for one band of uint8 or uint16. TIFF keeps no alpha.
        band_names: one description a band.
        tags: metadata of the file.
        overviews: how to make them; by default "nearest" with a colour table and "average" without. Class maps
            without a colour table need "nearest".
    """

    def __init__(
        self,
        path: str | Path,
        *,
        height: int,
        width: int,
        num_bands: int,
        dtype: npt.DTypeLike,
        crs: Any,
        transform: Affine | None,
        nodata: float | None = None,
        colormap: Mapping[int, tuple[int, ...]] | None = None,
        band_names: Sequence[str] | None = None,
        tags: Mapping[str, str] | None = None,
        overviews: Literal["nearest", "average"] | None = None,
    ) -> None:
        self.path = Path(path)
        self._shape = (num_bands, height, width)
        self._dtype = np.dtype(dtype)
        # An identity transform is what a file without georeference reads as.
        place = {} if transform is None or transform.is_identity else {"transform": transform}
        self._profile = {"crs": crs, "nodata": nodata, **place}
        self._colormap = colormap
        self._band_names = band_names
        self._tags = tags or {}
        self._overviews = overviews or ("nearest" if colormap else "average")
        self._checksums: dict[tuple[int, int], int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Prepare the output.

        Raises:
            OutputError: nothing can be written there.
        """
        with ExitStack() as stack:
            self._folder = stack.enter_context(staged(self.path))
            self._strips = self._folder / f"{self.path.name}.strips"
            self._dataset = self._create()
            stack.push(self._finish)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the output, or remove every trace of it after an exception.

        Raises:
            OutputError: the disk is full, or rows are missing.
        """
        self._stack.__exit__(kind, error, trace)

    def write(self, row: int, block: npt.NDArray[Any]) -> None:
        """Write a strip of rows; each row once.

        Args:
            row: of the strip's first line.
            block: [C, h, width] in the file's dtype.

        Raises:
            OutputError: a strip of another shape or dtype, or outside the file, or the disk is full.
        """
        num_bands, height, width = self._shape
        rows = block.shape[1] if block.ndim == 3 else 0
        if (
            block.shape != (num_bands, rows, width)
            or block.dtype != self._dtype
            or rows == 0
            or not 0 <= row <= height - rows
        ):
            raise OutputError(
                f"expected strips [{num_bands}, h, {width}] of {self._dtype} inside {height} rows for {self.path}, "
                f"got {list(block.shape)} of {block.dtype} at row {row}"
            )
        try:
            self._dataset.write(block, window=rasterio.windows.Window(0, row, width, rows))
        except GDAL_ERRORS as error:
            raise self._refusal(error) from error
        self._checksums[row, rows] = zlib.crc32(np.ascontiguousarray(block).data)

    def _create(self) -> Any:
        num_bands, height, width = self._shape
        # Fast compression: the file is read once and removed.
        layout = {"tiled": True, "blockxsize": _BLOCK_PX, "blockysize": _BLOCK_PX, "compress": "deflate", "zlevel": 1}
        try:
            with plain_images_allowed():
                dataset = rasterio.open(
                    self._strips,
                    "w",
                    driver="GTiff",
                    height=height,
                    width=width,
                    count=num_bands,
                    dtype=self._dtype,
                    bigtiff="if_safer",
                    **layout,
                    **self._profile,
                )
        except GDAL_ERRORS as error:
            raise self._refusal(error) from error
        self._describe(dataset)
        return dataset

    def _describe(self, dataset: Any) -> None:
        for band, name in enumerate(self._band_names or (), 1):
            dataset.set_band_description(band, name)
        if self._colormap:
            dataset.write_colormap(1, dict(self._colormap))
        dataset.update_tags(**self._tags)

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        self._dataset.close()
        if kind is not None:
            return
        written = sum(rows for _, rows in self._checksums)
        if written != self._shape[1]:
            raise OutputError(f"expected {self._shape[1]} rows for {self.path}, got {written}")
        try:
            self._convert()
            self._check()
        except GDAL_ERRORS as error:
            raise self._refusal(error) from error

    def _convert(self) -> None:
        rasterio.shutil.copy(
            self._strips,
            self._folder / self.path.name,
            driver="COG",
            compress="deflate",
            # Differences of neighbours compress measurements; of class indices they only make more symbols.
            predictor="no" if self._colormap else "yes",
            blocksize=_BLOCK_PX,
            bigtiff="if_safer",
            overview_resampling=self._overviews,
            num_threads="all_cpus",
        )

    def _check(self) -> None:
        """Read the result once: GDAL tells nobody of errors at closing, such as a disk that is full by then."""
        with plain_images_allowed(), rasterio.open(self._folder / self.path.name) as dataset:
            for (row, rows), expected in self._checksums.items():
                block = dataset.read(window=rasterio.windows.Window(0, row, self._shape[2], rows))
                if zlib.crc32(block) != expected:
                    raise OutputError(f"can't write {self.path}: rows from {row} on differ on disk; is the disk full?")

    def _refusal(self, error: BaseException) -> OutputError:
        return OutputError(f"can't write {self.path}: {reason_of(error)}; is the disk full?")
