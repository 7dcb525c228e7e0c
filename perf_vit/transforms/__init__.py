"""Transforms of pixels between source and model: standardisation, resizing, augmentation."""

from perf_vit.transforms.augment import Augmentation
from perf_vit.transforms.input_bands import InputBands, InputCheck, accepts_bands, common_names, repeat_grey_band
from perf_vit.transforms.normalize import Normalizer, band_labels, replace_tiny_std
from perf_vit.transforms.resize import resize_masked, resize_with_labels, resize_with_objects, turn, turn_with_objects
from perf_vit.transforms.stain import StainJitter

__all__ = [
    "Augmentation",
    "InputBands",
    "InputCheck",
    "Normalizer",
    "StainJitter",
    "accepts_bands",
    "band_labels",
    "common_names",
    "repeat_grey_band",
    "replace_tiny_std",
    "resize_masked",
    "resize_with_labels",
    "resize_with_objects",
    "turn",
    "turn_with_objects",
]
