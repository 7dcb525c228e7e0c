"""Cloud-Optimised GeoTIFF, assembled from strips on disk."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy.typing as npt

from perf_vit.errors import OutputError
from perf_vit.files import staged
from perf_vit.sources import bounded_cache
from perf_vit.sources._gdal import GDAL_ERRORS, plain_images_allowed, reason_of
from perf_vit.writers.cog_file import write_cog_file
from perf_vit.writers.layout import HeldRows, RasterLayout
from perf_vit.writers.pyramid import Pyramid
from perf_vit.writers.strips import StripStore

__all__ = ["CogWriter", "write_cog"]


def write_cog(store: StripStore | HeldRows, layout: RasterLayout, made: Path, path: Path) -> None:
    """Write all rows of a store to a COG with overviews, and read it once to compare checksums.

    The output is byte-reproducible for the same pixels.

    Args:
        store: Store with all rows; used up.
        layout: Layout of the raster, whose overviews are made as in the store's.
        made: File to write.
        path: Name of the output, for errors.

    Raises:
        OutputError: Rows are missing, or the disk is full.
    """
    layout.check_complete(store.gaps(0, layout.height), path)
    try:
        with bounded_cache(), plain_images_allowed(), closing(_pyramid(store, layout)) as pyramid:
            write_cog_file(made, layout, pyramid, path)
    except (*GDAL_ERRORS, OSError) as error:
        raise OutputError(f"can't write {path}: {reason_of(error)}; is the disk full?") from error


def _pyramid(store: StripStore | HeldRows, layout: RasterLayout) -> Pyramid:
    if isinstance(store, StripStore):
        return store.pyramid()
    pyramid = Pyramid(layout, store.folder)
    while not pyramid.is_complete:
        pyramid.add(store.pixels[:, slice(*pyramid.next_rows)])
    return pyramid


class CogWriter:
    """Writer of a Cloud-Optimised GeoTIFF from full-width strips of rows, in any order.

    Strips go to a hidden folder next to the output; when the `with` block ends, they are written with overviews and
    moved to its name. After an exception nothing is left, and an earlier output is unchanged.

        with CogWriter("map.tif", RasterLayout(height=h, width=w, num_bands=1, dtype=np.dtype("uint8"))) as writer:
            writer.write(0, strip)

    Args:
        path: Output file; missing parent folders are created.
        layout: Size, placement and metadata of the raster.
    """

    def __init__(self, path: str | Path, layout: RasterLayout) -> None:
        self.path = Path(path)
        self._layout = layout
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Prepare the output.

        Raises:
            OutputError: The output can't be written.
        """
        with ExitStack() as stack:
            self._folder = stack.enter_context(staged(self.path))
            self._store = StripStore(self._folder, self._layout, self.path, encode_early=True)
            stack.callback(self._store.close)
            stack.push(self._finish)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the output, or remove all files after an exception.

        Raises:
            OutputError: Rows are missing, or the disk is full.
        """
        self._stack.__exit__(kind, error, trace)

    def write(self, row: int, block: npt.NDArray[Any]) -> None:
        """Write a strip of rows; each row once.

        Args:
            row: First row of the strip.
            block: Pixels in the file's dtype, [C, h, width].

        Raises:
            OutputError: The strip has another shape or dtype or exceeds the file, or the disk is full.
        """
        self._store.write(row, block)

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            write_cog(self._store, self._layout, self._folder / self.path.name, self.path)
