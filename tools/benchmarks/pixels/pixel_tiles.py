"""Tiles of one image as sequences of bytes, and what simple models need for them."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import perf_vit

__all__ = ["TileSource", "simple_models"]


class TileSource:
    """Tiles of one image, as sequences of bytes: training tiles lie above test tiles.

    Args:
        path: Raster or slide with three bands of bytes.
        side: Rows and columns of a tile.
        shrink: How many times the image is shrunk before, by averaging squares.
        min_contrast: Smallest standard deviation of a tile, which leaves out empty ones.
        test_share: Share of the rows, at the bottom, that are for testing.
    """

    def __init__(self, path: Path, side: int, shrink: int, min_contrast: float = 0.0, test_share: float = 0.25) -> None:
        with perf_vit.open(path) as source:
            pixels = source.read().pixels[:3]
        height, width = (size // shrink * shrink for size in pixels.shape[1:])
        squares = pixels[:, :height, :width].reshape(3, height // shrink, shrink, width // shrink, shrink)
        # Rows, columns, bands.
        image = np.rint(squares.astype(np.float32).mean(axis=(2, 4))).astype(np.uint8).transpose(1, 2, 0)
        first = round(image.shape[0] * (1 - test_share))
        self.side, self._parts, self._min_contrast = side, {"train": image[:first], "test": image[first:]}, min_contrast

    def draw(self, part: str, number: int, seed: int | tuple[int, int]) -> Tensor:
        """Return random tiles of "train" or "test", values [number, side * side * 3] in raster order."""
        pixels, rng = self._parts[part], np.random.default_rng(seed)
        tiles: list[np.ndarray] = []
        while len(tiles) < number:
            row, column = rng.integers(0, np.array(pixels.shape[:2]) - self.side + 1)
            tile = pixels[row : row + self.side, column : column + self.side]
            if tile.std(axis=(0, 1)).mean() >= self._min_contrast:
                tiles.append(tile)
        return torch.from_numpy(np.stack(tiles).reshape(number, -1).astype(np.int64))


def simple_models(train: Tensor, test: Tensor, side: int) -> dict[str, float]:
    """Return the bits per dimension of three models without a network on test tiles.

    They are the histogram of each band, that of the difference from the pixel to the left (in the first column, above),
    and deflate over these differences, which PNG does.
    """
    bits = {}
    before, after = (tiles.reshape(-1, side, side, 3).numpy() for tiles in (train, test))
    bits["histogram of the band"] = _cross_entropy(before, after)
    changes_before, changes_after = _changes(before), _changes(after)
    bits["histogram of the change from the left"] = _cross_entropy(changes_before, changes_after)
    packed = sum(len(zlib.compress(tile.tobytes(), 9)) for tile in changes_after.astype(np.uint8))
    bits["deflate of these changes"] = 8 * packed / test.numel()
    return bits


def _changes(tiles: np.ndarray) -> np.ndarray:
    changes = tiles.copy()
    changes[:, :, 1:] -= tiles[:, :, :-1]
    changes[:, 1:, 0] -= tiles[:, :-1, 0]
    return changes % 256


def _cross_entropy(before: np.ndarray, after: np.ndarray) -> float:
    """Return the bits that values of three bands take under the histograms of others, with one count added to each."""
    total = 0.0
    for band in range(3):
        counts = np.bincount(before[..., band].ravel(), minlength=256) + 1.0
        total -= np.log(counts / counts.sum())[after[..., band]].mean()
    return total / 3 / math.log(2)
