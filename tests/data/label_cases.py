"""Small images for tests of labels."""

from pathlib import Path

import numpy as np
import rasterio


def write_image(path: Path, *, height: int = 40, width: int = 60, num_bands: int = 3, seed: int = 0) -> Path:
    """A PNG of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(1, 255, (num_bands, height, width), np.uint8)
    with rasterio.open(
        path, "w", driver="PNG", count=num_bands, height=height, width=width, dtype="uint8"
    ) as dataset:
        dataset.write(pixels)
    return path


def write_mask(path: Path, pixels: np.ndarray) -> Path:
    """A PNG of one band."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = pixels.shape
    with rasterio.open(path, "w", driver="PNG", count=1, height=height, width=width, dtype=pixels.dtype) as dataset:
        dataset.write(pixels, 1)
    return path
