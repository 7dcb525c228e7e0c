"""Backbones; importing this package registers them with timm."""

from perf_vit.models.backbones import performer_vit
from perf_vit.models.backbones.performer_vit import *  # noqa: F403

__all__ = list(performer_vit.__all__)
