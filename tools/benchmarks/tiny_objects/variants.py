"""The networks that are compared: one architecture, several ways for tokens to meet, and a convolutional one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fitting import MEAN, STD

from perf_vit.models import DetectionModelConfig, DetectionSpec, Detector, build_detector
from perf_vit.transforms import Normalizer

WINDOW_TOKENS = 16
"""Rows and columns of a window: 128 px."""

STRIDE, CHANNELS = 4, 64
"""Of the one level that the head sees."""

_VIT = {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4, "init_values": None}
_VIT_NAME = "performer_vit_rope_small_patch16_224"


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        name: Short name, for files.
        title: Name for readers.
        mixer: Mixer of the ViT; None for a ResNet-18.
        attn_kwargs: Options of the mixer.
        shrink: Factor by which tiles are shrunk before the network sees them.
        has_own_weights: Whether the mixer has parameters.
        has_rope: Whether queries and keys get rotary positions.
    """

    name: str
    title: str
    mixer: str | None
    attn_kwargs: dict[str, Any]
    shrink: int = 1
    has_own_weights: bool = False
    has_rope: bool = True


_CLUSTERS = {"num_clusters": 64, "window_size": WINDOW_TOKENS, "num_sinks": 16, "max_exact_tokens": 0}
_WINDOWS = {"window_size": WINDOW_TOKENS}
# Projections are learnt for tiles of 1,024 px.
_PROJECTIONS = {"num_projected": 64, "native_side": 128}

VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("downsampled", "4x smaller, softmax", "softmax", {}, shrink=4),
        Variant("performer", "full resolution, Performer", "performer", {"num_features": 64, "kernel": "softmax-hyp+"}),
        Variant("clustered", "full resolution, clustered", "clustered", _CLUSTERS),
        Variant("windows", "full resolution, softmax in windows", "windowed", _WINDOWS),
        Variant("registers", "full resolution, windows and 4 registers", "registers", _WINDOWS),
        Variant("linformer", "full resolution, Linformer", "linformer", _PROJECTIONS, has_own_weights=True),
        Variant("reformer", "full resolution, Reformer", "reformer", {}),
        # Neither compares queries with keys: rotations of them would only be noise.
        Variant("s4", "full resolution, S4", "s4", {}, has_own_weights=True, has_rope=False),
        Variant("h3", "full resolution, H3", "h3", {}, has_own_weights=True, has_rope=False),
        Variant("softmax", "full resolution, softmax", "softmax", {}),
        Variant("resnet18", "full resolution, ResNet-18", None, {}, has_own_weights=True),
    )
}


def build_variant(variant: Variant, classes: Sequence[str], side_px: int) -> Detector:
    """Build a detector with one level of stride 4; of one seed, variants without own weights have the same weights.

    Args:
        variant: Row of the table.
        classes: Names of the classes.
        side_px: Side of the full tiles.
    """
    kwargs = {
        **_VIT,
        "mixer": variant.mixer,
        "attn_kwargs": variant.attn_kwargs,
        "use_rot_pos_emb": variant.has_rope,
    }
    config = DetectionModelConfig(
        backbone="resnet18" if variant.mixer is None else _VIT_NAME,
        backbone_kwargs={} if variant.mixer is None else kwargs,
        strides=[STRIDE],
        channels=CHANNELS,
        head="fcos",
        head_kwargs={"num_convs": 1, "detections_per_tile": 6000, "score_threshold": 0.05},
    )
    spec = DetectionSpec(classes=tuple(classes), normalizer=Normalizer(MEAN, STD), tile_px=side_px // variant.shrink)
    return build_detector(config, spec)
