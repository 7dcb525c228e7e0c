"""Weights of a small encoder: a frozen one must not be random."""

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

import perf_vit  # noqa: F401  (registers the backbones)

SMALL = {"depth": 1, "embed_dim": 64, "num_heads": 2, "attn_kwargs": {"num_features": 16}}


def save_encoder(path: Path, backbone: str = "performer_vit_tiny_patch16_224", **kwargs) -> Path:
    """Write seeded weights for `model.weights`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(backbone, num_classes=0, **{**SMALL, "img_size": 32, **kwargs})
    save_file(model.state_dict(), path)
    return path
