"""Transforms of pixels between source and model: standardisation, resizing, augmentation."""

import importlib
from typing import TYPE_CHECKING, Any

from perf_vit.errors import extra
from perf_vit.transforms.normalize import Normalizer, band_labels, replace_tiny_std
from perf_vit.transforms.resize import resize_masked, resize_with_labels, resize_with_objects, turn, turn_with_objects

if TYPE_CHECKING:
    from perf_vit.transforms.augment import Augmentation, StainJitter

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


def __getattr__(name: str) -> Any:
    if name in ("Augmentation", "StainJitter"):
        with extra("train", f"perf_vit.transforms.{name}"):
            return getattr(importlib.import_module("perf_vit.transforms.augment"), name)
    raise AttributeError(f"module 'perf_vit.transforms' has no attribute {name!r}")
