"""Tokens of an image in memory or in a file that is mapped into memory."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
        existing: Open a file that was made before instead.

    Raises:
        OptionError: The file exists.
        OutputError: The file can't be made or opened, or there is not enough memory.
    """

    def __init__(
        self,
        num_tokens: int,
        num_channels: int,
        dtype: torch.dtype = torch.float32,
        computed: torch.dtype = torch.float32,
        path: Path | None = None,
        *,
        existing: bool = False,
    ) -> None:
        self.path = path
        self._mapped: np.memmap[Any, Any] | None = None
        self._computed = computed
        shape = (num_tokens, num_channels)
        self._bytes_per_token = num_channels * dtype.itemsize
        self._num_reserved = 0
        if path is None:
            try:
                self._tokens = torch.empty(shape, dtype=dtype)
            except RuntimeError as error:
                size = num_tokens * self._bytes_per_token / 1e9
                raise OutputError(f"can't hold {size:.2f} GB of tokens in memory; give a folder for a file") from error
            return
        if not existing:
            self._make(path, num_tokens)
        elif not path.is_file() or path.stat().st_size < num_tokens * self._bytes_per_token:
            raise OutputError(
                f"{path} must hold {num_tokens:,} tokens and is gone or cut; begin again with `resume=False`"
            )
        else:
            self._num_reserved = num_tokens
        integers = _INTEGERS[dtype.itemsize]
        name = str(integers).removeprefix("torch.")
        self._mapped = np.memmap(path, dtype=np.dtype(name), mode="r+", shape=shape)
        self._tokens = torch.from_numpy(self._mapped).view(dtype)

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
        """Replace some tokens, [n, C].

        Raises:
            OutputError: The disk is too small.
        """
        if self.path is not None and tokens.stop > self._num_reserved:
            self._reserve(self.path, tokens.stop)
        self._tokens[tokens] = values.to(self._tokens.dtype)

    def shrink(self, num_tokens: int) -> None:
        """Leave out all tokens but the first ones."""
        self._tokens = self._tokens[:num_tokens]

    def flush(self) -> None:
        """Wait until all that was written is on disk.

        Raises:
            OutputError: It can't be written.
        """
        if self._mapped is not None and self.path is not None:
            with self._writing(self.path):
                self._mapped.flush()

    def close(self) -> None:
        """Let go of the file, which Windows can't delete before; the tokens can't be read any more."""
        if self._mapped is not None:
            self._tokens, self._mapped = self._tokens.new_empty(0, self._tokens.shape[1]), None

    def remove(self) -> None:
        """Delete the file, if there is one."""
        self.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _make(self, path: Path, num_tokens: int) -> None:
        """Make a file of the final size without content, which takes no room on the disk."""
        if os.path.lexists(path):
            raise OptionError(f"tokens must be a file that doesn't exist yet, got {path}; delete it or choose another")
        with self._writing(path), path.open("xb") as file:
            file.truncate(max(1, num_tokens * self._bytes_per_token))

    def _reserve(self, path: Path, num_tokens: int) -> None:
        """Take room for more tokens: where a disk is full, writing to mapped memory would end the process."""
        start, stop = (number * self._bytes_per_token for number in (self._num_reserved, num_tokens))
        with self._writing(path):
            if shutil.disk_usage(path.parent).free < stop - start + _SPARE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # Other systems than Linux have only the check above.
            if hasattr(os, "posix_fallocate"):
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), start, stop - start)
        self._num_reserved = num_tokens

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"can't write tokens to {path}: {(error.strerror or str(error)).lower()}; choose a folder on a larger "
                "disk, or dtype='bfloat16' for half of it"
            ) from error
