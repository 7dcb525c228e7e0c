"""Small images for tests of labels."""

import warnings
from pathlib import Path

import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning


def write_image(path: Path, *, height: int = 40, width: int = 60, num_bands: int = 3, seed: int = 0) -> Path:
    """An image of noise without georeference, in the format of its ending."""
    return write_pixels(path, np.random.default_rng(seed).integers(1, 255, (num_bands, height, width), np.uint8))


def write_mask(path: Path, pixels: np.ndarray) -> Path:
    """An image of one band, [H, W]."""
    return write_pixels(path, pixels[None])


def write_pixels(path: Path, pixels: np.ndarray) -> Path:
    """An image without georeference, [C, H, W]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    driver = {".png": "PNG", ".tif": "GTiff", ".jpg": "JPEG"}[path.suffix]
    profile = {"count": count, "height": height, "width": width, "dtype": pixels.dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", driver=driver, **profile) as dataset:
            dataset.write(pixels)
    return path
