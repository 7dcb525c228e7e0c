"""What rasters, mosaics and slides share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, cast

from perf_vit.types import GeoImage, InputPath, Source, Window

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["BaseSource"]


class BaseSource(ABC):
    """A source of pixels; `perf_vit.open` makes one.

    Attributes:
        height: Rows.
        width: Columns.
        colormap: Value to (red, green, blue, alpha), None where there is none.
        options: Options that `perf_vit.open` was given.
        opened_from: Input that `perf_vit.open` was given, None for a source that it didn't open.
    """

    height: int
    width: int
    colormap: dict[int, tuple[int, int, int, int]] | None = None
    options: Mapping[str, Any] = MappingProxyType({})
    opened_from: InputPath | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    @property
    def extent(self) -> Window:
        """Window of all pixels."""
        return Window(0, 0, self.height, self.width)

    def read(self, window: Window | None = None) -> GeoImage:
        """Read a window, which may reach past the edge on any side.

        Args:
            window: Rows and columns, in pixels of this source; all of them by default.

        Returns:
            Pixels [num_bands, height, width] in the source's dtype.

        Raises:
            DamagedDataError: The file is damaged there.
            UnreachableError: A server doesn't deliver it, also after some tries.
        """
        return self._read(self.extent if window is None else window)

    @abstractmethod
    def _read(self, window: Window) -> GeoImage:
        """Read a window; see `read`."""

    @abstractmethod
    def read_reduced(self, max_size_px: int, window: Window | None = None) -> GeoImage:
        """Read a window at lower resolution: for statistics and pictures.

        Args:
            max_size_px: Longest side of the result in pixels; smaller windows are not enlarged.
            window: Part to read; all by default.

        Raises:
            InputError: The window is outside the source, or the file is damaged there.
        """

    def plot(self, max_size_px: int = 1024, bands: Sequence[int] | None = None) -> Image.Image:
        """Draw a thumbnail, which notebooks show.

        Args:
            max_size_px: Longest side in pixels.
            bands: 1-based numbers of the red, green and blue band, or of one grey band; by default the bands of these
                names, else the first three, or the first where there are fewer. Values with a palette have its colours.

        Raises:
            InputError: The file is damaged, or there are no such bands.
        """
        # Pictures load matplotlib.
        from perf_vit.plotting import thumbnail

        return thumbnail(cast(Source, self), max_size_px, bands)

    @abstractmethod
    def close(self) -> None:
        """Close the file handle of this thread; a later read opens it again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
