"""Base class of rasters, mosaics and slides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, cast

from perf_vit.types import GeoImage, InputPath, Source, Window

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["BaseSource", "has_place"]


def has_place(source: Source | GeoImage) -> bool:
    """Return whether the pixels of a source lie on the ground: a CRS without a transform places none."""
    return source.crs is not None and source.transform is not None and not source.transform.is_identity


class BaseSource(ABC):
    """Source of pixels, opened by `perf_vit.open`.

    Attributes:
        height: Number of rows.
        width: Number of columns.
        colormap: Value to (red, green, blue, alpha), or None.
        options: Options given to `perf_vit.open`.
        opened_from: Input given to `perf_vit.open`; None for sources opened otherwise.
    """

    height: int
    width: int
    colormap: dict[int, tuple[int, int, int, int]] | None = None
    options: Mapping[str, Any] = MappingProxyType({})
    opened_from: InputPath | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Size (height, width)."""
        return self.height, self.width

    @property
    def extent(self) -> Window:
        """Window of all pixels."""
        return Window(0, 0, self.height, self.width)

    def read(self, window: Window | None = None) -> GeoImage:
        """Read a window, which may exceed the source.

        Args:
            window: Window in pixels of this source; None for all of it.

        Returns:
            Pixels [num_bands, height, width] in the source's dtype.

        Raises:
            DamagedDataError: The file is damaged there.
            UnreachableError: A server fails repeatedly.
        """
        return self._read(self.extent if window is None else window)

    @abstractmethod
    def _read(self, window: Window) -> GeoImage:
        """Read a window; see `read`."""

    @abstractmethod
    def read_reduced(self, max_size_px: int, window: Window | None = None) -> GeoImage:
        """Read a window at lower resolution, for statistics and pictures.

        Args:
            max_size_px: Maximum size of the longest side of the result in pixels; smaller windows are not enlarged.
            window: Window to read; None for all of the source.

        Raises:
            InputError: The window is outside the source, or the file is damaged there.
        """

    def plot(self, max_size_px: int = 1024, bands: Sequence[int] | None = None) -> Image.Image:
        """Draw a thumbnail, which notebooks display.

        Args:
            max_size_px: Maximum size of the longest side in pixels.
            bands: 1-based numbers of the red, green and blue band, or of one grey band; None for the bands of these
                names, else the first three, or the first one if there are fewer. Palette values are shown in their
                colours.

        Raises:
            InputError: The file is damaged, or a band doesn't exist.
        """
        # Imported here, as it loads matplotlib.
        from perf_vit.plotting import thumbnail

        return thumbnail(cast(Source, self), max_size_px, bands)

    @abstractmethod
    def close(self) -> None:
        """Close this thread's file handle; the next read opens it again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
