"""Augmentation of images and labels with any number of bands."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from perf_vit.transforms.resize import divide_by_weight
from perf_vit.types import IGNORE_INDEX, BoolArray, LabelArray

# Disable albumentations' check for updates on import, which needs a network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A

__all__ = ["Augmentation"]

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


class ValidMeans(A.ImageOnlyTransform):
    """Division of interpolated bands by their interpolated masks, which are the second half of the channels.

    Invalid values become NaN, so that they stay with their band when bands are shuffled.
    """

    def apply(self, img: FloatArray, **params: Any) -> FloatArray:
        """Divide [H, W, 2 C] to [H, W, C]."""
        planes = img.transpose(2, 0, 1)
        pixels, held = divide_by_weight(*np.split(planes, 2))
        return _channels_last(np.where(held, pixels, np.float32(np.nan)))


class Augmentation:
    """Random flips, quarter turns, scale and colour, determined by a seed per sample.

    Args:
        flips: Whether to apply the eight symmetries of the square, suitable for imagery from above.
        scale: Range (smallest, largest) of the zoom about the centre of the tile, drawn separately for both axes; (1,
            1) for none. Pixels uncovered by a zoom below 1 are 0 in the image and ignored in the labels.
        gain: Range of the gain, see `BandGainOffset`; 0 for none.
        offset: Range of the offset, see `BandGainOffset`; 0 for none.
        shuffle: Probability of a random order of the bands, for tasks where shape matters more than colour.
    """

    def __init__(
        self,
        *,
        flips: bool = True,
        scale: tuple[float, float] = (1.0, 1.0),
        gain: float = 0.0,
        offset: float = 0.0,
        shuffle: float = 0.0,
    ) -> None:
        geometry: list[Any] = []
        if flips:
            geometry.append(A.D4(p=1.0))
        if tuple(scale) != (1.0, 1.0):
            geometry.append(A.Affine(scale=tuple(scale), fill=0, fill_mask=IGNORE_INDEX, p=0.8))
        colors: list[Any] = []
        if shuffle:
            colors.append(BandShuffle(p=shuffle))
        if gain or offset:
            colors.append(BandGainOffset(gain, offset))
        self._whole = A.Compose([*geometry, *colors])
        # `ValidMeans` draws no random numbers, so a mask doesn't change the result of a seed.
        self._masked = A.Compose([*geometry, ValidMeans(p=1.0), *colors])

    def __call__(
        self, image: FloatArray, labels: LabelArray, seed: int, mask: BoolArray | None = None
    ) -> tuple[FloatArray, LabelArray, BoolArray]:
        """Augment a sample.

        Args:
            image: Standardised image, [C, H, W] float32.
            labels: Class indices, [H, W], or layers, [K, H, W].
            seed: Seed of all random numbers; a seed gives the same sample in any process.
            mask: True where a value holds data, [C, H, W], or [1, H, W] for all bands; None if all do. Invalid values
                don't affect their neighbours and stay 0.

        Returns:
            The augmented image and labels, with shapes and dtypes unchanged, and the mask of pixels with a valid value,
            [H, W]. If `mask` has no invalid values, all pixels are valid, including those uncovered by a zoom.
        """
        masks = labels.reshape(-1, *labels.shape[-2:])
        if mask is None or mask.all():
            self._whole.set_random_seed(seed)
            out = self._whole(image=_channels_last(image), masks=masks)
            pixels = _channels_first(out["image"], len(image))
            valid: BoolArray = np.ones(pixels.shape[1:], bool)
        else:
            weights = np.broadcast_to(mask, image.shape).astype(np.float32)
            self._masked.set_random_seed(seed)
            out = self._masked(image=_channels_last(np.concatenate([image, weights])), masks=masks)
            pixels = _channels_first(out["image"], len(image))
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
