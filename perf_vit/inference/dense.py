"""Blending of overlapping windows into finished rows."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perf_vit.errors import InputError
from perf_vit.inference.prefetch import Reads, Tile, num_processors, read_ahead, takes_valid, valid_pixels
from perf_vit.tiling import BLENDS, grid_windows
from perf_vit.types import BoolArray, GeoImage, Window

__all__ = ["RowStitcher", "Strip", "TileModel", "predict_strips"]

# So few that intermediate results stay in the processor's cache.
_ROWS_AT_ONCE = 32


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
    """

    def __init__(self, extent: Window, window_height: int, num_channels: int) -> None:
        self._extent = extent
        self._held = Window(extent.row, extent.col, window_height, extent.width)
        self._mean = np.zeros((num_channels, *self._held.shape), np.float32)
        self._weight = np.zeros(self._held.shape, np.float32)
        self._valid = np.zeros(self._held.shape, bool)

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
        for part, held_rows in self._ring_parts(inside, _ROWS_AT_ONCE):
            source, held = part.slices_in(window), (held_rows, held_cols)
            self._valid[held] |= valid[source]
            mean, before, weight = self._mean[:, *held], self._weight[held], weights[source]
            if not before.any():
                # The first window here: the step below would give the same, in four times the time.
                mean[:] = scores[:, *source]
                before[:] = weight
                continue
            total = before + weight
            step = scores[:, *source] - mean
            step *= weight / total
            mean += step
            before[:] = total

    def advance(self, row: int, max_rows: int | None = None) -> Iterator[tuple[Window, FloatArray, BoolArray]]:
        """Take out the rows above `row`, which no later window reaches, in blocks; take all of them.

        Args:
            row: first row of the next row of windows, or the extent's end.
            max_rows: of a block; all rows in one by default.

        Yields:
            Where the block lies, its scores [C, rows, width], 0 where no window was added, and where the source has
            data, [rows, width].
        """
        while self._held.row < row:
            count = min(row - self._held.row, max_rows or self._held.height)
            block = Window(self._held.row, self._extent.col, count, self._extent.width)
            parts = [rows for _, rows in self._ring_parts(block)]
            yield (
                block,
                np.concatenate([self._mean[:, rows] for rows in parts], axis=1),
                np.concatenate([self._valid[rows] for rows in parts]),
            )
            for rows in parts:
                self._mean[:, rows] = 0
                self._weight[rows] = 0
                self._valid[rows] = False
            self._held = Window(block.row_stop, self._held.col, *self._held.shape)

    def _ring_parts(self, window: Window, max_rows: int | None = None) -> Iterator[tuple[Window, slice]]:
        """A window's rows, cut where the ring begins anew: the part, and its rows of the buffers."""
        height = self._held.height
        row = window.row
        while row < window.row_stop:
            start = (row - self._extent.row) % height
            count = min(window.row_stop - row, height - start, max_rows or height)
            yield Window(row, window.col, count, window.width), slice(start, start + count)
            row += count


FloatArray = npt.NDArray[np.float32]

TileModel = Callable[..., Tensor]
"""Tiles [B, C, h, w] float32 to scores [B, K, h, w], at the same resolution.

One that has an argument `valid` is given the valid pixels, bool [B, h, w], or None where all are.
"""

_STRIP_ROWS = 128
"""Rows of a strip at most: a whole row of windows at once would double what the engine holds."""


@dataclass(frozen=True, slots=True)
class Strip:
    """Finished rows of a scene.

    Attributes:
        window: where they lie in the source.
        scores: [K, h, w] float32, blended.
        valid: [h, w], False where the source has no data.
    """

    window: Window
    scores: FloatArray
    valid: BoolArray


def predict_strips(
    model: TileModel,
    source: Reads,
    normalize: Callable[[GeoImage], FloatArray],
    *,
    extent: Window,
    num_channels: int,
    window_size: int,
    overlap: int,
    start_row: int | None = None,
    stop_row: int | None = None,
    blend: str = "hann",
    flips: bool = False,
    batch_size: int = 1,
    num_readers: int | None = None,
    device: str | torch.device = "cpu",
    precision: torch.dtype = torch.float32,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Strip]:
    """Run a model over a scene in overlapping windows and give the rows as they are finished, top to bottom.

    Threads read ahead; windows without a valid pixel skip the model. Windows are blended in the order of the grid, so
    the strips don't depend on the batch size (as far as the model's scores don't) nor on which window was read first.
    Memory is that of one row of windows.

    Args:
        model: tiles to scores; put an `nn.Module` into evaluation mode and onto the device yourself.
        source: where pixels come from; several threads read it.
        normalize: a window's pixels to the model's input, [C, h, w].
        extent: the part of the source to predict.
        num_channels: K, the channels of the model's output.
        window_size: side of a window, in pixels.
        overlap: pixels that neighbouring windows share.
        start_row: first row wanted; the extent's first by default. The strips that hold wanted rows are the same bits
            as those of the whole extent; windows above that reach into them are computed again.
        stop_row: first row below those wanted; the extent's end by default.
        blend: weights by name, "hann", "gaussian" or a registered one; a window counts least at its edge, where it has
            seen least.
        flips: average the scores of a tile and its three mirror images.
        batch_size: windows a forward pass.
        num_readers: threads that read; one a processor by default.
        device: where the tiles go.
        precision: torch.float32, or torch.bfloat16 / torch.float16 for autocast.
        on_progress: called with (windows done, windows in all), for a progress bar.

    Yields:
        Strips of at most 128 rows that cover the wanted rows once, in order; the first and the last may hold others.

    Raises:
        InputError: a window can't be read, or the model's output is not [B, num_channels, h, w].
    """
    start_row = extent.row if start_row is None else start_row
    stop_row = extent.row_stop if stop_row is None else stop_row
    plan = _Plan(extent, window_size, overlap, start_row, stop_row)
    weights = BLENDS[blend](window_size)
    forward = _Forward(model, num_channels, device, precision, flips)
    stitcher = RowStitcher(plan.stitched, window_size, num_channels)
    readers = num_readers or num_processors()
    tiles = read_ahead(plan.windows(), source, normalize, num_threads=readers, depth=2 * batch_size + readers)
    with closing(tiles):
        for row in plan.rows:
            # One batch stays on the device while the next is read.
            running: deque[tuple[list[Tile], Tensor]] = deque()
            done = row.num_before
            for batch in _batches(itertools.islice(tiles, len(row.windows)), batch_size):
                running.append((batch, forward(batch)))
                done += _stitch(running, stitcher, weights, keep=1)
                on_progress(done, plan.num_windows)
            _stitch(running, stitcher, weights)
            on_progress(row.num_before + len(row.windows), plan.num_windows)
            for window, blended, valid in stitcher.advance(row.stop, _STRIP_ROWS):
                if window.row_stop > start_row and window.row < stop_row:
                    yield Strip(window, blended, valid)


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


