"""Small ViTs and images in memory, for passes over parts of an image."""

import numpy as np
import timm
import torch
from torch import Tensor, nn

from perf_vit.streaming import ImageTokens, StreamedTokens, stream_tokens
from perf_vit.types import GeoImage, Window

SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5, "dynamic_img_size": True}


class Image:
    """Image in memory, of which windows are read."""

    path = "image"

    def __init__(self, height: int, width: int, valid: np.ndarray | None = None) -> None:
        self.height, self.width = height, width
        self.pixels = np.random.default_rng(0).normal(size=(3, height, width))
        self.valid = np.ones((height, width), bool) if valid is None else valid

    def read(self, window: Window) -> GeoImage:
        rows, columns = min(window.row_stop, self.height), min(window.col_stop, self.width)
        pixels, valid = np.zeros((3, *window.shape)), np.zeros(window.shape, bool)
        part = np.s_[: rows - window.row, : columns - window.col]
        valid[part] = self.valid[window.row : rows, window.col : columns]
        pixels[:, *part] = self.pixels[:, window.row : rows, window.col : columns] * valid[part]
        return GeoImage(pixels, valid)

    def whole(self, patch: int) -> tuple[Tensor, Tensor]:
        """Pixels [1, 3, H, W] padded to whole patches, and the mask of tokens with a valid pixel, bool [rows, cols]."""
        rows, columns = -(-self.height // patch), -(-self.width // patch)
        image = self.read(Window(0, 0, rows * patch, columns * patch))
        tokens = image.valid.reshape(rows, patch, columns, patch).any((1, 3))
        return torch.from_numpy(image.pixels)[None], torch.from_numpy(tokens)


def build(name: str, **options) -> nn.Module:
    """A small model of random weights in float64, by its name in timm."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **options}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


MODELS = {
    "performer": ("performer_vit_tiny_patch16_224", {}),
    "performer without a class token": ("performer_vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "performer with registers": ("performer_vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),
    "clustered": ("clustered_vit_tiny_patch8_224", {"attn_kwargs": {"max_exact_tokens": 0, "num_clusters": 9}}),
    "clustered, exact": ("clustered_vit_tiny_patch8_224", {}),
    "clustered without windows": (
        "clustered_vit_tiny_patch8_224",
        {"attn_kwargs": {"max_exact_tokens": 0, "num_clusters": 9, "window_size": 0, "num_sinks": 0}},
    ),
    "clustered without sinks": (
        "clustered_vit_tiny_patch8_224",
        {"attn_kwargs": {"max_exact_tokens": 0, "num_clusters": 9, "window_size": 5, "num_sinks": 0}},
    ),
    "performer, centred": ("performer_vit_tiny_patch16_224", {"attn_kwargs": {"center": True, "balance": True}}),
    "rope": ("performer_vit_rope_small_patch16_224", {}),
    "clustered rope": (
        "clustered_vit_rope_small_patch16_224",
        {"attn_kwargs": {"max_exact_tokens": 0, "num_clusters": 7, "window_size": 4, "num_sinks": 0}},
    ),
}


def build_for(name: str, height: int, width: int) -> tuple[nn.Module, int]:
    """A model of `MODELS` and the side of its patches, with positions of the grid: timm resamples others in float32."""
    model_name, options = MODELS[name]
    patch = 8 if "patch8" in model_name else 16
    return build(model_name, img_size=(-(-height // patch) * patch, -(-width // patch) * patch), **options), patch


def holes(height: int, width: int) -> np.ndarray:
    """Valid pixels: a corner, a hole and a line are missing."""
    valid = np.ones((height, width), bool)
    valid[:70, :200], valid[150:, 100:130], valid[100:110] = False, False, False
    return valid


def streamed(model: nn.Module, image: Image, **options) -> tuple[StreamedTokens, list[StreamedTokens]]:
    return stream_tokens(model, ImageTokens(model, image, lambda found: found.pixels), **options)
