"""What a forward pass over a whole image takes: tokens, trips, time, memory and disk, before anything runs."""

from __future__ import annotations

import math
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from perf_vit.errors import InputError, OutputError
from perf_vit.inference.dense import Strip
from perf_vit.sources.slides import SlideSource
from perf_vit.streaming import ImageTokens, stream_tokens
from perf_vit.streaming.dense import DenseHead
from perf_vit.streaming.tokens import PART_TOKENS, READ_PARTS
from perf_vit.threads import num_processors, process_groups
from perf_vit.types import GeoImage, Source, Window

__all__ = ["Encode", "WholePlan", "measured", "plan_whole"]

Encode = Callable[[Strip], npt.NDArray[Any]]
"""A strip to the pixels of a map."""

_TOKEN_VALUES, _WINDOW_VALUES = 20, 4
"""Values of a token that is computed, in channels: normed, queries, keys, values, hidden layer; columns of windows."""

_HEAD_BYTES = 700
"""Bytes of a pixel of a part in a decoder."""

_FIXED_BYTES = 2**24
"""Bytes of sums, of buffers and of the map's writer."""

_SPARE_SHARE, _SPARE_BYTES = 1.05, 2**26
"""Room on the disk beyond the tokens."""

_SIDE = 72
"""Rows and columns of tokens that are timed: more than are attended to exactly."""

_REDUCED_PX = 1024
_MEMORY_INFO = Path("/proc/meminfo")


@dataclass(frozen=True, kw_only=True)
class WholePlan:
    """Size of a forward pass over a whole image.

    Attributes:
        grid: Rows and columns of tokens.
        num_tokens: Tokens to compute: about those with a valid pixel of a slide, all of a raster.
        num_trips: How often the image or its tokens are gone over: to embed them, in each block, for the head.
        file_bytes: Bytes of the tokens after one block.
        num_files: Number of such files at a time, or of arrays in memory.
        folder: Folder of the files; None for memory.
        memory_bytes: Peak memory beyond that of the imports.
        free_memory: Memory that is free, on the machine and in its container; None where the system doesn't say.
        free_disk: Room on the disk of the folder; None for memory.
        seconds: Time; None unless `measured`.
        timed: Rows and columns of tokens that were timed.
    """

    grid: tuple[int, int]
    num_tokens: int
    num_trips: int
    file_bytes: int
    num_files: int
    folder: Path | None
    memory_bytes: int
    free_memory: int | None
    free_disk: int | None
    seconds: float | None = None
    timed: tuple[int, int] | None = None

    @property
    def disk_bytes(self) -> int:
        """Bytes of all files at a time."""
        return 0 if self.folder is None else self.num_files * self.file_bytes

    def check(self) -> None:
        """Refuse what doesn't fit.

        Raises:
            OutputError: The disk or the memory is too small; the message says what is needed.
        """
        needed = int(self.disk_bytes * _SPARE_SHARE) + _SPARE_BYTES
        if self.free_disk is not None and needed > self.free_disk + _bytes_in(self.folder):
            raise OutputError(
                f"the tokens need {needed / 1e9:.1f} GB in {self.folder}, got {self.free_disk / 1e9:.1f} GB free; give "
                "`token_folder` on a larger disk, or `store=bfloat16` for half of it"
            )
        if self.free_memory is not None and self.memory_bytes > self.free_memory:
            wanted, free = (number / 1e9 for number in (self.memory_bytes, self.free_memory))
            what = "`store=float32` for a file" if self.folder is None else "more memory, or windows without `whole`"
            raise OutputError(f"a whole image needs {wanted:.1f} GB of memory, got {free:.1f} GB free; use {what}")


