"""The four networks that are compared: one architecture, one set of parameters, four ways for tokens to meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from mosaic import CLASSES
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.layers import LinearizedAttention, Mixer, MixerOptions, register_mixer
from perf_vit.layers.token_grid import TokenGrid, watch_patch_embed
from perf_vit.models import DetectionModelConfig, DetectionSpec, Detector, build_detector
from perf_vit.transforms import Normalizer

WINDOW_TOKENS = 16

_VIT = {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4, "init_values": None}
_SOFTMAX_NAME = "vit_small_patch16_rope_224"
# What the linear family has beside timm's.
_LIKE_FAMILY = {"num_reg_tokens": 4}


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        name: short, for files.
        title: for readers.
        shrink: factor by which tiles are shrunk before the network sees them.
        backbone: timm's name.
        kwargs: passed to `timm.create_model` beside the common ones.
        windows_only: whether softmax attention is cut into windows.
    """

    name: str
    title: str
    shrink: int
    backbone: str
    kwargs: dict[str, Any]
    windows_only: bool = False


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("downsampled", "4x smaller, softmax", 4, _SOFTMAX_NAME, _LIKE_FAMILY),
        Variant(
            "performer",
            "full resolution, Performer",
            1,
            "performer_vit_rope_small_patch16_224",
            {"attn_kwargs": {"num_features": 64, "kernel": "softmax-hyp+"}},
        ),
        Variant(
            "clustered",
            "full resolution, clustered",
            1,
            "clustered_vit_rope_small_patch16_224",
            {
                "attn_kwargs": {
                    "num_clusters": 64,
                    "window_size": WINDOW_TOKENS,
                    "num_sinks": 16,
                    "max_exact_tokens": 0,
                }
            },
        ),
        Variant("windows", "full resolution, softmax in windows", 1, _SOFTMAX_NAME, _LIKE_FAMILY, windows_only=True),
    )
}


@dataclass(frozen=True, kw_only=True)
class WindowOptions(MixerOptions):
    """Options of attention within windows: those that all mixers have."""


@register_mixer("windows")
class WindowMixer(Mixer):
    """Softmax attention within windows of the grid, and among the prefix tokens; nothing passes between windows."""

    options_type = WindowOptions
    needs_grid = True

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        num_prefix, (rows, columns) = self.options.num_prefix_tokens, grid
        if rows % WINDOW_TOKENS or columns % WINDOW_TOKENS:
            raise ValueError(f"expected a grid that windows of {WINDOW_TOKENS} tokens divide, got {rows} x {columns}")
        prefix = F.scaled_dot_product_attention(*(x[:, :, :num_prefix] for x in (q, k, v)))
        split = (rows // WINDOW_TOKENS, WINDOW_TOKENS, columns // WINDOW_TOKENS, WINDOW_TOKENS)
        windows = [
            x[:, :, num_prefix:].unflatten(2, split).transpose(3, 4).flatten(2, 3).flatten(3, 4) for x in (q, k, v)
        ]
        out = F.scaled_dot_product_attention(*windows)
        out = out.unflatten(3, split[1::2]).unflatten(2, split[::2]).transpose(3, 4).flatten(2, 5)
        return torch.cat([prefix, out], dim=2)


def build_variant(variant: Variant, mean: tuple[float, ...], std: tuple[float, ...], side_px: int) -> Detector:
    """A detector with one level of stride 4; of one seed, all variants have the same weights."""
    config = DetectionModelConfig(
        backbone=variant.backbone,
        backbone_kwargs={**_VIT, **variant.kwargs},
        strides=[4],
        channels=64,
        head="fcos",
        head_kwargs={"num_convs": 1, "detections_per_tile": 6000, "score_threshold": 0.05},
    )
    spec = DetectionSpec(classes=CLASSES, normalizer=Normalizer(mean, std), tile_px=side_px // variant.shrink)
    model = build_detector(config, spec)
    if variant.windows_only:
        _cut_into_windows(model.backbone)
    return model


def _cut_into_windows(backbone: nn.Module) -> None:
    eva = next(module for module in backbone.modules() if isinstance(module, Eva))
    grid = TokenGrid()
    watch_patch_embed(eva, grid)
    options = WindowOptions(num_prefix_tokens=eva.num_prefix_tokens)
    for block in eva.blocks:
        block.attn = LinearizedAttention(block.attn, options, grid)
