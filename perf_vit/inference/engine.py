"""The dense engine: windows in, finished rows of blended scores out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perf_vit.errors import InputError
from perf_vit.inference.stitch_dense import RowStitcher
from perf_vit.tiling import grid_windows, hann_weights
from perf_vit.types import BoolArray, GeoImage, Window

__all__ = ["Source", "Strip", "TileModel", "predict_strips"]

FloatArray = npt.NDArray[np.float32]

TileModel = Callable[[Tensor], Tensor]
"""Tiles [B, C, h, w] float32 to scores [B, K, h, w], at the same resolution."""


class Source(Protocol):
    """What the engine reads from: anything that gives a window's pixels and valid mask."""

    def read(self, window: Window) -> GeoImage:
        """Pixels and valid mask of a window, padded where it reaches past the edge."""


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
    source: Source,
    normalize: Callable[[GeoImage], FloatArray],
    *,
    extent: Window,
    num_channels: int,
    window_size: int,
    overlap: int,
    batch_size: int = 1,
    device: str | torch.device = "cpu",
    precision: torch.dtype = torch.float32,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Strip]:
    """Run a model over a scene in overlapping windows and give the rows as they are finished, top to bottom.

    Windows without a valid pixel skip the model. Scores are blended with Hann weights, so a window counts least at
    its edge, where it has seen least.

    Args:
        model: tiles to scores; put an `nn.Module` into evaluation mode and onto the device yourself.
        source: where pixels come from.
        normalize: a window's pixels to the model's input, [C, h, w].
        extent: the part of the source to predict.
        num_channels: K, the channels of the model's output.
        window_size: side of a window, in pixels.
        overlap: pixels that neighbouring windows share.
        batch_size: windows a forward pass.
        device: where the tiles go.
        precision: torch.float32, or torch.bfloat16 / torch.float16 for autocast.
        on_window: called with (windows done, windows in all), for a progress bar.

    Yields:
        Strips that cover the extent once, in order.

    Raises:
        InputError: the model's output is not [B, num_channels, h, w].
    """
    windows = grid_windows(extent, window_size, overlap)
    weights = hann_weights(window_size)
    stitcher = RowStitcher(extent, window_size, num_channels)
    rows = [list(group) for _, group in itertools.groupby(windows, key=lambda window: window.row)]
    done = 0
    for index, row in enumerate(rows):
        for start in range(0, len(row), batch_size):
            batch = row[start : start + batch_size]
            images = [source.read(window) for window in batch]
            used = [i for i, image in enumerate(images) if image.valid.any()]
            if used:
                tiles = np.stack([normalize(images[i]) for i in used])
                scores = _forward(model, tiles, num_channels, device, precision)
                for i, score in zip(used, scores, strict=True):
                    stitcher.add(batch[i], score, images[i].valid, weights)
            done += len(batch)
            on_window(done, len(windows))
        top = row[0].row
        stop = rows[index + 1][0].row if index + 1 < len(rows) else extent.row_stop
        blended, valid = stitcher.advance(stop)
        yield Strip(Window(top, extent.col, stop - top, extent.width), blended, valid)


def _forward(
    model: TileModel, tiles: FloatArray, num_channels: int, device: str | torch.device, precision: torch.dtype
) -> FloatArray:
    batch = torch.from_numpy(tiles).to(device, non_blocking=True)
    autocast = torch.autocast(batch.device.type, dtype=precision, enabled=precision != torch.float32)
    with torch.inference_mode(), autocast:
        scores = model(batch)
    expected = (len(tiles), num_channels, *tiles.shape[-2:])
    if tuple(scores.shape) != expected:
        raise InputError(f"expected scores of shape {expected} from the model, got {tuple(scores.shape)}")
    return scores.float().cpu().numpy()
