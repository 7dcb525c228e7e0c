"""Dense prediction: windows through a model in batches, blended into finished rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perf_vit.errors import InputError, NotFiniteError
from perf_vit.finite import check_finite
from perf_vit.inference.prefetch import (
    Entry,
    Reads,
    Tile,
    in_batches,
    read_ahead,
    takes_valid,
    to_device,
    valid_pixels,
)
from perf_vit.inference.seams import Decide, SeamCount, SeamCounter
from perf_vit.threads import num_processors
from perf_vit.tiling import BLENDS, grid_windows
from perf_vit.types import BoolArray, GeoImage, Window

__all__ = ["FloatArray", "Forward", "RowStitcher", "Strip", "StripMaker", "TileModel", "predict_strips"]

# So few that intermediate results stay in the processor's cache.
_ROWS_AT_ONCE = 32

# Fewer take longer in Python than the comparison takes.
_ROWS_COMPARED = 128

_STRIP_ROWS = 128
"""Rows of a strip at most: a whole row of windows at once would double what the engine holds."""

FloatArray = npt.NDArray[np.float32]

TileModel = Callable[..., Tensor]
"""Tiles [B, C, h, w] float32 to scores [B, K, h, w], at the same resolution.

One that has an argument `valid` is given the valid pixels, bool [B, h, w], or None where all are.
"""


class RowStitcher:
    """Weighted mean of overlapping windows, held for one row of windows at a time.

    The mean is updated window by window, m += (x - m) w / W with W the weight so far, instead of dividing a sum by a
    sum at the end: where all windows agree the result is their value, bit for bit, in float32.

    Memory is [C, window height, scene width], whatever the scene's height: a ring, in which scene row r lies at
    r modulo the window height. Windows must come in the order of `perf_vit.tiling.grid_windows`: row by row, top to
    bottom.

    Args:
        extent: the rows and columns to fill.
        window_height: of every window.
        num_channels: C.
        seams: Counter of the pixels on which windows disagree; None to count none.
    """

    def __init__(self, extent: Window, window_height: int, num_channels: int, seams: SeamCounter | None = None) -> None:
        self._extent = extent
        self._held = Window(extent.row, extent.col, window_height, extent.width)
        # Where the weight is 0, the mean has no meaning yet.
        self._mean = np.empty((num_channels, *self._held.shape), np.float32)
        self._weight = np.zeros(self._held.shape, np.float32)
        self._valid = np.zeros(self._held.shape, bool)
        self._seams = seams

    def add(self, window: Window, scores: FloatArray, valid: BoolArray, weights: FloatArray) -> None:
        """Blend in one window of the current row of windows; what reaches past the extent is cut off.

        Args:
            window: where it lies.
            scores: [C, h, w].
            valid: [h, w], where the source has data.
            weights: [h, w], above 0.
        """
        inside = window.intersect(self._extent)
        assert inside is not None
        assert inside.intersect(self._held) == inside, "windows must come row by row"
        _, held_cols = inside.slices_in(self._held)
        self._compare(window, inside, scores)
        for part, held_rows in self._ring_parts(inside, _ROWS_AT_ONCE):
            source, held = part.slices_in(window), (held_rows, held_cols)
            self._valid[held] |= valid[source]
            mean, before, weight = self._mean[:, *held], self._weight[held], weights[source]
            if not before.any():
                # The first window here: the step below would give the same, in four times the time.
                mean[:] = scores[:, *source]
                before[:] = weight
                continue
            if not before.all():
                mean[:, before == 0] = 0
            total = before + weight
            step = scores[:, *source] - mean
            step *= weight / total
            mean += step
            before[:] = total

    def advance(self, row: int, max_rows: int | None = None) -> Iterator[Strip]:
        """Take out the rows above `row`, which no later window reaches, in blocks.

        Args:
            row: First row of the next row of windows, or the extent's end.
            max_rows: Maximum number of rows of a block; None for no limit.

        Yields:
            Blocks, with scores of 0 where no window was added. The arrays hold until the next block is asked for.
        """
        while self._held.row < row:
            count = min(row - self._held.row, max_rows or self._held.height)
            block = Window(self._held.row, self._extent.col, count, self._extent.width)
            parts = [rows for _, rows in self._ring_parts(block)]
            for rows in parts:
                if not self._weight[rows].all():
                    self._mean[:, rows][:, self._weight[rows] == 0] = 0
            yield Strip(
                block,
                _joined([self._mean[:, rows] for rows in parts], axis=1),
                _joined([self._valid[rows] for rows in parts]),
                self._count_seams(parts),
            )
            for rows in parts:
                self._weight[rows] = 0
                self._valid[rows] = False
            self._held = Window(block.row_stop, self._held.col, *self._held.shape)

    def _compare(self, window: Window, inside: Window, scores: FloatArray) -> None:
        """Compare the part of a window that counts with the windows before it."""
        if self._seams is None:
            return
        for shared in self._seams.shared_parts(window, inside):
            _, held_cols = shared.slices_in(self._held)
            for part, held_rows in self._ring_parts(shared, _ROWS_COMPARED):
                self._seams.add((held_rows, held_cols), scores[:, *part.slices_in(window)])

    def _count_seams(self, parts: list[slice]) -> SeamCount | None:
        """Count the seams of some rows of the ring, and forget them."""
        if self._seams is None:
            return None
        return sum((self._seams.take(rows, self._valid[rows]) for rows in parts), SeamCount())

    def _ring_parts(self, window: Window, max_rows: int | None = None) -> Iterator[tuple[Window, slice]]:
        """A window's rows, cut where the ring begins anew: the part, and its rows of the buffers."""
        height = self._held.height
        row = window.row
        while row < window.row_stop:
            start = (row - self._extent.row) % height
            count = min(window.row_stop - row, height - start, max_rows or height)
            yield Window(row, window.col, count, window.width), slice(start, start + count)
            row += count


