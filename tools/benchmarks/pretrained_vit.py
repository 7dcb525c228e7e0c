"""What the measurements of converted models share: the pretrained model, its pixels, the conversions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
# Name -> options of `performerize`; M = 128 where not said, 256 for plain FAVOR+.
CONVERSIONS: dict[str, dict[str, Any]] = {
    "plain FAVOR+": {"attention": "performer"},
    "no windows, 512 sinks": {"window_size": 0},
    "windows 12, no sinks": {"num_sinks": 0},
    "windows 12, 128 sinks": {"num_sinks": 128},
    "windows 12, 256 sinks": {"num_sinks": 256},
    "windows 12, 512 sinks": {},
    "windows 12, 512 sinks, not centred or balanced": {"center": False, "balance": False},
    "windows 12, 512 sinks, M 64": {"num_features": 64},
    "windows 12, 512 sinks, M 256": {"num_features": 256},
    "windows 16, 512 sinks": {"window_size": 16},
    "windows 12, 1024 sinks": {"num_sinks": 1024},
}


def load_vit(model_name: str, weights: Path, size: int) -> nn.Module:
    """timm's model, in evaluation mode, for images of size x size pixels; the weights are its state dict."""
    model = timm.create_model(model_name, pretrained=False, num_classes=0, img_size=size).eval()
    state = {name: tensor.float() for name, tensor in load_file(weights).items()}
    model.load_state_dict(checkpoint_filter_fn(state, model), strict=True)
    return model


def normalize(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """Pixels as the model takes them, [3, H, W], from 8 bits."""
    return (torch.from_numpy(pixels).float() / 255 - MEAN[:, None, None]) / STD[:, None, None]
