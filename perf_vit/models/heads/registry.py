"""Registries of heads: a config's `model.head` is a name in one of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from perf_vit.errors import ConfigError
from perf_vit.registry import Registry

__all__ = ["DETECTION_HEADS", "SEGMENTATION_HEADS", "register_detection_head", "register_segmentation_head"]

SEGMENTATION_HEADS: Registry[Callable[..., nn.Module]] = Registry("model.head", ConfigError)
"""Heads by name, called with (feature_specs, in_chans, num_classes, **options).

A head's `forward(features, image)` takes the backbone's maps and the image [B, C, H, W] and returns logits
[B, num_classes, H, W].
"""

DETECTION_HEADS: Registry[Callable[..., nn.Module]] = Registry("model.head", ConfigError)
"""Heads by name, called with (in_channels, num_classes, strides, **options); see `DetectionHead` for their methods."""

register_segmentation_head = SEGMENTATION_HEADS.register
register_detection_head = DETECTION_HEADS.register
