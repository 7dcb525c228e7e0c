"""Other amounts of stain in images of haematoxylin and eosin, as another laboratory would have given them."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from perf_vit.errors import ConfigError, InputError
from perf_vit.types import GeoImage

# albumentations asks the network for its newest release on import unless told not to.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A

__all__ = ["StainJitter"]

ByteArray = npt.NDArray[np.uint8]

# Optical densities of red, green and blue of haematoxylin, eosin and DAB, after Ruifrok & Johnston (2001).
_STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
_STAINS /= np.linalg.norm(_STAINS, axis=1, keepdims=True)

# Glass has no stain to multiply; a shift of this share of the jitter tints it only slightly.
_SHIFT = 0.25

# -log10 of each of the 256 values; black is taken as 1, since there is no light to take a logarithm of.
_DENSITIES = -np.log10(np.maximum(np.arange(256), 1) / 255).astype(np.float32)


class _ConcentrationJitter(A.ImageOnlyTransform):
    """Multiply and shift each stain's concentration; `HEStain` of albumentations loses all colours but two stains'."""

    def __init__(self, amount: float) -> None:
        super().__init__(p=1.0)
        self.amount = amount

    def get_params(self) -> dict[str, Any]:
        """Draw one factor and one shift a stain."""
        draw = self.amount * self.random_generator.uniform(-1, 1, (2, 3))
        return {"factors": 1 + draw[0], "shifts": _SHIFT * draw[1]}

    def apply(
        self, img: ByteArray, factors: npt.NDArray[np.float64], shifts: npt.NDArray[np.float64], **params: Any
    ) -> ByteArray:
        """Apply the drawn factors and shifts to [H, W, 3]."""
        # density = concentrations @ stains, so the jitter of concentrations is one affine map of densities.
        mixed = (np.linalg.inv(_STAINS) * factors) @ _STAINS
        densities = _DENSITIES[img] @ mixed.astype(np.float32) + (shifts @ _STAINS).astype(np.float32)
        return np.clip(np.rint(255 * 10**-densities), 0, 255).astype(np.uint8)


class StainJitter:
    """Jitter of the concentrations of haematoxylin, eosin and DAB, after Tellez et al. (2018), before standardisation.

    The colours' optical densities are split into those of the three stains (Ruifrok & Johnston, 2001). Each stain's
    is multiplied by a factor from [1 - amount, 1 + amount] and shifted by an amount from [-amount / 4, amount / 4],
    which tints the glass, too. What stain is independent of, such as where nuclei lie, stays.

    Args:
        amount: 0.05 is hardly seen, 0.2 is a lot.

    Raises:
        ConfigError: `amount` is not between 0 and 1.
    """

    def __init__(self, amount: float) -> None:
        if not 0 <= amount <= 1:
            raise ConfigError(f"stain must lie between 0 and 1, got {amount:g}")
        self.amount = amount
        self._compose = A.Compose([_ConcentrationJitter(amount)])

    def __call__(self, image: GeoImage, seed: int) -> GeoImage:
        """Jitter one image; pixels that are not valid are changed as the others.

        Args:
            image: [3, H, W] uint8; red, green, blue.
            seed: decides every draw; the same seed gives the same image in any process.

        Raises:
            InputError: other bands or another dtype.
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
