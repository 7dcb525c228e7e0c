"""The keys that the model configs of all tasks share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["BackboneConfig"]


@dataclass(kw_only=True)
class BackboneConfig:
    """A backbone.

    Attributes:
        backbone: any timm model name; or a folder with a converted model, whose weights are loaded.
        backbone_kwargs: passed to `timm.create_model`, e.g. {attn_kwargs: {num_features: 128}}; those of
            `perf_vit.conversion.timm_arguments`.
        pretrained: load timm's weights for the backbone.
    """

    backbone: str = "performer_vit_small_patch16_224"
    backbone_kwargs: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
