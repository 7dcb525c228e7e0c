"""Cloud-Optimised GeoTIFF, assembled from strips on disk."""

from __future__ import annotations

import functools
import glob
import itertools
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import rasterio
import rasterio.shutil
from rasterio.enums import Resampling

from perf_vit.errors import OutputError
from perf_vit.files import staged
from perf_vit.sources import bounded_cache
from perf_vit.sources._gdal import GDAL_ERRORS, plain_images_allowed, reason_of
from perf_vit.threads import num_processors
from perf_vit.writers.layout import BLOCK_PX, HeldRows, RasterLayout
from perf_vit.writers.strips import StoredStrip, StripStore, fast_compression

__all__ = ["CogWriter", "write_cog"]


def write_cog(store: StripStore | HeldRows, layout: RasterLayout, made: Path, path: Path) -> None:
    """Write all rows of a store to a COG with overviews, and read it once to verify it.

    The output is byte-reproducible for the same pixels.

    Args:
        store: Store with all rows; `HeldRows` only of what `is_one_block`.
        layout: Layout of the raster.
        made: File to write.
        path: Name of the output, for errors.

    Raises:
        OutputError: Rows are missing, or the disk is full.
    """
    try:
        with bounded_cache(), plain_images_allowed():
            if isinstance(store, HeldRows):
                _write_block(store, layout, made, path)
            else:
                _write_strips(store, layout, made, path)
    except GDAL_ERRORS as error:
        raise OutputError(f"can't write {path}: {reason_of(error)}; is the disk full?") from error


def _write_block(rows: HeldRows, layout: RasterLayout, made: Path, path: Path) -> None:
    with rasterio.MemoryFile(ext=".tif") as memory:
        rows.copy_to(memory.name, layout)
        _copy(memory.name, layout, made, num_threads=1)
    with rasterio.open(made) as dataset:
        if not np.array_equal(dataset.read(), rows.pixels, equal_nan=layout.dtype.kind == "f"):
            raise OutputError(f"can't write {path}: pixels differ on disk; is the disk full?")


def _write_strips(store: StripStore, layout: RasterLayout, made: Path, path: Path) -> None:
    # Leftovers of a killed run.
    for leftover in (*made.parent.glob("mosaic.vrt*"), *made.parent.glob(f"{glob.escape(made.name)}*")):
        leftover.unlink()
    mosaic = store.mosaic(layout)
    _add_overviews(mosaic, layout)
    _copy(mosaic, layout, made, num_threads="all_cpus")
    _compare(store, layout, made, path)


def _copy(source: str | Path, layout: RasterLayout, made: Path, *, num_threads: int | str) -> None:
    rasterio.shutil.copy(
        source,
        made,
        driver="COG",
        compress="deflate",
        # The predictor compresses measurements; for class indices it only adds symbols.
        predictor="no" if layout.colormap else "yes",
        # Measurements are noise in their last digits: higher levels take up to twice the time for at most 5 %.
        level=6 if layout.colormap else 1,
        blocksize=BLOCK_PX,
        bigtiff="if_safer",
        overview_resampling=_resampling(layout),
        num_threads=num_threads,
    )


def _resampling(layout: RasterLayout) -> str:
    return layout.overviews or ("nearest" if layout.colormap else "average")


def _add_overviews(mosaic: Path, layout: RasterLayout) -> None:
    """Build overviews of the mosaic, which the COG driver copies: its own are single-threaded and compressed twice."""
    longest = max(layout.height, layout.width)
    factors = [2**level for level in range(1, 32) if longest > BLOCK_PX * 2 ** (level - 1)]
    if not factors:
        return
    predictor = 3 if layout.dtype.kind == "f" else 2
    compression = {"COMPRESS_OVERVIEW": fast_compression(), "ZSTD_LEVEL_OVERVIEW": 1, "PREDICTOR_OVERVIEW": predictor}
    shape = {"INTERLEAVE_OVERVIEW": "BAND", "GDAL_TIFF_OVR_BLOCKSIZE": BLOCK_PX}
    with rasterio.Env(GDAL_NUM_THREADS="ALL_CPUS", **compression, **shape), rasterio.open(mosaic, "r+") as dataset:
        dataset.build_overviews(factors, Resampling[_resampling(layout)])


def _compare(store: StripStore, layout: RasterLayout, made: Path, path: Path) -> None:
    """Compare the file with the strips by rows of blocks: GDAL reports no errors at closing, e.g. of a full disk."""
    groups = [list(group) for _, group in itertools.groupby(store.strips(), lambda strip: strip.row // BLOCK_PX)]
    with rasterio.open(made) as dataset:
        levels = range(len(dataset.overviews(1)))
    with ThreadPoolExecutor(num_processors(), thread_name_prefix="perf_vit-verifier") as pool:
        overviews = pool.map(functools.partial(_read_overview, made), levels)
        list(itertools.chain(overviews, pool.map(functools.partial(_compare_strips, layout, made, path), groups)))


def _compare_strips(layout: RasterLayout, made: Path, path: Path, strips: Sequence[StoredStrip]) -> None:
    with plain_images_allowed(), rasterio.open(made) as dataset:
        for strip in strips:
            block = dataset.read(window=rasterio.windows.Window(0, strip.row, layout.width, strip.num_rows))
            if zlib.crc32(block) != strip.checksum:
                raise OutputError(f"can't write {path}: rows from {strip.row} on differ on disk; is the disk full?")


def _read_overview(made: Path, level: int) -> None:
    with plain_images_allowed(), rasterio.open(made, overview_level=level) as overview:
        for _, window in overview.block_windows(1):
            overview.read(window=window)


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
            self._store = StripStore(self._folder, self._layout, self.path)
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
