"""Cloud-Optimised GeoTIFFs, written strip by strip and shown under their name when they are complete."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from perf_vit.io._staging import staged
from perf_vit.io.cog import write_cog
from perf_vit.io.layout import RasterLayout
from perf_vit.io.strips import StripStore

__all__ = ["CogWriter"]


class CogWriter:
    """Write full-width strips of rows, in any order, into a Cloud-Optimised GeoTIFF.

    Strips go to a hidden folder beside the output; when the `with` block ends well, they are written with overviews
    and moved to its name. After an exception nothing is left, and an earlier output is untouched.

        with CogWriter("map.tif", height=h, width=w, num_bands=1, dtype="uint8", crs=crs, transform=t) as writer:
            writer.write(0, strip)

    Args:
        path: the output; missing parent folders are made.
        dtype: of the pixels.
        **layout: the other fields of `perf_vit.io.RasterLayout`.
    """

    def __init__(self, path: str | Path, *, dtype: npt.DTypeLike, **layout: Any) -> None:
        self.path = Path(path)
        self._layout = RasterLayout(dtype=np.dtype(dtype), **layout)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Prepare the output.

        Raises:
            OutputError: nothing can be written there.
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
        self._store.write(row, block)

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            write_cog(self._store, self._layout, self._folder / self.path.name, self.path)
