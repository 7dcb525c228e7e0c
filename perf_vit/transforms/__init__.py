"""Transforms of pixels between source and model: standardisation, resizing, augmentation."""

from perf_vit.transforms.augment import Augmentation
from perf_vit.transforms.normalize import Normalizer, band_labels, replace_tiny_std
from perf_vit.transforms.resize import resize_masked, resize_with_labels, resize_with_objects, turn, turn_with_objects
from perf_vit.transforms.stain import StainJitter

__all__ = [
    "Augmentation",
    "Normalizer",
    "StainJitter",
    "band_labels",
    "replace_tiny_std",
    "resize_masked",
    "resize_with_labels",
    "resize_with_objects",
    "turn",
    "turn_with_objects",
]
