"""Stain augmentation of H&E images (haematoxylin and eosin)."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from perf_vit.errors import ConfigError, InputError
from perf_vit.types import GeoImage

# Disable albumentations' check for updates on import, which needs a network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A

__all__ = ["StainJitter"]

ByteArray = npt.NDArray[np.uint8]

# Optical densities of red, green and blue of haematoxylin, eosin and DAB, after Ruifrok & Johnston (2001).
_STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
_STAINS /= np.linalg.norm(_STAINS, axis=1, keepdims=True)

# Shift relative to the jitter, small because it tints the glass, which a factor leaves unchanged.
_SHIFT = 0.25

# Optical density -log10(value / 255) of the 256 values; 0 is treated as 1, as its logarithm is infinite.
_DENSITIES = -np.log10(np.maximum(np.arange(256), 1) / 255).astype(np.float32)


class _ConcentrationJitter(A.ImageOnlyTransform):
    """Random factor and shift of each stain's concentration; `HEStain` of albumentations keeps two stains only."""

    def __init__(self, amount: float) -> None:
        super().__init__(p=1.0)
        self.amount = amount

    def get_params(self) -> dict[str, Any]:
        """Draw a factor and a shift per stain."""
        draw = self.amount * self.random_generator.uniform(-1, 1, (2, 3))
        return {"factors": 1 + draw[0], "shifts": _SHIFT * draw[1]}

    def apply(
        self, img: ByteArray, factors: npt.NDArray[np.float64], shifts: npt.NDArray[np.float64], **params: Any
    ) -> ByteArray:
        """Apply factors and shifts to an image, [H, W, 3]."""
        # density = concentrations @ stains, so a jitter of concentrations is an affine map of densities.
        mixed = (np.linalg.inv(_STAINS) * factors) @ _STAINS
        densities = _DENSITIES[img] @ mixed.astype(np.float32) + (shifts @ _STAINS).astype(np.float32)
        return np.clip(np.rint(255 * 10**-densities), 0, 255).astype(np.uint8)


class StainJitter:
    """Jitter of the concentrations of haematoxylin, eosin and DAB before standardisation (Tellez et al., 2018).

    The optical densities of the colours are decomposed into those of the three stains (Ruifrok & Johnston, 2001). Each
    is multiplied by a factor from [1 - amount, 1 + amount] and shifted by [-amount / 4, amount / 4], which also tints
    the glass. Morphology, such as the position of nuclei, is unchanged.

    Args:
        amount: Amount of jitter in [0, 1]; 0.05 is barely visible, 0.2 is strong.

    Raises:
        ConfigError: `amount` is not between 0 and 1.
    """

    def __init__(self, amount: float) -> None:
        if not 0 <= amount <= 1:
            raise ConfigError(f"stain must lie between 0 and 1, got {amount:g}")
        self.amount = amount
        self._compose = A.Compose([_ConcentrationJitter(amount)])

    def __call__(self, image: GeoImage, seed: int) -> GeoImage:
        """Jitter an image, including its invalid pixels.

        Args:
            image: RGB image, [3, H, W] uint8.
            seed: Seed of all random numbers; a seed gives the same image in any process.

        Raises:
            InputError: The image has other bands or another dtype.
        """
        pixels = image.pixels
        if len(pixels) != 3 or pixels.dtype != np.uint8:
            raise InputError(
                f"stain jitter is for images of 3 bands of uint8 (red, green, blue), got {len(pixels)} of "
                f"{pixels.dtype}; leave it out or choose those bands"
            )
        self._compose.set_random_seed(seed)
        out = self._compose(image=np.ascontiguousarray(pixels.transpose(1, 2, 0)))["image"]
        return replace(image, pixels=np.ascontiguousarray(out.transpose(2, 0, 1)))
