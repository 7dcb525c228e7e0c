"""Small slides with known pixels on every level."""

from pathlib import Path

import numpy as np
import tifffile


def noise(height: int, width: int, num_bands: int = 3, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    """[H, W, C]."""
    rng = np.random.default_rng(seed)
    high = {"uint8": 256, "uint16": 65_536}.get(dtype, 1)
    return (rng.random((height, width, num_bands)) * high).astype(dtype)


def levels_of(height: int, width: int, num_levels: int, *, seed: int = 0) -> list[np.ndarray]:
    """Noise that halves, each level rounded down."""
    pixels = noise(height, width, seed=seed)
    return [pixels[: height >> k << k : 1 << k, : width >> k << k : 1 << k].copy() for k in range(num_levels)]


def write_pyramid(
    path: Path,
    levels: list[np.ndarray],
    *,
    mpp_xy: tuple[float, float] | None = None,
    aperio_mpp: float | None = None,
    icc: bytes | None = None,
) -> Path:
    """A tiled TIFF that OpenSlide opens, levels [H, W, 3] as they are given."""
    description = None if aperio_mpp is None else f"Aperio Image Library\r\n|AppMag = 20|MPP = {aperio_mpp}"
    with tifffile.TiffWriter(path) as writer:
        for k, level in enumerate(levels):
            place = {}
            if mpp_xy is not None:
                per_cm = tuple(1e4 / (mpp * 2**k) for mpp in mpp_xy)
                place = {"resolution": per_cm, "resolutionunit": "CENTIMETER"}
            writer.write(
                level,
                tile=(64, 64),
                photometric="rgb",
                compression="zlib",
                subfiletype=1 if k else 0,
                description=description,
                metadata=None,
                iccprofile=icc,
                **place,
            )
    return path
