"""Backbone + head as one network, together with all that prediction needs to know about its input."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from perf_vit.models.finetune import evaluate_frozen
from perf_vit.models.input_spec import TaskSpec
from perf_vit.models.valid_tokens import forward_maps

__all__ = ["SegmentationSpec", "Segmenter", "network_id"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationSpec(TaskSpec):
    """What a trained segmenter expects and means; saved with its weights.

    Attributes:
        background: name of the class that is background; otherwise "ignore" or, with `multilabel`, "none" for the
            meaning of pixels under no polygon, or None where labels had no polygons.
        multilabel: each class is true or not by itself; its scores are logits of a sigmoid, not of a softmax.

    The others are those of `InputSpec`; `label_options` are keyword arguments of `perf_vit.io.open_labels`.
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
