"""Backbones; importing this package registers them with timm."""

from perf_vit.models.backbones import hct, performer_vit, rope_vit, scatterbrain_vit
from perf_vit.models.backbones.hct import *  # noqa: F403
from perf_vit.models.backbones.performer_vit import *  # noqa: F403
from perf_vit.models.backbones.rope_vit import *  # noqa: F403
from perf_vit.models.backbones.scatterbrain_vit import *  # noqa: F403

__all__ = [*hct.__all__, *performer_vit.__all__, *rope_vit.__all__, *scatterbrain_vit.__all__]
