"""What the measurements of converted models share: the pretrained model, its pixels, the conversions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
import typer
from safetensors.torch import load_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

import perf_vit

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
# Name -> options of `linearize`. Where nothing else is said, clusters are 128 (160 above 32,768 tokens) beside windows
# of 16 and, up to 2,560 tokens, 256 sinks; plain FAVOR+ has 256 features.
CONVERSIONS: dict[str, dict[str, Any]] = {
    "plain FAVOR+": {"mixer": "performer"},
    "clusters": {},
    "clusters, windows 12": {"window_size": 12},
    "clusters, windows 24": {"window_size": 24},
    "clusters, no windows": {"window_size": 0},
    "clusters, 64 sinks": {"num_sinks": 64},
    "96 clusters": {"num_clusters": 96},
    "160 clusters": {"num_clusters": 160},
    "256 clusters": {"num_clusters": 256},
}


def check_names(names: Sequence[str]) -> None:
    """Refuse what is neither a conversion nor a folder that holds one."""
    for name in names:
        if name not in CONVERSIONS and not Path(name).is_dir():
            raise typer.BadParameter(
                f"--only must be a folder of a converted model, or one of {', '.join(CONVERSIONS)}, got {name}"
            )


def converted(model: nn.Module, name: str, seed: int) -> nn.Module:
    """The model by one of `CONVERSIONS`, or the one in a folder, for images of the model's size."""
    if name in CONVERSIONS:
        is_drawn = CONVERSIONS[name].get("mixer") == "performer"
        # Small images would be attended to exactly.
        fixed = {"seed": seed} if is_drawn else {"max_exact_tokens": 0}
        return perf_vit.linearize(model, **fixed, **CONVERSIONS[name])
    return perf_vit.conversion.load_converted(name, img_size=model.patch_embed.img_size).eval()


def load_vit(model_name: str, weights: Path, size: int, *, any_size: bool = False) -> nn.Module:
    """timm's model, in evaluation mode, with positions of size x size pixels; the weights are its state dict."""
    options = {"dynamic_img_size": True} if any_size else {}
    model = timm.create_model(model_name, pretrained=False, num_classes=0, img_size=size, **options).eval()
    state = {name: tensor.float() for name, tensor in load_file(weights).items()}
    model.load_state_dict(checkpoint_filter_fn(state, model), strict=True)
    return model


def normalize(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """Pixels as the model takes them, [3, H, W], from 8 bits."""
    return (torch.from_numpy(pixels).float() / 255 - MEAN[:, None, None]) / STD[:, None, None]