def plan_whole(
    head: DenseHead, source: Source, part: tuple[int, int], num_classes: int, folder: Path | None, dtype: torch.dtype
) -> WholePlan:
    """Return what a map takes, without its time.

    Args:
        head: Head of the network.
        source: Image.
        part: Rows and columns of tokens of a part.
        num_classes: Number of scores per pixel.
        folder: Folder of the tokens; None for memory.
        dtype: Dtype of stored tokens.
    """
    grid = -(-source.height // head.patch[0]), -(-source.width // head.patch[1])
    num_tokens = round(grid[0] * grid[1] * _valid_share(source))
    file_bytes, num_files = num_tokens * head.vit.embed_dim * dtype.itemsize, head.num_files(in_place=folder is None)
    memory = _memory_bytes(head, source, grid, part, num_classes)
    return WholePlan(
        grid=grid,
        num_tokens=num_tokens,
        num_trips=head.num_trips,
        file_bytes=file_bytes,
        num_files=num_files,
        folder=folder,
        memory_bytes=memory + (num_files * file_bytes if folder is None else 0),
        free_memory=_free_memory(),
        free_disk=None if folder is None else shutil.disk_usage(_existing(folder)).free,
    )


def measured(
    plan: WholePlan, head: DenseHead, source: Source, normalize: Any, part: tuple[int, int], encode: Encode
) -> WholePlan:
    """Return a plan with the time: of a piece of the image through one block and two, and of a part of the map."""
    piece = _Piece(source, *(min(side, _SIDE) * px for side, px in zip(plan.grid, head.patch, strict=True)))
    image = ImageTokens(head.vit, piece, normalize)
    # The first pass also pays for caches and threads that the run sets up once.
    _timed(head, image, 1)
    first, _ = _timed(head, image, 1)
    both, tokens = _timed(head, image, min(2, len(head.vit.blocks)))
    block = max(both - first, first / 10) if len(head.vit.blocks) > 1 else first
    blocks = first + block * head.indices[-1]
    window = Window(0, 0, *(min(sides) for sides in zip(image.grid, part, strict=True)))
    outer = head.with_margin(window, image.grid)
    started = time.perf_counter()
    pixels = torch.from_numpy(np.ascontiguousarray(normalize(piece.read(head.in_pixels(outer)))))[None]
    scores = head.scores([tokens] * len(head.indices), window, pixels).float().numpy()
    of_head = (time.perf_counter() - started) / (outer.height * outer.width)
    started = time.perf_counter()
    strip = Strip(head.in_pixels(window), scores, np.ones(scores.shape[1:], bool))
    found = np.ascontiguousarray(encode(strip))
    # Once for strips and once for the map.
    for _ in range(2):
        zlib.compress(found.data, 1)
    of_map = (time.perf_counter() - started) / (window.height * window.width)
    of_token = blocks / (image.grid[0] * image.grid[1])
    # Neighbouring parts overlap by their margins.
    times = math.prod(
        sum(outers) / side for outers, side in zip(_outer_sides(head, plan.grid, part), plan.grid, strict=True)
    )
    return replace(plan, seconds=plan.num_tokens * (of_token + of_head * times + of_map), timed=image.grid)


class _Piece:
    """Piece in the middle of a source, all of whose pixels count."""

    def __init__(self, source: Source, height: int, width: int) -> None:
        self.path, self.num_bands = source.path, source.num_bands
        self.height, self.width = height, width
        self._source = source
        self._corner = max(0, source.height - height) // 2, max(0, source.width - width) // 2

    def read(self, window: Window) -> GeoImage:
        row, col = self._corner
        image = self._source.read(Window(window.row + row, window.col + col, window.height, window.width))
        return GeoImage.from_mask(image.pixels, np.ones(image.pixels.shape, bool))


def _timed(head: DenseHead, image: ImageTokens, num_blocks: int) -> tuple[float, Any]:
    started = time.perf_counter()
    tokens, _ = stream_tokens(head.vit, image, num_blocks=num_blocks)
    return time.perf_counter() - started, tokens


def _memory_bytes(
    head: DenseHead, source: Source, grid: tuple[int, int], part: tuple[int, int], num_classes: int
) -> int:
    channels, columns, bands = head.vit.embed_dim, grid[1], source.num_bands
    has_windows = any(block.attn.mixer.needs_sample for block in head.vit.blocks)
    all_tokens = grid[0] * columns
    tokens = min(max(PART_TOKENS, columns * head.rows_at_once(grid)), all_tokens)
    read_tokens = min(max(READ_PARTS * PART_TOKENS, columns), all_tokens)
    token_px = head.patch[0] * head.patch[1]
    rows_of_parts, columns_of_parts = _outer_sides(head, grid, part)
    part_px = max(rows_of_parts) * max(columns_of_parts) * token_px
    # Rows that wait for those below, and one as the input of the network.
    waiting = read_tokens + head.reach.margin * columns
    pixel = bands * (source.dtype.itemsize + 1)
    reading = token_px * (waiting * pixel + read_tokens * bands * 8) + read_tokens * channels * 4
    # Pixels are gone before the blocks begin.
    encoder = max(reading, tokens * channels * 4 * (_TOKEN_VALUES + _WINDOW_VALUES * has_windows))
    scores = part[0] * head.patch[0] * source.width * (num_classes * 4 + 1)
    maps = part_px // token_px * channels * 4 * len(head.indices)
    other_px = sum(rows_of_parts) * sum(columns_of_parts) * token_px - part_px
    ahead = min((num_processors() + 1) * part_px, other_px) * (pixel + 4 * bands)
    of_head = part_px * (4 * (num_classes + bands) if head.is_linear else _HEAD_BYTES) + maps + scores + ahead
    return int(max(encoder, of_head) + 16 * grid[0] * grid[1] + _FIXED_BYTES)


def _outer_sides(head: DenseHead, grid: tuple[int, int], part: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Return the rows of all bands of parts with their margins, and the columns of the parts of a band."""
    (rows, columns), (height, width) = grid, part
    bands = [Window(row, 0, min(height, rows - row), columns) for row in range(0, rows, height)]
    parts = [Window(0, column, rows, min(width, columns - column)) for column in range(0, columns, width)]
    return [head.with_margin(band, grid).height for band in bands], [
        head.with_margin(each, grid).width for each in parts
    ]


def _valid_share(source: Source) -> float:
    """Share of the tokens that count: of a slide, as a small picture says; reading others reduced may take long."""
    if not isinstance(source, SlideSource):
        return 1.0
    try:
        return min(1.0, 1.1 * float(source.read_reduced(_REDUCED_PX).valid.mean()) + 0.01)
    except InputError:
        # A level that is damaged may be one that the map doesn't need.
        return 1.0


def _free_memory() -> int | None:
    """Return the memory that is free on this machine, and in the container that this process may run in."""
    found = [_free_of_machine(), *map(_free_in_group, process_groups("memory"))]
    return min((each for each in found if each is not None), default=None)


def _free_of_machine() -> int | None:
    try:
        lines: Sequence[str] = _MEMORY_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _free_in_group(group: Path) -> int | None:
    """Return the memory that a control group leaves, with pages of files, which it gives back; None without a limit."""
    is_second = (group / "memory.max").exists()
    names = ("max", "current") if is_second else ("limit_in_bytes", "usage_in_bytes")
    # Of a group of version 1, only these include the groups below it.
    of_files = [f"{'' if is_second else 'total_'}{name}_file" for name in ("active", "inactive")]
    with suppress(OSError, ValueError):
        limit, used = (int((group / f"memory.{name}").read_text(encoding="utf-8")) for name in names)
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        return max(0, limit - used + sum(int(stat.get(name, 0)) for name in of_files))
    return None


def _existing(folder: Path) -> Path:
    """Return a folder, or the next one above it that exists."""
    return next(each for each in (folder, *folder.absolute().parents) if each.is_dir())


def _bytes_in(folder: Path | None) -> int:
    """Return the bytes of files that are there already, of a call that was interrupted."""
    if folder is None or not folder.is_dir():
        return 0
    stats = [file.stat() for file in folder.glob("*.bin")]
    # Windows has no blocks; files are of their final size there.
    return sum(stat.st_blocks * 512 if hasattr(stat, "st_blocks") else stat.st_size for stat in stats)
