"""EXIF orientation: photos that a camera stored turned or mirrored, read as viewers show them."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from perf_vit.types import Window

__all__ = ["Orientation", "orientation_of"]

_TAG = 0x0112
_BIG_TIFF = 43


@dataclass(frozen=True)
class Orientation:
    """How stored pixels become those that viewers show.

    Attributes:
        value: of the EXIF tag, 1 to 8; 1 leaves all as it is.
    """

    value: int = 1

    @property
    def transposes(self) -> bool:
        """Whether stored rows are shown as columns."""
        return self.value >= 5

    @property
    def flips(self) -> tuple[bool, bool]:
        """Whether rows and columns come in reverse order, after transposing."""
        return self.value in (3, 4, 7, 8), self.value in (2, 3, 6, 7)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) as shown of a stored size, and the other way round."""
        return (width, height) if self.transposes else (height, width)

    def stored_window(self, window: Window, size: tuple[int, int]) -> Window:
        """Where the pixels of a window are stored.

        Args:
            window: inside the image as shown.
            size: (height, width) as shown.
        """
        flip_rows, flip_cols = self.flips
        row = size[0] - window.row_stop if flip_rows else window.row
        col = size[1] - window.col_stop if flip_cols else window.col
        if self.transposes:
            return Window(col, row, window.width, window.height)
        return Window(row, col, window.height, window.width)

    def show(self, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Stored pixels [..., h, w] as viewers show them."""
        shown = stored.swapaxes(-1, -2) if self.transposes else stored
        flip_rows, flip_cols = self.flips
        return np.ascontiguousarray(shown[..., :: -1 if flip_rows else 1, :: -1 if flip_cols else 1])


def orientation_of(dataset: Any, path: str) -> Orientation:
    """The orientation of an open image: that of its EXIF tag, unless a georeference says where its pixels lie.

    JPEGs may lie anywhere, TIFF, PNG and WebP files must be local.
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
    # Whatever is wrong with the tag, the pixels can be read.
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
    """Of the chunk eXIf, which may come after the pixels."""
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
