"""Chunks of a Zarr array that its folder doesn't hold."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from perf_vit.errors import DamagedDataError
from perf_vit.types import BoolArray

__all__ = ["stored_mask"]


def stored_mask(array: Any, selection: Sequence[int | slice]) -> BoolArray | None:
    """Which of some pixels lie in chunks, or shards, that are stored.

    Zarr reads a chunk that isn't there as the array's fill value. Writers leave out chunks that hold nothing else, and
    files get lost; nothing tells one from the other. An array without fill value may leave out none.

    Args:
        array: a Zarr array.
        selection: a number or a slice an axis, inside the array.

    Returns:
        As `array[selection]` is shaped; None for an array that isn't in a folder.

    Raises:
        DamagedDataError: a chunk of an array without fill value isn't there.
    """
    root = getattr(array.store, "root", None)
    if root is None:
        return None
    folder = os.path.join(os.fspath(root), array.path)
    starts, stops = zip(
        *(_bounds(part, length) for part, length in zip(selection, array.shape, strict=True)), strict=True
    )
    sizes = array.shards or array.chunks
    mask = np.ones([stop - start for start, stop in zip(starts, stops, strict=True)], bool)
    cells = (range(start // n, -(-stop // n)) for start, stop, n in zip(starts, stops, sizes, strict=True))
    for cell in itertools.product(*cells):
        file = os.path.join(folder, array.metadata.encode_chunk_key(cell))
        if os.path.exists(file):
            continue
        if array.metadata.fill_value is None:
            raise DamagedDataError(f"the chunk {file} is missing")
        spans = zip(cell, sizes, starts, strict=True)
        mask[tuple(slice(max(0, i * n - start), (i + 1) * n - start) for i, n, start in spans)] = False
    return mask[tuple(0 if isinstance(part, int) else slice(None) for part in selection)]


def _bounds(part: int | slice, length: int) -> tuple[int, int]:
    if isinstance(part, int):
        return part, part + 1
    start, stop, _ = part.indices(length)
    return start, stop
