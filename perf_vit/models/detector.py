"""Backbone + neck + head as one network, together with all that prediction needs to know about its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.errors import InputError
from perf_vit.models.finetune import evaluate_frozen
from perf_vit.models.input_spec import TaskSpec
from perf_vit.models.valid_tokens import forward_maps
from perf_vit.types import Detections, ObjectLabels

__all__ = ["DetectionSpec", "Detector", "ObjectKind"]

ObjectKind = Literal["boxes", "oriented_boxes", "masks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionSpec(TaskSpec):
    """What a trained detector expects and means; saved with its weights.

    Attributes:
        score_threshold: lowest score of an object that is worth writing; training sets it to where F1 was highest on
            the validation images.
        kind: geometry of its detections; the head decides it.
        category_ids: COCO's id of each class in the labels that it was trained on, None where they had none.

    The others are those of `InputSpec`; `label_options` are keyword arguments of `perf_vit.data.read_object_labels`.
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
