"""The object engine: windows in, the scene's objects out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perf_vit.errors import InputError
from perf_vit.inference._read_detections import scene_objects
from perf_vit.inference.detections import Detections, Objects
from perf_vit.inference.stitch_objects import ObjectStitcher
from perf_vit.tiling import grid_windows
from perf_vit.types import GeoImage, Source, Window

__all__ = ["ObjectModel", "predict_objects"]

FloatArray = npt.NDArray[np.float32]

ObjectModel = Callable[[Tensor], Sequence[Detections]]
"""Tiles [B, C, h, w] float32 to the detections of each, in its pixels."""


def predict_objects(
    model: ObjectModel,
    source: Source,
    normalize: Callable[[GeoImage], FloatArray],
    *,
    extent: Window,
    window_size: int,
    overlap: int,
    batch_size: int = 1,
    device: str | torch.device = "cpu",
    precision: torch.dtype = torch.float32,
    score_threshold: float = 0.5,
    iou_threshold: float = 0.5,
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
        device: where the tiles go.
        precision: torch.float32, or torch.bfloat16 / torch.float16 for autocast.
        score_threshold: lowest score of an object.
        iou_threshold: of two objects of a class with a larger IoU, the one with the higher score stays.
        on_window: called with (windows done, windows in all), for a progress bar.

    Raises:
        InputError: the model's answer is not one `Detections` a tile, or their arrays don't go together.
    """
    stitcher = ObjectStitcher(extent, window_size, overlap, iou_threshold)
    windows = grid_windows(extent, window_size, overlap)
    for batch in _batches(source, windows, batch_size, on_window):
        tiles = np.stack([normalize(image) for _, image in batch])
        for (window, image), detections in zip(batch, _forward(model, tiles, device, precision), strict=True):
            stitcher.add(window, scene_objects(detections, window, score_threshold), image.valid)
    return stitcher.finish()


def _batches(
    source: Source, windows: Sequence[Window], batch_size: int, on_window: Callable[[int, int], None]
) -> Iterator[list[tuple[Window, GeoImage]]]:
    """Windows with a valid pixel; those before the next batch count as done when it is asked for."""
    batch: list[tuple[Window, GeoImage]] = []
    for done, window in enumerate(windows, 1):
        image = source.read(window)
        if image.valid.any():
            batch.append((window, image))
        if batch and (len(batch) == batch_size or done == len(windows)):
            yield batch
            batch = []
        if not batch:
            on_window(done, len(windows))


def _forward(
    model: ObjectModel, tiles: FloatArray, device: str | torch.device, precision: torch.dtype
) -> Sequence[Detections]:
    batch = torch.from_numpy(tiles).to(device, non_blocking=True)
    autocast = torch.autocast(batch.device.type, dtype=precision, enabled=precision != torch.float32)
    with torch.inference_mode(), autocast:
        found = model(batch)
    if len(found) != len(tiles) or not all(isinstance(detections, Detections) for detections in found):
        raise InputError(f"expected {len(tiles)} Detections from the model, one a tile, got {type(found).__name__}")
    return found
