"""Augmentation of image and labels together, for any band count."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from perf_vit.transforms.resize import divide_by_weight
from perf_vit.types import IGNORE_INDEX, BoolArray, LabelArray

# albumentations asks the network for its newest release on import unless told not to.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A

__all__ = ["Augmentation"]

FloatArray = npt.NDArray[np.float32]


class BandGainOffset(A.ImageOnlyTransform):
    """Multiply and shift each band of a standardised image by random amounts.

    The photometric transforms of albumentations clip float images to [0, 1]; standardised pixels are neither, and
    have any number of bands.

    Args:
        gain: each band is multiplied by a factor from [1 - gain, 1 + gain].
        offset: each band is shifted by an amount from [-offset, offset], in standard deviations. Half of both is
            common to all bands (exposure), half is a band's own (colour).
        p: probability of applying it.
    """

    def __init__(self, gain: float, offset: float, p: float = 0.8) -> None:
        super().__init__(p=p)
        self.gain = gain
        self.offset = offset

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw one gain and one offset a band."""
        num_bands = data["image"].shape[-1]
        draw = self.random_generator.uniform(-1, 1, (2, num_bands + 1)).astype(np.float32)
        common_and_own = (draw[:, :1] + draw[:, 1:]) / 2
        return {"gains": 1 + self.gain * common_and_own[0], "offsets": self.offset * common_and_own[1]}

    def apply(self, img: FloatArray, gains: FloatArray, offsets: FloatArray, **params: Any) -> FloatArray:
        """Apply the drawn gains and offsets to [H, W, C]."""
        out = np.empty_like(img)
        # Band by band: broadcasting over an inner axis of three takes NumPy five times as long.
        for band, (gain, offset) in enumerate(zip(gains, offsets, strict=True)):
            np.multiply(img[..., band], gain, out=out[..., band])
            out[..., band] += offset
        return out


class BandShuffle(A.ImageOnlyTransform):
    """Put the bands of a standardised image into a random order: red roofs turn blue or green and keep their shape."""

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw an order."""
        return {"order": self.random_generator.permutation(data["image"].shape[-1])}

    def apply(self, img: FloatArray, order: npt.NDArray[np.int64], **params: Any) -> FloatArray:
        """Apply the drawn order to [H, W, C]."""
        return np.ascontiguousarray(img[..., order])


class ValidMeans(A.ImageOnlyTransform):
    """Divide interpolated bands by their interpolated masks, which follow them as channels, and drop the masks.

    Invalid values are NaN afterwards, so they go with their band, wherever colours put it.
    """

    def apply(self, img: FloatArray, **params: Any) -> FloatArray:
        """Apply to [H, W, 2 C]; gives [H, W, C]."""
        planes = img.transpose(2, 0, 1)
        pixels, held = divide_by_weight(*np.split(planes, 2))
        return _channels_last(np.where(held, pixels, np.float32(np.nan)))


class Augmentation:
    """Flips, quarter turns, scale and colour, each drawn from a seed given with the sample.

    Args:
        flips: the eight symmetries of the square: right for imagery seen from above.
        scale: (smallest, largest) zoom about the tile's centre, each axis by a factor of its own; (1, 1) for none. What
            a zoom below 1 uncovers is 0 in the image and ignored in the labels.
        gain: see `BandGainOffset`; 0 with offset 0 for none.
        offset: see `BandGainOffset`.
        shuffle: probability of a random order of the bands, where shapes tell more than colours do.
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
        # Nothing is drawn between the two, so a mask doesn't change what a seed decides.
        self._masked = A.Compose([*geometry, ValidMeans(p=1.0), *colors])

    def __call__(
        self, image: FloatArray, labels: LabelArray, seed: int, mask: BoolArray | None = None
    ) -> tuple[FloatArray, LabelArray, BoolArray]:
        """Augment one sample.

        Args:
            image: [C, H, W] float32, standardised.
            labels: class indices, [H, W], or layers, [K, H, W].
            seed: decides every draw; the same seed gives the same sample in any process.
            mask: True where a value holds data, [C, H, W], or [1, H, W] for all bands; None for everywhere. Invalid
                values have no part in their neighbours and stay 0.

        Returns:
            The augmented image and labels, shapes and dtypes kept, and where the image has a valid value, [H, W].
            Without invalid values in `mask`, that is everywhere: also what a zoom uncovers.
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
    """[C, H, W] of [H, W, C], or of [H, W], which albumentations may make of one channel."""
    stacked = planes.reshape(*planes.shape[:2], num_planes)
    return np.ascontiguousarray(stacked.transpose(2, 0, 1), dtype=np.float32)
