"""Backbone + head as one network, together with all that prediction needs to know about its input."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

import perf_vit.models.backbones  # noqa: F401  (registers the backbones)
from perf_vit.errors import ConfigError
from perf_vit.models.backbone import build_backbone, built_from, check_known, feature_specs
from perf_vit.models.finetune import BackboneTuning, evaluate_frozen, tune_backbone
from perf_vit.models.heads import SEGMENTATION_HEADS
from perf_vit.models.input_spec import TaskSpec
from perf_vit.models.valid_tokens import forward_maps

__all__ = ["SegmentationModelConfig", "SegmentationSpec", "Segmenter", "build_segmenter", "network_id"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationSpec(TaskSpec):
    """What a trained segmenter expects and means; saved with its weights.

    Attributes:
        background: name of the class that is background; otherwise "ignore" or, with `multilabel`, "none" for the
            meaning of pixels under no polygon, or None where labels had no polygons.
        multilabel: each class is true or not by itself; its scores are logits of a sigmoid, not of a softmax.

    The others are those of `InputSpec`; `label_options` are keyword arguments of `perf_vit.labels.open_labels`.
    """

    background: str | None = None
    multilabel: bool = False

    @property
    def background_index(self) -> int | None:
        """Class index of the background, None where no class is background."""
        return self.classes.index(self.background) if self.background in self.classes else None


class Segmenter(nn.Module):
    """A semantic segmentation network.

    Args:
        backbone: a timm `features_only` model.
        head: takes the list of feature maps and the image, gives logits.
        spec: what the network expects and means.
        size_multiple: height and width of a tile must be multiples of it, the patch size of the backbone.
        saved_backbone: config of the converted model that the backbone was made of, None for a timm model.
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
        """Logits for every pixel.

        Args:
            image: standardised tile, [B, C, H, W]; H and W multiples of `size_multiple`.
            valid: valid pixels, bool [B, H, W], None where all are; a ViT's patches without one are left out of
                attention.

        Returns:
            [B, num_classes, H, W].
        """
        # Without gradients, converted models go through their MLPs in pieces.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_backbone_frozen):
            features = forward_maps(self.backbone, image, valid)
        return self.head(features, image)

    def decide(self, logits: Tensor) -> Tensor:
        """What logits [B, K, H, W] say: class indices [B, H, W], or 0 and 1 for each class [B, K, H, W]."""
        return (logits > 0).long() if self.spec.multilabel else logits.argmax(1)

    @property
    def is_backbone_frozen(self) -> bool:
        """Whether no weight of the backbone is trained."""
        return not any(parameter.requires_grad for parameter in self.backbone.parameters())

    def train(self, mode: bool = True) -> Self:
        """Training mode, in which frozen parts of the backbone stay as they are evaluated."""
        super().train(mode)
        evaluate_frozen(self.backbone)
        return self


def network_id(model: nn.Module, meaning: Mapping[str, Any]) -> str:
    """Twelve hex digits that another network, other weights or another meaning of them would not have.

    Args:
        model: with its weights.
        meaning: plain values that decide what its output means.
    """
    digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
    # Options without parameters show in the text; projections are buffers that no state dict holds.
    digest.update(str(model).encode())
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


@dataclass(kw_only=True)
class SegmentationModelConfig(BackboneTuning):
    """A backbone and a head; `BackboneTuning` has further keys.

    Attributes:
        backbone: any timm model name that takes `features_only`, and `img_size` and `dynamic_img_size` if timm says
            that its input size is fixed; or a folder with a converted model, whose weights are loaded.
        out_indices: the blocks whose outputs the head sees.
        head: full_resolution, linear, upernet, dpt, segformer, or a registered one.
        head_kwargs: passed to the head.
    """

    out_indices: list[int] = field(default_factory=lambda: [2, 5, 8, 11])
    head: str = "full_resolution"
    head_kwargs: dict[str, Any] = field(default_factory=dict)


def build_segmenter(
    config: SegmentationModelConfig, spec: SegmentationSpec, saved_backbone: Mapping[str, Any] | None = None
) -> Segmenter:
    """Build a segmentation network; its weights are random unless `pretrained` is set or the backbone is a folder.

    Args:
        config: the network.
        spec: what it expects and means.
        saved_backbone: config of the converted model that the backbone was made of, to do without its folder.

    Raises:
        CheckpointError: a folder without a converted model.
        ConfigError: an unknown backbone or head, arguments they don't take, or a tile size that the patch size
            doesn't divide.
    """
    in_chans = len(spec.normalizer.mean)
    backbone, saved_backbone = build_backbone(config, config.out_indices, in_chans, spec.tile_px, saved_backbone)
    specs = feature_specs(backbone)
    size_multiple = max(s.stride for s in specs)
    if spec.tile_px % size_multiple:
        nearest = max(1, round(spec.tile_px / size_multiple)) * size_multiple
        raise ConfigError(
            f"data.tile_px must be a multiple of the patch size {size_multiple}, got {spec.tile_px}; try {nearest}"
        )
    make_head = SEGMENTATION_HEADS[config.head]
    check_known(make_head, config.head_kwargs, f"model.head_kwargs of {config.head}", given=3)
    with built_from(f"model.head {config.head}"):
        head = make_head(specs, in_chans, len(spec.classes), **config.head_kwargs)
    tune_backbone(backbone, config)
    return Segmenter(backbone, head, spec, size_multiple, saved_backbone)
