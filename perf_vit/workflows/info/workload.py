"""Windows and time that a model would take for a source."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import timm
import torch
from torch import nn

from perf_vit.conversion.linearize import convertible_layers, max_exact_side
from perf_vit.conversion.native_size import native_size_of
from perf_vit.conversion.weights import is_model
from perf_vit.errors import ConfigError, OptionError
from perf_vit.models import InputCheck, load_segmenter
from perf_vit.tiling import grid_windows
from perf_vit.types import Source
from perf_vit.workflows.load import find_model

__all__ = ["Workload", "estimate_workload"]

_DEFAULT_WINDOW_PX = 1024


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Work that a model would have with a source.

    Attributes:
        model: Name of the model.
        patch_px: Side of a patch in pixels of the source, which a checkpoint reads with its bands and pixel size.
        num_tokens: Number of patches of the whole source.
        window_size: Side of a window in pixels.
        overlap: Pixels that neighbouring windows share.
        num_windows: Number of windows.
        seconds_per_window: Seconds of one forward pass, measured on noise.
        seconds: Seconds of all windows.
        device: Device of the measurement.
        max_exact_px: Size in pixels of the largest square window with exact attention, None unless attention is linear.
        num_softmax_layers: Number of attention layers that a conversion left as they were, 0 for other models.
        native_px: Side in pixels of the windows that most layers see, None for a model converted without `native_size`.
    """

    model: str
    patch_px: int
    num_tokens: int
    window_size: int
    overlap: int
    num_windows: int
    seconds_per_window: float
    seconds: float
    device: str
    max_exact_px: int | None
    num_softmax_layers: int
    native_px: int | None


def estimate_workload(source: Source, model: str, window_size: int | None = None) -> Workload:
    """Time one window of a model and multiply.

    Args:
        source: Raster or slide to predict.
        model: Run folder or .ckpt file of `perf-vit train`, or a timm name, whose backbone alone is timed.
        window_size: Side of a window in pixels; by default the checkpoint's tile, or 1,024.

    Raises:
        ConfigError: The model doesn't fit the source.
        InputError: The source lacks bands or the pixel size that the checkpoint reads.
        OptionError: There is no such model.
        CheckpointError: The file is not a checkpoint.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not (model.endswith(".ckpt") or Path(model).is_dir()):
        return _workload(source, model, _backbone(model, source.num_bands, window_size, device), device)
    network = load_segmenter(find_model(model)).to(device)
    patch_px = network.size_multiple
    timed = network, network, patch_px, _whole_patches(window_size or network.spec.tile_px, patch_px)
    # As prediction reads it: the bands and the pixel size of the training.
    seen = network.spec.open(source, check=InputCheck(None))
    try:
        return _workload(seen, model, timed, device)
    finally:
        if seen is not source:
            seen.close()


_Timed: TypeAlias = tuple[nn.Module, Callable[[torch.Tensor], Any], int, int]


def _workload(source: Source, model: str, timed: _Timed, device: str) -> Workload:
    network, forward, patch_px, size = timed
    side = max_exact_side(network)
    overlap = size // 4
    num_windows = len(grid_windows(source.extent, size, overlap))
    seconds = _time_forward(forward, torch.randn(1, source.num_bands, size, size, device=device))
    return Workload(
        model=model,
        patch_px=patch_px,
        num_tokens=-(-source.height // patch_px) * -(-source.width // patch_px),
        window_size=size,
        overlap=overlap,
        num_windows=num_windows,
        seconds_per_window=seconds,
        seconds=seconds * num_windows,
        device=device,
        max_exact_px=None if side is None else side * patch_px,
        num_softmax_layers=0 if side is None else len(convertible_layers(network)),
        native_px=next((size * patch_px for size in map(native_size_of, network.modules()) if size is not None), None),
    )


def _backbone(name: str, num_bands: int, window_size: int | None, device: str) -> _Timed:
    if not is_model(name):
        raise OptionError(f"model must be a .ckpt file or a model of timm, got {name}; see timm.list_models()")
    wanted = window_size or _DEFAULT_WINDOW_PX
    try:
        patch_px = timm.create_model(name, num_classes=0).patch_embed.patch_size[0]
        size = _whole_patches(wanted, patch_px)
        model = timm.create_model(name, in_chans=num_bands, img_size=size, num_classes=0)
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{name} has no patches of a fixed size to count; choose a ViT") from error
    return model, model.eval().to(device).forward_features, patch_px, size


def _whole_patches(window_size: int, patch_px: int) -> int:
    return max(1, window_size // patch_px) * patch_px


def _time_forward(forward: Callable[[torch.Tensor], Any], tile: torch.Tensor) -> float:
    """Seconds of the second of two passes: the first allocates."""
    seconds = 0.0
    with torch.inference_mode():
        for _ in range(2):
            started = time.perf_counter()
            forward(tile)
            if tile.is_cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
    return seconds
