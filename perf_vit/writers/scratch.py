"""Arrays of pixels that are on disk where they are large."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["LARGE_BYTES", "empty_array", "is_large"]

LARGE_BYTES = 1 << 28
"""Larger arrays are on disk: rows of blocks of wide maps of many bands, of which there are several at a time."""

_BYTES_AT_ONCE = 1 << 22


def is_large(shape: tuple[int, ...], dtype: npt.DTypeLike) -> bool:
    """Return whether an array belongs on disk."""
    return _num_bytes(shape, dtype) > LARGE_BYTES


def empty_array(shape: tuple[int, ...], dtype: npt.DTypeLike, folder: Path) -> npt.NDArray[Any]:
    """Return an array of any content: in memory, or where it is large in a file without a name, which goes with it.

    Args:
        shape: Shape of the array.
        dtype: Data type of the array.
        folder: Existing folder for the file.

    Raises:
        OSError: The disk is full.
    """
    if not is_large(shape, dtype):
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(dir=folder) as file:
        # Without room on the disk, writing to the array would end the process.
        _allocate(file, _num_bytes(shape, dtype))
        return np.memmap(file, dtype, "r+", shape=shape)


def _num_bytes(shape: tuple[int, ...], dtype: npt.DTypeLike) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def _allocate(file: Any, num_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            return
        except OSError as error:
            # Not every file system can.
            if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL}:
                raise
    for start in range(0, num_bytes, _BYTES_AT_ONCE):
        file.write(bytes(min(_BYTES_AT_ONCE, num_bytes - start)))
    file.flush()
