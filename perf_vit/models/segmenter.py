"""Backbone + head as one network, together with all that prediction needs to know about its input."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from perf_vit.models.finetune import evaluate_frozen
from perf_vit.transforms import InputBands, Normalizer

__all__ = ["Segmenter", "SegmenterSpec", "network_id", "segmenter_id"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmenterSpec:
    """What a trained segmenter expects and means; saved with its weights.

    Attributes:
        classes: names, in the order of the output channels.
        normalizer: statistics of the bands it was trained on.
        tile_px: side of the square tiles it was trained on, in pixels.
        bands: 1-based bands of the source that it reads, None for all of them.
        nodata: value of missing pixels, instead of the one that files declare; None for theirs.
        resolution: side of a pixel that rasters are read at, None for their own.
        resolution_unit: name and metres of the unit of `resolution`, that of the CRS of the rasters it was trained on;
            None instead of metres for degrees. None without `resolution`.
        background: name of the class that is background; otherwise "ignore" or, with `multilabel`, "none" for the
            meaning of pixels under no polygon, or None where labels had no polygons.
        multilabel: each class is true or not by itself; its scores are logits of a sigmoid, not of a softmax.
        mpp: micrometres per pixel that slides are read at, None for a model of rasters.
        slide_mpp: of level 0 of the slides that it was trained on, where their files don't say.
        tissue: "otsu" for a model that was trained on tissue alone.
        trained_on: bands of the training images, to tell input that is not like them; None where nobody knows.
        label_options: how its label files are read, as keyword arguments of `perf_vit.io.open_labels`.
    """

    classes: tuple[str, ...]
    normalizer: Normalizer
    tile_px: int
    bands: tuple[int, ...] | None = None
    nodata: float | None = None
    resolution: float | None = None
    resolution_unit: tuple[str, float | None] | None = None
    background: str | None = None
    multilabel: bool = False
    mpp: float | None = None
    slide_mpp: float | None = None
    tissue: str | None = None
    trained_on: InputBands | None = None
    label_options: dict[str, Any] = field(default_factory=dict)

    @property
    def background_index(self) -> int | None:
        """Class index of the background, None where no class is background."""
        return self.classes.index(self.background) if self.background in self.classes else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        values = asdict(self)
        values["normalizer"] = self.normalizer.to_dict()
        values["trained_on"] = self.trained_on and self.trained_on.to_dict()
        # Models without them keep their id.
        later = ("slide_mpp", "tissue", "trained_on", "resolution_unit")
        return {k: v for k, v in values.items() if v is not None or k not in later}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SegmenterSpec:
        """The inverse of `to_dict`."""
        return cls(
            classes=tuple(values["classes"]),
            normalizer=Normalizer.from_dict(values["normalizer"]),
            tile_px=values["tile_px"],
            bands=None if values["bands"] is None else tuple(values["bands"]),
            nodata=values["nodata"],
            resolution=values.get("resolution"),
            resolution_unit=tuple(values["resolution_unit"]) if values.get("resolution_unit") else None,
            # Checkpoints without it are older.
            background=values.get("background"),
            multilabel=values.get("multilabel", False),
            mpp=values.get("mpp"),
            slide_mpp=values.get("slide_mpp"),
            tissue=values.get("tissue"),
            trained_on=values.get("trained_on") and InputBands.from_dict(values["trained_on"]),
            label_options=values["label_options"],
        )


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
        spec: SegmenterSpec,
        size_multiple: int,
        saved_backbone: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.spec = spec
        self.size_multiple = size_multiple
        self.saved_backbone = saved_backbone

    def forward(self, image: Tensor) -> Tensor:
        """Logits for every pixel.

        Args:
            image: standardised tile, [B, C, H, W]; H and W multiples of `size_multiple`.

        Returns:
            [B, num_classes, H, W].
        """
        # Without gradients, converted models go through their MLPs in pieces.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_backbone_frozen):
            features: Sequence[Tensor] = self.backbone(image)
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


def segmenter_id(model: Segmenter) -> str:
    """Twelve hex digits that another network, other weights or another meaning of them would not have."""
    return network_id(model, model.spec.to_dict())


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
