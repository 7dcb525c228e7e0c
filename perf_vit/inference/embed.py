"""Windows of a source through an encoder."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perf_vit.inference.reader import Reads, Tile, read_ahead, takes_valid, valid_pixels
from perf_vit.types import GeoImage, Window

__all__ = ["embed_windows"]

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
    on_window: Callable[[int, int], None] = lambda done, total: None,
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
        on_window: called with (windows done, windows in all), for a progress bar.

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
            on_window(done, len(windows))
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
