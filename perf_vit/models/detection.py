"""Backbone + neck + head as one network, together with all that prediction needs to know about its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.errors import ConfigError, InputError
from perf_vit.models.backbone import build_backbone, built_from, check_known, feature_specs
from perf_vit.models.finetune import BackboneTuning, evaluate_frozen, tune_backbone
from perf_vit.models.heads import DETECTION_HEADS
from perf_vit.models.input_spec import TaskSpec
from perf_vit.models.necks import build_neck
from perf_vit.models.valid_tokens import forward_maps
from perf_vit.types import Detections, FeatureSpec, ObjectLabels

__all__ = ["DetectionModelConfig", "DetectionSpec", "Detector", "ObjectKind", "build_detector", "detector_kind"]

ObjectKind = Literal["boxes", "oriented_boxes", "masks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionSpec(TaskSpec):
    """What a trained detector expects and means; saved with its weights.

    Attributes:
        score_threshold: lowest score of an object that is worth writing; training sets it to where F1 was highest on
            the validation images.
        kind: geometry of its detections; the head decides it.
        category_ids: COCO's id of each class in the labels that it was trained on, None where they had none.

    The others are those of `InputSpec`; `label_options` are keyword arguments of
    `perf_vit.labels.objects.read_object_labels`.
    """

    takes_grey: ClassVar[bool] = True

    score_threshold: float = 0.5
    kind: ObjectKind = "boxes"
    category_ids: tuple[int, ...] | None = None


class Detector(nn.Module):
    """An object detector for images of any size and any number of bands.

    It neither resizes nor normalises: images are padded with 0, the mean, at the right and the bottom, to what backbone
    and neck need, and detections are cut at the image's border.

    Args:
        backbone: a timm `features_only` model.
        neck: makes the levels of the maps; see `perf_vit.models.necks`.
        head: see `perf_vit.models.heads.DetectionHead`.
        spec: what the network expects and means.
        saved_backbone: config of the converted model that the backbone was made of, None for a timm model.
        reduce: the backbone sees means of squares of this side, in pixels.
    """

    # Modules, seen by what else they have.
    neck: Any
    head: Any

    task = "detection"

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        head: nn.Module,
        spec: DetectionSpec,
        saved_backbone: Mapping[str, Any] | None = None,
        *,
        reduce: int = 1,
    ) -> None:
        super().__init__()
        self.reduce = reduce
        self.backbone = backbone
        self.neck = neck
        self.head = head
        self.spec = replace(spec, kind=self.head.kind)
        self.saved_backbone = saved_backbone

    @property
    def size_multiple(self) -> int:
        """What sides of images are padded to multiples of, for the levels or for the backbone, whichever is larger."""
        return max(self.neck.size_multiple, self.neck.backbone_multiple)

    def train(self, mode: bool = True) -> Detector:
        """Set the mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        evaluate_frozen(self.backbone)
        return self

    def losses(
        self, images: Sequence[Tensor], labels: Sequence[ObjectLabels], valid: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Losses of a batch, whose sum is to be minimised.

        Args:
            images: standardised, [C, H, W] each, of any sizes.
            labels: one an image, in its pixels.
            valid: valid pixels of each image, bool [H, W], None where all are; padding is valid in none.
        """
        height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
        batch = torch.stack([_padded(image, height, width) for image in images])
        seen = None if valid is None else torch.stack([_padded(each, height, width) for each in valid])
        features, size = self._levels(batch, seen)
        return self.head.losses(features, [_with_padded_masks(each, size) for each in labels])

    def forward(self, tiles: Tensor, valid: Tensor | None = None) -> list[Detections]:
        """The objects of each tile, in its pixels; put the network into evaluation mode first.

        Args:
            tiles: standardised, [B, C, h, w], of any size.
            valid: valid pixels, bool [B, h, w], None where all are; a ViT's patches without one are left out of
                attention.
        """
        height, width = tiles.shape[-2:]
        features, _ = self._levels(tiles, valid)
        return [_clipped(found, height, width) for found in self.head.detect(features)]

    def _levels(self, batch: Tensor, valid: Tensor | None = None) -> tuple[list[Tensor], tuple[int, int]]:
        """The neck's levels and the size of the image that they cover."""
        if batch.shape[1] != len(self.spec.normalizer.mean):
            raise InputError(f"expected {len(self.spec.normalizer.mean)} bands, got {batch.shape[1]}")
        neck = self.neck
        height, width = (_next_multiple(side, neck.size_multiple) for side in batch.shape[-2:])
        seen = tuple(_next_multiple(side, neck.backbone_multiple) for side in (height, width))
        image = _padded(batch, *seen)
        if self.reduce > 1:
            image = F.avg_pool2d(image, self.reduce)
        # Without gradients, converted models go through their MLPs in pieces.
        is_frozen = not any(parameter.requires_grad for parameter in self.backbone.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen):
            maps = forward_maps(self.backbone, image, None if valid is None else _padded(valid, *seen), self.reduce)
        return neck(maps, (height, width)), (height, width)


def _next_multiple(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def _padded(image: Tensor, height: int, width: int) -> Tensor:
    return F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]))


def _with_padded_masks(labels: ObjectLabels, size: tuple[int, int]) -> ObjectLabels:
    if labels.masks is None:
        return labels
    return replace(labels, masks=_padded(torch.as_tensor(labels.masks), *size).numpy())


def _clipped(found: Detections, height: int, width: int) -> Detections:
    """Detections cut at the tile's border; those that lie outside are dropped."""
    if found.masks is not None:
        masks = found.masks[:, :height, :width]
        keep = masks.flatten(1).any(1)
        return Detections(scores=found.scores[keep], labels=found.labels[keep], masks=masks[keep])
    if found.oriented_boxes is not None:
        x, y = found.oriented_boxes[:, 0], found.oriented_boxes[:, 1]
        keep = (x >= 0) & (y >= 0) & (x < width) & (y < height)
        return Detections(
            scores=found.scores[keep], labels=found.labels[keep], oriented_boxes=found.oriented_boxes[keep]
        )
    limits = found.boxes_xyxy.new_tensor([width, height, width, height])
    boxes = torch.minimum(found.boxes_xyxy.clamp(min=0), limits)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return Detections(scores=found.scores[keep], labels=found.labels[keep], boxes_xyxy=boxes[keep])


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
        head: fcos, retinanet, faster_rcnn, mask_rcnn, oriented_fcos, or a registered one.
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
    kind: ObjectKind = getattr(DETECTION_HEADS[head], "kind")  # noqa: B009
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
    check_known(DETECTION_HEADS[config.head], config.head_kwargs, f"model.head_kwargs of {config.head}", given=3)
    with built_from(f"model.head {config.head}"):
        head = DETECTION_HEADS[config.head](config.channels, len(spec.classes), config.strides, **config.head_kwargs)
    detector = Detector(backbone, neck, head, spec, saved_backbone, reduce=config.reduce)
    tune_backbone(backbone, config)
    # Convolutions in this order take three quarters of the time on CPUs with bfloat16 units and on GPUs.
    return detector.to(memory_format=torch.channels_last)
