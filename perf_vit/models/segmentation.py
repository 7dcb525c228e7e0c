"""Semantic segmentation: backbone and head as one network, with the spec of its input."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

import perf_vit.backbones  # noqa: F401  (registers the backbones)
from perf_vit.errors import ConfigError
from perf_vit.models.backbone import (
    build_backbone,
    check_argument_names,
    constructor_errors,
    default_indices,
    feature_specs,
    map_strides,
)
from perf_vit.models.finetune import BackboneTuning, evaluate_frozen, tune_backbone
from perf_vit.models.heads import SEGMENTATION_HEADS
from perf_vit.models.input_spec import TaskSpec
from perf_vit.models.valid_tokens import forward_maps

__all__ = ["SegmentationModelConfig", "SegmentationSpec", "Segmenter", "build_segmenter", "network_id"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationSpec(TaskSpec):
    """Input and output of a segmentation network, saved with its weights.

    Attributes:
        background: Name of the background class; or the meaning of pixels outside all polygons, "ignore", or "none"
            with `multilabel`; None for labels without polygons.
        multilabel: Whether classes are independent, with logits of a sigmoid instead of a softmax.

    The other attributes are those of `InputSpec`. `label_options` are keyword arguments of
    `perf_vit.labels.open_labels`.
    """

    background: str | None = None
    multilabel: bool = False

    @property
    def background_index(self) -> int | None:
        """Class index of the background, None without a background class."""
        return self.classes.index(self.background) if self.background in self.classes else None


class Segmenter(nn.Module):
    """Semantic segmentation network.

    Args:
        backbone: timm `features_only` model.
        head: Module from the list of feature maps and the image to logits.
        spec: Input and output of the network.
        size_multiple: Multiple of height and width of tiles, the patch size of the backbone.
        saved_backbone: Config of the converted model that the backbone was built from, None for a timm model.
    """

    task = "segmentation"

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        spec: SegmentationSpec,
        size_multiple: int,
        saved_backbone: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.spec = spec
        self.size_multiple = size_multiple
        self.saved_backbone = saved_backbone

    def forward(self, image: Tensor, valid: Tensor | None = None) -> Tensor:
        """Compute the logits of every pixel.

        Args:
            image: Standardised tiles, [B, C, H, W]; H and W multiples of `size_multiple`.
            valid: Valid pixels, bool [B, H, W], None if all are; a ViT's patches without a valid pixel are excluded
                from attention.

        Returns:
            Logits, [B, num_classes, H, W].
        """
        # Without gradients, converted models process tokens in chunks.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_backbone_frozen):
            features = forward_maps(self.backbone, image, valid)
        return self.head(features, image)

    def to_labels(self, logits: Tensor) -> Tensor:
        """Convert logits, [B, K, H, W], to class indices, [B, H, W], or with `multilabel` to 0 and 1, [B, K, H, W]."""
        return (logits > 0).long() if self.spec.multilabel else logits.argmax(1)

    @property
    def is_backbone_frozen(self) -> bool:
        """Whether all weights of the backbone are frozen."""
        return not any(parameter.requires_grad for parameter in self.backbone.parameters())

    def train(self, mode: bool = True) -> Self:
        """Set the mode; frozen parts of the backbone stay in evaluation mode."""
        super().train(mode)
        evaluate_frozen(self.backbone)
        return self


# Settings of timm's modules that have no parameters and aren't part of their text.
_UNPRINTED = ("global_pool", "num_heads", "pool_include_prefix", "rotate_half", "shift_size", "window_size")


def network_id(model: nn.Module, meaning: Mapping[str, Any]) -> str:
    """Return a hash of 12 hex digits of a network's architecture, weights and meaning.

    Args:
        model: Network with its weights.
        meaning: Plain values that determine the meaning of its output.
    """
    digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
    # Most options without parameters are part of the text; projections are non-persistent buffers.
    digest.update(str(model).encode())
    settings = [str(getattr(module, name, None)) for module in model.modules() for name in _UNPRINTED]
    digest.update(json.dumps(settings).encode())
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


@dataclass(kw_only=True)
class SegmentationModelConfig(BackboneTuning):
    """Backbone and head; `BackboneTuning` has further keys.

    Attributes:
        out_indices: Indices of the backbone's maps that are the head's input; None for four blocks of a plain ViT, or
            the maps of strides 4 to 32 of a pyramid.
        head: full_resolution, linear, upernet, dpt, segformer or a registered one; None for full_resolution on a plain
            ViT, upernet on a pyramid.
        head_kwargs: Further arguments of the head.
    """

    out_indices: list[int] | None = None
    head: str | None = None
    head_kwargs: dict[str, Any] = field(default_factory=dict)


def build_segmenter(
    config: SegmentationModelConfig, spec: SegmentationSpec, saved_backbone: Mapping[str, Any] | None = None
) -> Segmenter:
    """Build a segmentation network; its weights are random unless `pretrained` is set or the backbone is a folder.

    Args:
        config: Architecture.
        spec: Input and output of the network.
        saved_backbone: Config of the converted model that the backbone was built from, used instead of its folder.

    Raises:
        CheckpointError: The folder has no converted model.
        ConfigError: The backbone or head is unknown or doesn't accept its arguments, or the tile size is not a
            multiple of the patch size.
    """
    in_chans, indices = len(spec.normalizer.mean), config.out_indices
    if indices is None:
        indices = default_indices(map_strides(config, spec.tile_px, saved_backbone))
    backbone, saved_backbone = build_backbone(config, indices, in_chans, spec.tile_px, saved_backbone)
    specs = feature_specs(backbone)
    size_multiple = max(s.stride for s in specs)
    if spec.tile_px % size_multiple:
        nearest = max(1, round(spec.tile_px / size_multiple)) * size_multiple
        raise ConfigError(
            f"data.tile_px must be a multiple of the patch size {size_multiple}, got {spec.tile_px}; try {nearest}"
        )
    has_one_stride = len({s.stride for s in specs}) == 1
    name = config.head or ("full_resolution" if has_one_stride else "upernet")
    make_head = SEGMENTATION_HEADS[name]
    check_argument_names(make_head, config.head_kwargs, f"model.head_kwargs of {name}", given=3)
    with constructor_errors(f"model.head {name}"):
        head = make_head(specs, in_chans, len(spec.classes), **config.head_kwargs)
    tune_backbone(backbone, config)
    return Segmenter(backbone, head, spec, size_multiple, saved_backbone)
