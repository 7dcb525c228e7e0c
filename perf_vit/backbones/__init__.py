"""Backbones; importing this package registers them with timm."""

from perf_vit.backbones import hct, linear_vit, rope_vit
from perf_vit.backbones.hct import *  # noqa: F403
from perf_vit.backbones.linear_vit import *  # noqa: F403
from perf_vit.backbones.rope_vit import *  # noqa: F403

__all__ = [*hct.__all__, *linear_vit.__all__, *rope_vit.__all__]
