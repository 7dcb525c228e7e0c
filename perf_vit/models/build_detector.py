"""Detectors from configs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from perf_vit.errors import ConfigError
from perf_vit.models.build import build_backbone, feature_specs
from perf_vit.models.detector import DetectionSpec, Detector, ObjectKind
from perf_vit.models.finetune import BackboneTuning, tune_backbone
from perf_vit.models.heads.fcos import FCOSHead
from perf_vit.models.heads.oriented_fcos import OrientedFCOSHead
from perf_vit.models.heads.rcnn import FasterRCNNHead, MaskRCNNHead
from perf_vit.models.heads.retinanet import RetinaNetHead
from perf_vit.models.known_arguments import built_from, check_known
from perf_vit.models.necks import build_neck
from perf_vit.types import FeatureSpec

__all__ = ["DetectionModelConfig", "build_detector", "detector_kind"]

_HEADS: dict[str, Callable[..., nn.Module]] = {
    "fcos": FCOSHead,
    "retinanet": RetinaNetHead,
    "faster_rcnn": FasterRCNNHead,
    "mask_rcnn": MaskRCNNHead,
    "oriented_fcos": OrientedFCOSHead,
}


@dataclass(kw_only=True)
class DetectionModelConfig(BackboneTuning):
    """A backbone, a neck and a head; `BackboneTuning` has further keys.

    Attributes:
        backbone: any timm model name that takes `features_only`; or a folder with a converted model, whose weights are
            loaded. A plain ViT gets the neck `SimpleFPN`, a pyramid `TopDownFPN`.
        reduce: the backbone sees the means of squares of this side: less work for objects much larger than a pixel.
            Strides, labels and detections stay in image pixels.
        out_indices: the backbone's maps that the neck sees; the last one of a plain ViT, all of a pyramid if left out.
        strides: of the levels that the head looks at, in pixels, powers of two. Stride 4 finds objects of 4 px and up;
            2 finds smaller ones and takes four times the work.
        channels: of each level.
        head: fcos, retinanet, faster_rcnn, mask_rcnn or oriented_fcos.
        head_kwargs: passed to the head.
    """

    reduce: int = 1
    out_indices: list[int] | None = None
    strides: list[int] = field(default_factory=lambda: [4, 8, 16, 32, 64])
    channels: int = 128
    head: str = "fcos"
    head_kwargs: dict[str, Any] = field(default_factory=dict)


def detector_kind(head: str) -> ObjectKind:
    """What a head finds.

    Raises:
        ConfigError: no such head.
    """
    if head not in _HEADS:
        raise ConfigError(f"model.head must be one of {', '.join(_HEADS)}, got {head}")
    kind: ObjectKind = getattr(_HEADS[head], "kind")  # noqa: B009
    return kind


def build_detector(
    config: DetectionModelConfig, spec: DetectionSpec, saved_backbone: Mapping[str, Any] | None = None
) -> Detector:
    """Build a detector; its weights are random unless `pretrained` is set or the backbone is a folder.

    Args:
        config: the network.
        spec: what it expects and means; the head decides its kind.
        saved_backbone: config of the converted model that the backbone was made of, to do without its folder.

    Raises:
        CheckpointError: a folder without a converted model.
        ConfigError: an unknown backbone or head, or arguments they don't take.
    """
    detector_kind(config.head)
    if config.reduce < 1:
        raise ConfigError(f"model.reduce must be at least 1, got {config.reduce}")
    seen_px = -(-spec.tile_px // config.reduce)
    backbone, saved_backbone = build_backbone(
        config, config.out_indices, len(spec.normalizer.mean), seen_px, saved_backbone
    )
    # Neck and head know the backbone by its strides in image pixels.
    specs = [FeatureSpec(each.channels, each.stride * config.reduce) for each in feature_specs(backbone)]
    if config.out_indices is None and len({each.stride for each in specs}) == 1:
        # The last map of a plain ViT, as in the paper; the neck leaves the others where they are.
        specs = specs[-1:]
    with built_from("model.strides"):
        neck = build_neck(specs, config.strides, config.channels)
    check_known(_HEADS[config.head], config.head_kwargs, f"model.head_kwargs of {config.head}", given=3)
    with built_from(f"model.head {config.head}"):
        head = _HEADS[config.head](config.channels, len(spec.classes), config.strides, **config.head_kwargs)
    detector = Detector(backbone, neck, head, spec, saved_backbone, reduce=config.reduce)
    tune_backbone(backbone, config)
    # Convolutions in this order take three quarters of the time on CPUs with bfloat16 units and on GPUs.
    return detector.to(memory_format=torch.channels_last)
