"""Augmentation of images and labels with any number of bands, and of the stains of H&E images."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from perf_vit.errors import ConfigError, InputError
from perf_vit.types import BoolArray, GeoImage, LabelArray

# Disable albumentations' check for updates on import, which needs a network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A

__all__ = ["Augmentation", "StainJitter"]

ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]


class BandGainOffset(A.ImageOnlyTransform):
    """Random gain and offset of each band of a standardised image.

    The photometric transforms of albumentations clip float images to [0, 1] and assume certain numbers of bands.

    Args:
        gain: Range of the gain, drawn from [1 - gain, 1 + gain].
        offset: Range of the offset, drawn from [-offset, offset], in standard deviations. Half of gain and offset is
            common to all bands (exposure), half is separate for each band (colour).
        p: Probability of applying it.
    """

    def __init__(self, gain: float, offset: float, p: float = 0.8) -> None:
        super().__init__(p=p)
        self.gain = gain
        self.offset = offset

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw a gain and an offset per band."""
        num_bands = data["image"].shape[-1]
        draw = self.random_generator.uniform(-1, 1, (2, num_bands + 1)).astype(np.float32)
        common_and_own = (draw[:, :1] + draw[:, 1:]) / 2
        return {"gains": 1 + self.gain * common_and_own[0], "offsets": self.offset * common_and_own[1]}

    def apply(self, img: FloatArray, gains: FloatArray, offsets: FloatArray, **params: Any) -> FloatArray:
        """Apply gains and offsets to an image, [H, W, C]."""
        out = np.empty_like(img)
        # A loop over bands: NumPy's broadcasting over a last axis of three takes five times as long.
        for band, (gain, offset) in enumerate(zip(gains, offsets, strict=True)):
            np.multiply(img[..., band], gain, out=out[..., band])
            out[..., band] += offset
        return out


class BandShuffle(A.ImageOnlyTransform):
    """Random order of the bands of a standardised image, which changes colours but not shapes."""

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw an order of the bands."""
        return {"order": self.random_generator.permutation(data["image"].shape[-1])}

    def apply(self, img: FloatArray, order: npt.NDArray[np.int64], **params: Any) -> FloatArray:
        """Reorder the bands of an image, [H, W, C]."""
        return np.ascontiguousarray(img[..., order])


class Augmentation:
    """Random flips, quarter turns and colour, determined by a seed per sample.

    Args:
        flips: Whether to apply the eight symmetries of the square, suitable for imagery from above.
        gain: Range of the gain, see `BandGainOffset`; 0 for none.
        offset: Range of the offset, see `BandGainOffset`; 0 for none.
        shuffle: Probability of a random order of the bands, for tasks where shape matters more than colour.
    """

    def __init__(
        self,
        *,
        flips: bool = True,
        gain: float = 0.0,
        offset: float = 0.0,
        shuffle: float = 0.0,
    ) -> None:
        steps: list[Any] = []
        if flips:
            steps.append(A.D4(p=1.0))
        if shuffle:
            steps.append(BandShuffle(p=shuffle))
        if gain or offset:
            steps.append(BandGainOffset(gain, offset))
        self._compose = A.Compose(steps)

    def __call__(
        self, image: FloatArray, labels: LabelArray, seed: int, mask: BoolArray | None = None
    ) -> tuple[FloatArray, LabelArray, BoolArray]:
        """Augment a sample.

        Args:
            image: Standardised image, [C, H, W] float32.
            labels: Class indices, [H, W], or layers, [K, H, W].
            seed: Seed of all random numbers; a seed gives the same sample in any process.
            mask: True where a value holds data, [C, H, W], or [1, H, W] for all bands; None if all do. Invalid values
                become 0.

        Returns:
            The augmented image and labels, with shapes and dtypes unchanged, and the mask of pixels with a valid value,
            [H, W].
        """
        masks = labels.reshape(-1, *labels.shape[-2:])
        # NaN stays with its pixel when an image is turned and with its band when bands are shuffled.
        marked = image if mask is None or mask.all() else np.where(mask, image, np.float32(np.nan))
        self._compose.set_random_seed(seed)
        out = self._compose(image=_channels_last(marked), masks=masks)
        pixels = _channels_first(out["image"], len(image))
        valid: BoolArray = np.ones(pixels.shape[1:], bool)
        if marked is not image:
            held = ~np.isnan(pixels)
            pixels, valid = np.where(held, pixels, np.float32(0)), np.asarray(held.any(0))
        layers = np.stack(out["masks"])
        return pixels, np.ascontiguousarray(layers.reshape(*labels.shape[:-2], *layers.shape[-2:])), valid


def _channels_last(planes: FloatArray) -> FloatArray:
    return np.ascontiguousarray(planes.transpose(1, 2, 0))


def _channels_first(planes: FloatArray, num_planes: int) -> FloatArray:
    """Rearrange [H, W, C] to [C, H, W]; albumentations may drop a single channel."""
    stacked = planes.reshape(*planes.shape[:2], num_planes)
    return np.ascontiguousarray(stacked.transpose(2, 0, 1), dtype=np.float32)


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
