"""Transforms of pixels between source and model: standardisation, resizing, augmentation."""

from perf_vit.transforms.augment import Augmentation
from perf_vit.transforms.input_bands import InputBands, InputCheck, bands_fit, common_names, with_bands
from perf_vit.transforms.normalize import Normalizer, band_labels, without_tiny
from perf_vit.transforms.resize import resize_masked, resize_with_labels, resize_with_objects, turn, turn_with_objects
from perf_vit.transforms.stain import StainJitter

__all__ = [
    "Augmentation",
    "InputBands",
    "InputCheck",
    "Normalizer",
    "StainJitter",
    "band_labels",
    "bands_fit",
    "common_names",
    "resize_masked",
    "resize_with_labels",
    "resize_with_objects",
    "turn",
    "turn_with_objects",
    "with_bands",
    "without_tiny",
]
