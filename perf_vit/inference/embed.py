"""Windows of a source through an encoder."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perf_vit.inference.prefetch import Reads, Tile, read_ahead, takes_valid, valid_pixels
from perf_vit.plotting import rgb_from
from perf_vit.types import GeoImage, Source, Window

__all__ = ["attention_picture", "embed_windows"]

FloatArray = npt.NDArray[np.float32]


def embed_windows(
    encode: Callable[..., Tensor],
    source: Reads,
    normalize: Callable[[GeoImage], FloatArray],
    windows: Sequence[Window],
    *,
    batch_size: int = 16,
    num_readers: int = 2,
    device: str | torch.device = "cpu",
    precision: torch.dtype = torch.float32,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> FloatArray:
    """Features of windows, in their order; threads read ahead.

    Args:
        encode: windows [B, C, h, w] to features [B, D]; put an `nn.Module` into evaluation mode and onto the device
            yourself. One that has an argument `valid` is given the valid pixels, bool [B, h, w], or None where all are.
        source: where pixels come from; several threads read it.
        normalize: a window's pixels to the encoder's input, [C, h, w].
        windows: at least one, all of one size, each with a valid pixel.
        batch_size: windows a forward pass.
        num_readers: threads that read.
        device: where the windows go.
        precision: torch.float32, or torch.bfloat16 / torch.float16 for autocast.
        on_progress: called with (windows done, windows in all), for a progress bar.

    Returns:
        [N, D].

    Raises:
        InputError: a window can't be read.
    """
    device = torch.device(device)
    autocast = torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)
    tiles = read_ahead(windows, source, normalize, num_threads=num_readers, depth=2 * batch_size + num_readers)
    found: list[FloatArray] = []
    done = 0
    with closing(tiles):
        for batch in _batches(tiles, batch_size):
            with torch.inference_mode(), autocast:
                features = _encoded(encode, batch, device)
            found.append(features.float().cpu().numpy())
            done += len(batch)
            on_progress(done, len(windows))
    return np.concatenate(found)


def _batches(tiles: Iterator[Tile], batch_size: int) -> Iterator[list[Tile]]:
    while batch := list(itertools.islice(tiles, batch_size)):
        yield batch


def _encoded(encode: Callable[..., Tensor], tiles: Sequence[Tile], device: torch.device) -> Tensor:
    known = next((tile.pixels for tile in tiles if tile.pixels is not None), None)
    assert known is not None, "windows without valid pixels have no features"
    # What isn't valid is 0, the mean.
    pixels = np.stack([np.zeros_like(known) if tile.pixels is None else tile.pixels for tile in tiles])
    batch = torch.from_numpy(pixels).to(device)
    valid = valid_pixels(tiles) if takes_valid(encode) else None
    return encode(batch) if valid is None else encode(batch, valid=valid.to(device))


_SIZE_PX = 2048

_OPACITY = 0.55


def attention_picture(
    source: Source, windows: Sequence[Window], weights: npt.NDArray[np.floating], max_size_px: int = _SIZE_PX
) -> npt.NDArray[np.uint8]:
    """A slide at low resolution under the colours of its windows' attention, blue for none and red for the most.

    Args:
        source: the slide.
        windows: that were looked at.
        weights: 0 to 1, [N]; where windows overlap, the larger one shows.
        max_size_px: longest side of the picture.

    Returns:
        [H, W, 3].

    Raises:
        InputError: the slide can't be read.
    """
    image = source.read_reduced(max_size_px)
    is_rgb = image.pixels.dtype == np.uint8 and len(image.pixels) == 3
    picture = image.pixels.transpose(1, 2, 0) if is_rgb else rgb_from(image)
    height, width = picture.shape[:2]
    heat = np.full((height, width), np.nan)
    for index in np.argsort(weights, kind="stable"):
        window = windows[index]
        rows = slice(*_pixels(window.row, window.row_stop, height / source.height))
        cols = slice(*_pixels(window.col, window.col_stop, width / source.width))
        heat[rows, cols] = weights[index]
    seen = ~np.isnan(heat)
    colors = matplotlib.colormaps["turbo"](np.nan_to_num(heat))[..., :3] * 255
    mixed = np.where(seen[..., None], (1 - _OPACITY) * picture + _OPACITY * colors, picture)
    return np.rint(mixed).astype(np.uint8)


def _pixels(start: int, stop: int, scale: float) -> tuple[int, int]:
    """A span in pixels of the picture, one at least."""
    low = round(start * scale)
    return low, max(low + 1, round(stop * scale))