class _Plan:
    """The rows of windows that the rows [start_row, stop_row) of a scene need."""

    def __init__(self, extent: Window, window_size: int, overlap: int, start_row: int, stop_row: int) -> None:
        windows = grid_windows(extent, window_size, overlap)
        groups = [list(group) for _, group in itertools.groupby(windows, key=lambda window: window.row)]
        stops = [group[0].row for group in groups[1:]] + [extent.row_stop]
        rows = [
            _WindowRow(group, stop, i * len(group)) for i, (group, stop) in enumerate(zip(groups, stops, strict=True))
        ]
        wanted = [row for row in rows if row.stop > start_row and row.windows[0].row < stop_row]
        # The rows of windows above that reach into the first wanted one belong to its mean.
        self.rows = [
            row
            for row in rows
            if wanted and row.windows[0].row_stop > wanted[0].windows[0].row and row.num_before <= wanted[-1].num_before
        ]
        self.num_windows = len(windows)
        begin = self.rows[0].windows[0].row if self.rows else extent.row
        self.stitched = Window(begin, extent.col, extent.row_stop - begin, extent.width)

    def windows(self) -> Iterator[Window]:
        return itertools.chain.from_iterable(row.windows for row in self.rows)


def _batches(tiles: Iterator[Tile], batch_size: int) -> Iterator[list[Tile]]:
    """Tiles with a valid pixel, in order."""
    used = (tile for tile in tiles if tile.pixels is not None)
    while batch := list(itertools.islice(used, batch_size)):
        yield batch


def _stitch(
    running: deque[tuple[list[Tile], Tensor]], stitcher: RowStitcher, weights: FloatArray, keep: int = 0
) -> int:
    """Blend in the batches of a queue but the last ones; how many tiles these were."""
    count = 0
    while len(running) > keep:
        batch, scores = running.popleft()
        for tile, found in zip(batch, scores.float().cpu().numpy(), strict=True):
            stitcher.add(tile.window, found, tile.valid, weights)
        count += len(batch)
    return count


@dataclass(frozen=True, slots=True)
class _Forward:
    """A batch of tiles through the model, unless it has another shape than it must."""

    model: TileModel
    num_channels: int
    device: str | torch.device
    precision: torch.dtype
    flips: bool

    def __call__(self, tiles: list[Tile]) -> Tensor:
        arrays = [tile.pixels for tile in tiles if tile.pixels is not None]
        pixels = torch.from_numpy(arrays[0][None] if len(arrays) == 1 else np.stack(arrays))
        device = torch.device(self.device)
        if device.type == "cuda":
            # Only from pinned memory does the copy run beside the computation.
            pixels = pixels.pin_memory()
        batch = pixels.to(device, non_blocking=True)
        valid = valid_pixels(tiles) if takes_valid(self.model) else None
        valid = None if valid is None else valid.to(device)
        autocast = torch.autocast(device.type, dtype=self.precision, enabled=self.precision != torch.float32)
        with torch.inference_mode(), autocast:
            scores = self._checked(self.model(batch) if valid is None else self.model(batch, valid=valid), batch)
            if not self.flips:
                return scores
            total = scores.float()
            for dims in ((-1,), (-2,), (-2, -1)):
                turned = {} if valid is None else {"valid": valid.flip(dims)}
                # Not in place: a model may return its input.
                total = total + self._checked(self.model(batch.flip(dims), **turned), batch).float().flip(dims)
            return total / 4

    def _checked(self, scores: Tensor, batch: Tensor) -> Tensor:
        expected = (len(batch), self.num_channels, *batch.shape[-2:])
        if tuple(scores.shape) != expected:
            raise InputError(f"expected scores of shape {expected} from the model, got {tuple(scores.shape)}")
        return scores