def _joined(parts: list[npt.NDArray[Any]], axis: int = 0) -> npt.NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)


@dataclass(frozen=True, slots=True)
class Strip:
    """Finished rows of a scene.

    Attributes:
        window: where they lie in the source.
        scores: [K, h, w] float32, blended.
        valid: [h, w], False where the source has no data.
        seams: Pixels on which overlapping windows disagree; None where no windows overlap, or none are compared.
    """

    window: Window
    scores: FloatArray
    valid: BoolArray
    seams: SeamCount | None = None


def predict_strips(
    model: TileModel,
    source: Reads,
    normalize: Callable[[GeoImage], FloatArray],
    maker: StripMaker,
    *,
    flips: bool = False,
    batch_size: int = 1,
    num_readers: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    finish: Callable[[Strip], Any] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Generator[Any, None, None]:
    """Run a model over a scene in overlapping windows and yield the rows as they are finished, top to bottom.

    Threads read ahead, and another one blends and finishes strips while the model computes the next batch in the
    calling thread. Batches run across rows of windows; windows without a valid pixel skip the model. Windows are
    blended in the order of the grid, so the strips don't depend on the batch size (as far as the model's scores don't)
    nor on which window was read first. Memory is that of one row of windows, and of the strips that are not taken yet.

    Args:
        model: Function from tiles to scores; put an `nn.Module` into evaluation mode and onto the device yourself.
        source: Source of the pixels; several threads read it.
        normalize: Function from a window's pixels to the model's input, [C, h, w].
        maker: Windows and blending of the wanted rows; used up.
        flips: Average the scores of a tile and its three mirror images.
        batch_size: Number of windows in a forward pass.
        num_readers: Number of threads that read; one per processor by default.
        device: Device of the tiles.
        dtype: torch.float32, or torch.bfloat16 / torch.float16 for autocast.
        finish: Function of a strip, called in the thread that blends; its arrays hold until it returns. None to yield
            the strips.
        on_progress: Function of the number of windows done and the total, called in the thread that blends.

    Yields:
        Strips of at most 128 rows that cover the wanted rows once, in order; the first and the last may hold others.
        With `finish`, its result for each.

    Raises:
        InputError: A window can't be read, or the model's output is not [B, num_channels, h, w].
        Exception: Any error of `finish`.
    """
    forward = Forward(model, maker.num_channels, device, dtype, flips)
    readers = num_readers or num_processors()
    tiles = read_ahead(maker.windows, source, normalize, num_threads=readers, depth=2 * batch_size + readers)
    finish = finish or _copied
    done = maker.num_before

    def blended(batch: Sequence[Tile], scores: Sequence[FloatArray | None]) -> list[Any]:
        nonlocal done
        strips = itertools.chain.from_iterable(map(maker.add, batch, scores))
        try:
            finished = [finish(strip) for strip in strips]
        except NotFiniteError as error:
            raise NotFiniteError(f"{getattr(source, 'path', 'the source')}: {error}") from error
        done += len(batch)
        on_progress(done, maker.num_windows)
        return finished

    return in_batches(forward, tiles, blended, batch_size)


def _copied(strip: Strip) -> Strip:
    return Strip(strip.window, strip.scores.copy(), strip.valid.copy(), strip.seams)


class StripMaker:
    """Windows that some rows of a scene need, and the strips of those rows, blended from the windows' scores.

    Args:
        extent: Part of the source to predict.
        num_channels: K, the channels of the scores.
        window_size: Side of a window in pixels.
        overlap: Pixels that neighbouring windows share.
        start_row: First row wanted; the extent's first by default. The strips that hold wanted rows are the same bits
            as those of the whole extent; windows above that reach into them are computed again.
        stop_row: First row below those wanted; the extent's end by default.
        blend: Weights by name, "hann", "gaussian" or a registered one; a window counts least at its edge, where it has
            seen least.
        decide: Function from scores to decisions, to count the pixels on which overlapping windows disagree; see
            `perf_vit.inference.seams`. None to count none.

    Attributes:
        num_channels: K.
        windows: Windows that are needed, row by row.
        num_before: Number of the extent's windows above them.
        num_windows: Number of the extent's windows.
    """

    def __init__(
        self,
        *,
        extent: Window,
        num_channels: int,
        window_size: int,
        overlap: int,
        start_row: int | None = None,
        stop_row: int | None = None,
        blend: str = "hann",
        decide: Decide | None = None,
    ) -> None:
        self._start = extent.row if start_row is None else start_row
        self._stop = extent.row_stop if stop_row is None else stop_row
        rows = _window_rows(extent, window_size, overlap)
        needed = _needed_rows(rows, self._start, self._stop)
        self.windows = [window for row in needed for window in row.windows]
        self.num_before = needed[0].num_before if needed else 0
        self.num_windows = sum(len(row.windows) for row in rows)
        self._end = needed[-1].stop if needed else extent.row
        self._num_left = len(self.windows)
        self._weights = BLENDS[blend](window_size)
        begin = needed[0].windows[0].row if needed else extent.row
        self._extent = Window(begin, extent.col, extent.row_stop - begin, extent.width)
        self.num_channels = num_channels
        self._window_size = window_size
        self._decide = decide if _overlap(rows) else None
        self._grid = [window for row in rows for window in row.windows]
        self._stitcher: RowStitcher | None = None

    def add(self, tile: Tile, scores: FloatArray | None) -> Iterator[Strip]:
        """Blend in the next window, and yield the wanted strips that are finished.

        Args:
            tile: Tile of the window; they come in the order of `windows`.
            scores: Scores [K, h, w], None for a window without a valid pixel.

        Yields:
            Strips, whose arrays hold until the next one is asked for.

        Raises:
            NotFiniteError: A score is infinite or not a number.
        """
        if self._stitcher is None:
            # Made late, as it is large: many scenes may wait for their turn.
            self._stitcher = RowStitcher(self._extent, self._window_size, self.num_channels, self._counter())
        yield from self._finished(tile.window.row)
        if scores is not None:
            if not (np.isfinite(scores.min()) and np.isfinite(scores.max())):
                check_finite(scores[None], "scores", lambda _: str(tile.window))
            self._stitcher.add(tile.window, scores, tile.valid, self._weights)
        self._num_left -= 1
        if self._num_left == 0:
            yield from self._finished(self._end)
            self._stitcher = None

    def _counter(self) -> SeamCounter | None:
        return None if self._decide is None else SeamCounter(self._decide, self._grid, self._extent.width)

    def close(self) -> None:
        """Give up the rows that are not finished, whoever holds this object."""
        self._stitcher = None

    def _finished(self, row: int) -> Iterator[Strip]:
        assert self._stitcher is not None
        for strip in self._stitcher.advance(row, _STRIP_ROWS):
            if strip.window.row_stop > self._start and strip.window.row < self._stop:
                yield strip


@dataclass(frozen=True, slots=True)
class _WindowRow:
    """Windows that begin at one row of the scene.

    Attributes:
        windows: from left to right.
        stop: where the next row of windows begins: rows above it are finished with this one.
        num_before: windows of the rows above.
    """

    windows: list[Window]
    stop: int
    num_before: int


def _window_rows(extent: Window, window_size: int, overlap: int) -> list[_WindowRow]:
    windows = grid_windows(extent, window_size, overlap)
    groups = [list(group) for _, group in itertools.groupby(windows, key=lambda window: window.row)]
    stops = [group[0].row for group in groups[1:]] + [extent.row_stop]
    return [_WindowRow(group, stop, i * len(group)) for i, (group, stop) in enumerate(zip(groups, stops, strict=True))]


def _overlap(rows: list[_WindowRow]) -> bool:
    """Whether any two windows of a grid overlap."""
    across = itertools.pairwise(rows[0].windows)
    down = itertools.pairwise(row.windows[0] for row in rows)
    return any(b.row < a.row_stop and b.col < a.col_stop for a, b in itertools.chain(across, down))


def _needed_rows(rows: list[_WindowRow], start_row: int, stop_row: int) -> list[_WindowRow]:
    """Rows of windows that the rows [start_row, stop_row) of a scene need."""
    wanted = [row for row in rows if row.stop > start_row and row.windows[0].row < stop_row]
    # The rows of windows above that reach into the first wanted one belong to its mean.
    return [
        row
        for row in rows
        if wanted and row.windows[0].row_stop > wanted[0].windows[0].row and row.num_before <= wanted[-1].num_before
    ]


class Forward:
    """Forward pass of some tiles, which checks the shape of the scores.

    Args:
        model: Tiles to scores.
        num_channels: K, the channels of the scores.
        device: Device of the tiles.
        dtype: torch.float32, or torch.bfloat16 / torch.float16 for autocast.
        flips: Average the scores of a tile and its three mirror images.
    """

    def __init__(
        self, model: TileModel, num_channels: int, device: str | torch.device, dtype: torch.dtype, flips: bool
    ) -> None:
        self._model = model
        self._num_channels = num_channels
        self._device = torch.device(device)
        self._dtype = dtype
        self._flips = flips
        self._takes_valid = takes_valid(model)

    def __call__(self, tiles: Sequence[Entry]) -> Tensor:
        """Compute scores [B, K, h, w] float32, on the device.

        Raises:
            InputError: The model's output has another shape.
        """
        arrays = [tile.pixels for tile in tiles if tile.pixels is not None]
        batch = to_device(torch.from_numpy(arrays[0][None] if len(arrays) == 1 else np.stack(arrays)), self._device)
        valid = valid_pixels(tiles) if self._takes_valid else None
        valid = None if valid is None else valid.to(self._device)
        autocast = torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32)
        with torch.inference_mode(), autocast:
            # To float32 in this thread: another one would make further threads of OpenMP.
            scores = self._checked(self._model(batch) if valid is None else self._model(batch, valid=valid), batch)
            if not self._flips:
                return scores
            for dims in ((-1,), (-2,), (-2, -1)):
                turned = {} if valid is None else {"valid": valid.flip(dims)}
                # Not in place: a model may return its input.
                scores = scores + self._checked(self._model(batch.flip(dims), **turned), batch).flip(dims)
            return scores / 4

    def _checked(self, scores: Tensor, batch: Tensor) -> Tensor:
        expected = (len(batch), self._num_channels, *batch.shape[-2:])
        if tuple(scores.shape) != expected:
            raise InputError(f"expected scores of shape {expected} from the model, got {tuple(scores.shape)}")
        return scores.float()
