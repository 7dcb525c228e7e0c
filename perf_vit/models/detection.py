"""Object detection: backbone, neck and head as one network, with the spec of its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.errors import ConfigError, InputError
from perf_vit.models.backbone import build_backbone, check_argument_names, constructor_errors, feature_specs
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
    """Input and output of a detector, saved with its weights.

    Attributes:
        score_threshold: Lowest score of detections to write; training sets it to the maximum of F1 on the validation
            images.
        kind: Geometry of the detections, which the head determines.
        category_ids: COCO id of each class in the training labels, None if they had none.

    The other attributes are those of `InputSpec`. `label_options` are keyword arguments of
    `perf_vit.labels.objects.read_object_labels`.
    """

    takes_grey: ClassVar[bool] = True

    score_threshold: float = 0.5
    kind: ObjectKind = "boxes"
    category_ids: tuple[int, ...] | None = None


class Detector(nn.Module):
    """Object detector for images of any size and number of bands.

    It neither resizes nor normalises: images are padded at the right and bottom with 0, the mean, to the multiple that
    backbone and neck need, and detections are clipped to the image.

    Args:
        backbone: timm `features_only` model.
        neck: Neck that makes the feature levels; see `perf_vit.models.necks`.
        head: Detection head; see `perf_vit.models.heads.DetectionHead`.
        spec: Input and output of the network.
        saved_backbone: Config of the converted model that the backbone was built from, None for a timm model.
        reduce: Factor by which the backbone's input is downsampled (mean over squares of this size in pixels).
    """

    # Modules, typed by their further attributes.
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
        """Multiple to which image sizes are padded, the larger of the neck's and the backbone's."""
        return max(self.neck.size_multiple, self.neck.backbone_multiple)

    def train(self, mode: bool = True) -> Detector:
        """Set the mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        evaluate_frozen(self.backbone)
        return self

    def losses(
        self, images: Sequence[Tensor], labels: Sequence[ObjectLabels], valid: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch, whose sum is minimised.

        Args:
            images: Standardised images, [C, H, W] each, of any sizes.
            labels: Labels of each image, in its pixels.
            valid: Valid pixels of each image, bool [H, W], None if all are; padding is invalid.
        """
        height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
        batch = torch.stack([_padded(image, height, width) for image in images])
        seen = None if valid is None else torch.stack([_padded(each, height, width) for each in valid])
        features, size = self._levels(batch, seen)
        return self.head.losses(features, [_with_padded_masks(each, size) for each in labels])

    def forward(self, tiles: Tensor, valid: Tensor | None = None) -> list[Detections]:
        """Detect the objects of each tile, in its pixels; the network must be in evaluation mode.

        Args:
            tiles: Standardised tiles, [B, C, h, w], of any size.
            valid: Valid pixels, bool [B, h, w], None if all are; a ViT's patches without a valid pixel are excluded
                from attention.
        """
        height, width = tiles.shape[-2:]
        features, _ = self._levels(tiles, valid)
        return [_clipped(found, height, width) for found in self.head.detect(features)]

    def _levels(self, batch: Tensor, valid: Tensor | None = None) -> tuple[list[Tensor], tuple[int, int]]:
        """Return the levels of the neck, and the size of the image that they cover."""
        if batch.shape[1] != len(self.spec.normalizer.mean):
            raise InputError(
                f"expected {len(self.spec.normalizer.mean)} bands, got {batch.shape[1]}; give images with those bands"
            )
        neck = self.neck
        height, width = (_next_multiple(side, neck.size_multiple) for side in batch.shape[-2:])
        seen = tuple(_next_multiple(side, neck.backbone_multiple) for side in (height, width))
        image = _padded(batch, *seen)
        if self.reduce > 1:
            image = F.avg_pool2d(image, self.reduce)
        # Without gradients, converted models process tokens in chunks.
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
    """Clip detections to the tile and drop those outside."""
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
    """Backbone, neck and head; `BackboneTuning` has further keys.

    Attributes:
        backbone: Name of a timm model; or a model with its weights: a folder of `perf-vit convert` or in timm's hub
            format, also as local-dir:FOLDER, or hf-hub:OWNER/MODEL. A plain ViT gets the neck `SimpleFPN`, a pyramid
            `TopDownFPN`.
        reduce: Factor by which the backbone's input is downsampled, to save time on objects much larger than a pixel.
            Strides, labels and detections stay in image pixels.
        out_indices: Indices of the backbone's maps for the neck; None for the last map of a plain ViT, all of a
            pyramid.
        strides: Strides of the levels for the head in pixels, powers of two. Stride 4 finds objects of 4 px and up; 2
            finds smaller ones at four times the cost.
        channels: Number of channels of each level.
        head: fcos, retinanet, faster_rcnn, mask_rcnn, oriented_fcos or a registered one.
        head_kwargs: Further arguments of the head.
    """

    reduce: int = 1
    out_indices: list[int] | None = None
    strides: list[int] = field(default_factory=lambda: [4, 8, 16, 32, 64])
    channels: int = 128
    head: str = "fcos"
    head_kwargs: dict[str, Any] = field(default_factory=dict)


def detector_kind(head: str) -> ObjectKind:
    """Return the geometry that a head detects.

    Raises:
        ConfigError: The head is unknown.
    """
    kind: ObjectKind = getattr(DETECTION_HEADS[head], "kind")  # noqa: B009
    return kind


def build_detector(
    config: DetectionModelConfig, spec: DetectionSpec, saved_backbone: Mapping[str, Any] | None = None
) -> Detector:
    """Build a detector; its weights are random unless `pretrained` is set or the backbone is a folder.

    Args:
        config: Architecture.
        spec: Input and output of the network; the head sets its kind.
        saved_backbone: Config of the converted model that the backbone was built from, used instead of its folder.

    Raises:
        CheckpointError: The folder has no converted model.
        ConfigError: The backbone or head is unknown or doesn't accept its arguments.
    """
    detector_kind(config.head)
    if config.reduce < 1:
        raise ConfigError(f"model.reduce must be at least 1, got {config.reduce}")
    seen_px = -(-spec.tile_px // config.reduce)
    backbone, saved_backbone = build_backbone(
        config, config.out_indices, len(spec.normalizer.mean), seen_px, saved_backbone
    )
    # Strides of the backbone in image pixels.
    specs = [FeatureSpec(each.channels, each.stride * config.reduce) for each in feature_specs(backbone)]
    if config.out_indices is None and len({each.stride for each in specs}) == 1:
        # Use only the last map of a plain ViT, as in the paper (Li et al. 2022).
        specs = specs[-1:]
    with constructor_errors("model.strides"):
        neck = build_neck(specs, config.strides, config.channels)
    check_argument_names(
        DETECTION_HEADS[config.head], config.head_kwargs, f"model.head_kwargs of {config.head}", given=3
    )
    with constructor_errors(f"model.head {config.head}"):
        head = DETECTION_HEADS[config.head](config.channels, len(spec.classes), config.strides, **config.head_kwargs)
    detector = Detector(backbone, neck, head, spec, saved_backbone, reduce=config.reduce)
    tune_backbone(backbone, config)
    # Convolutions take three quarters of the time in this layout on CPUs with bfloat16 units and on GPUs.
    return detector.to(memory_format=torch.channels_last)
