"""The object engine: windows in, the scene's objects out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import numpy as np
import numpy.typing as npt
import torch

from perf_vit.errors import InputError
from perf_vit.inference._read_detections import scene_objects
from perf_vit.inference.detections import Objects
from perf_vit.inference.reader import Reads, Tile, read_ahead, takes_valid, valid_pixels
from perf_vit.inference.stitch_objects import ObjectStitcher
from perf_vit.inference.window_log import WindowLog
from perf_vit.tiling import grid_windows
from perf_vit.types import Detections, GeoImage, Window

__all__ = ["ObjectModel", "predict_objects"]

FloatArray = npt.NDArray[np.float32]

ObjectModel = Callable[..., Sequence[Detections]]
"""Tiles [B, C, h, w] float32 to the detections of each, in its pixels.

One that has an argument `valid` is given the valid pixels, bool [B, h, w], or None where all are.
"""


def predict_objects(
    model: ObjectModel,
    source: Reads,
    normalize: Callable[[GeoImage], FloatArray],
    *,
    extent: Window,
    window_size: int,
    overlap: int,
    batch_size: int = 1,
    num_readers: int = 2,
    device: str | torch.device = "cpu",
    precision: torch.dtype = torch.float32,
    score_threshold: float = 0.5,
    iou_threshold: float = 0.5,
    log: WindowLog | None = None,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> Objects:
    """Run a detector over a scene in overlapping windows and give each object once.

    An overlap larger than the largest object makes sure that some window sees each object whole; `ObjectStitcher`
    says how the windows' objects are joined. Windows without a valid pixel skip the model, and objects whose centre
    is not valid are left out. Memory is linear in objects.

    Args:
        model: tiles to detections; put an `nn.Module` into evaluation mode and onto the device yourself.
        source: where pixels come from.
        normalize: a window's pixels to the model's input, [C, h, w].
        extent: the part of the source to search.
        window_size: side of a window, in pixels.
        overlap: pixels that neighbouring windows share.
        batch_size: windows a forward pass.
        num_readers: threads that read ahead.
        device: where the tiles go.
        precision: torch.float32, or torch.bfloat16 / torch.float16 for autocast.
        score_threshold: lowest score of an object.
        iou_threshold: of two objects of a class with a larger IoU, the one with the higher score stays.
        log: Objects of windows that are finished already, which skip the model; those of further ones are added.
        on_window: called with (windows done, windows in all), for a progress bar.

    Raises:
        InputError: the model's answer is not one `Detections` a tile, or their arrays don't go together.
    """
    stitcher = ObjectStitcher(extent, window_size, overlap, iou_threshold)
    windows = grid_windows(extent, window_size, overlap)
    known = {} if log is None else log.windows()
    for window, objects in known.items():
        if objects is not None:
            stitcher.add(window, objects)
    todo = [window for window in windows if window not in known]
    tiles = read_ahead(todo, source, normalize, num_threads=num_readers, depth=2 * batch_size + num_readers)
    done = len(known)
    with closing(tiles):
        for batch, empty in _batches(tiles, batch_size):
            found = []
            for tile, detections in zip(batch, _forward(model, batch, device, precision), strict=True):
                objects = scene_objects(detections, tile.window, score_threshold)
                found.append((tile.window, stitcher.add(tile.window, objects, tile.valid)))
            if log is not None:
                log.add(empty, found)
            done += len(batch) + len(empty)
            on_window(done, len(windows))
    return stitcher.finish()


def _batches(tiles: Iterator[Tile], batch_size: int) -> Iterator[tuple[list[Tile], list[Window]]]:
    """Tiles with a valid pixel, and the windows without one that come before the last of them."""
    batch: list[Tile] = []
    empty: list[Window] = []
    for tile in tiles:
        if tile.pixels is None:
            empty.append(tile.window)
        else:
            batch.append(tile)
        if len(batch) == batch_size:
            yield batch, empty
            batch, empty = [], []
    if batch or empty:
        yield batch, empty


def _forward(
    model: ObjectModel, tiles: Sequence[Tile], device: str | torch.device, precision: torch.dtype
) -> Sequence[Detections]:
    if not tiles:
        return []
    pixels = np.stack([tile.pixels for tile in tiles if tile.pixels is not None])
    batch = torch.from_numpy(pixels).to(device, non_blocking=True)
    valid = valid_pixels(tiles) if takes_valid(model) else None
    autocast = torch.autocast(batch.device.type, dtype=precision, enabled=precision != torch.float32)
    with torch.inference_mode(), autocast:
        found = model(batch) if valid is None else model(batch, valid=valid.to(device))
    if len(found) != len(tiles) or not all(isinstance(detections, Detections) for detections in found):
        raise InputError(f"expected {len(tiles)} Detections from the model, one a tile, got {type(found).__name__}")
    return found
