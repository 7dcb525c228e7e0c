"""Tokens of an image in memory or in a file that is mapped into memory."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from perf_vit.errors import OptionError, OutputError

__all__ = ["STORED_DTYPES", "TokenStore"]

STORED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes of stored tokens by name; float64 models store float64."""

# NumPy has no bfloat16, so files hold integers of the same width.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_SPARE_BYTES = 2**26
"""Bytes of a disk that stay free."""


class TokenStore:
    """Array of tokens, [num_tokens, C], of which only some are in memory if it is a file.

    Args:
        num_tokens: Number of tokens.
        num_channels: Number of channels, C.
        dtype: Dtype of the stored values; results of `read` have the dtype of `computed`.
        computed: Dtype of the values that are read.
        path: File to make; None for memory.

    Raises:
        OptionError: The file exists.
        OutputError: The file can't be made, or its disk is too small.
    """

    def __init__(
        self,
        num_tokens: int,
        num_channels: int,
        dtype: torch.dtype = torch.float32,
        computed: torch.dtype = torch.float32,
        path: Path | None = None,
    ) -> None:
        self.path = path
        self._computed = computed
        shape = (num_tokens, num_channels)
        if path is None:
            self._tokens = torch.empty(shape, dtype=dtype)
            return
        num_bytes = num_tokens * num_channels * dtype.itemsize
        _check_disk(path, num_bytes)
        integers = _INTEGERS[dtype.itemsize]
        name = str(integers).removeprefix("torch.")
        self._file = np.memmap(path, dtype=np.dtype(name), mode="r+", shape=shape)
        self._tokens = torch.from_numpy(self._file).view(dtype)

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def num_bytes(self) -> int:
        """Number of bytes of all tokens."""
        return self._tokens.numel() * self._tokens.element_size()

    def read(self, tokens: slice | Tensor) -> Tensor:
        """Return some tokens, [n, C]: a copy."""
        return self._tokens[tokens].to(self._computed, copy=True)

    def write(self, tokens: slice, values: Tensor) -> None:
        """Replace some tokens, [n, C]."""
        self._tokens[tokens] = values.to(self._tokens.dtype)

    def remove(self) -> None:
        """Delete the file, if there is one."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _check_disk(path: Path, num_bytes: int) -> None:
    """Make an empty file of its final size, and check that the disk has room for all of it.

    Files are sparse: a disk that is full later would end the process instead of raising an error.
    """
    if os.path.lexists(path):
        raise OptionError(f"tokens must be a file that doesn't exist yet, got {path}; delete it or choose another")
    try:
        free = shutil.disk_usage(path.parent).free
        if free < num_bytes + _SPARE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with path.open("xb") as file:
            if num_bytes:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OutputError(
            f"can't make {path} with {num_bytes / 1e9:.2f} GB of tokens: {(error.strerror or str(error)).lower()}; "
            "choose a folder on a larger disk, or dtype='bfloat16' for half of it"
        ) from error
