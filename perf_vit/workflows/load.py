"""Trained and converted models, by the path or the name of whatever holds them, and models that are given."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perf_vit.conversion import load_converted, load_softmax
from perf_vit.conversion.save import CONFIG, is_converted
from perf_vit.conversion.weights import weights_file
from perf_vit.errors import CheckpointError, ConfigError, extra, reason_line

__all__ = ["evaluating", "find_model", "has_task", "load", "task_name"]

_HUB = "hf-hub:"

# Weights of this many dimensions, those of convolutions, have a layout of their own on GPUs.
_CONVOLUTION_NDIM = 4


def load(model: str | Path) -> nn.Module:
    """Load a model, in evaluation mode, on the CPU.

    Args:
        model: Run folder, of which the best model is loaded; checkpoint; folder of a converted model or of one that
            timm saved; or "hf-hub:NAME" for such a folder on the Hugging Face hub.

    Raises:
        CheckpointError: There is no such model, it is damaged, or another version wrote it.
        ConfigError: The hub doesn't give it.
    """
    found = find_model(model)
    if found.is_file():
        with extra("geo", "a checkpoint"):
            from perf_vit.models import load_model
        network: nn.Module = load_model(found)
        return network
    return load_converted(found) if is_converted(found) else load_softmax(found).eval()


def has_task(model: nn.Module) -> bool:
    """Whether a network is that of a task; others may have an attribute `task` of their own."""
    # Where there is a network of a task, its module has been imported, and the packages are there that it needs.
    networks = getattr(sys.modules.get("perf_vit.models.checkpoint"), "NETWORKS", {})
    task = getattr(model, "task", None)
    return isinstance(task, str) and task in networks and isinstance(getattr(model, "spec", None), networks[task].spec)


def task_name(model: nn.Module | str | Path) -> str:
    """The name of the task of a model, or of its checkpoint; any other network is one of segmentation.

    Raises:
        CheckpointError: It can't be read, or holds a backbone without a task.
    """
    if isinstance(model, nn.Module):
        return str(model.task) if has_task(model) else "segmentation"
    if Path(model).is_dir():
        raise CheckpointError(f"{model} holds a backbone, whose features are no map; train a model with it first")
    with extra("geo", "a checkpoint"):
        from perf_vit.models import checkpoint_task
    return checkpoint_task(model)


def find_model(model: str | Path) -> Path:
    """The checkpoint, or the folder with weights, that a path or name stands for; see `load`.

    Raises:
        CheckpointError: There is none.
        ConfigError: The hub doesn't give it.
    """
    if str(model).startswith(_HUB):
        return _download(str(model).removeprefix(_HUB))
    path = Path(model)
    if not path.is_dir():
        return _checked_file(path)
    for folder in (path / "student", path):
        if (folder / CONFIG).is_file():
            return folder
    best = path / "checkpoints" / "best.ckpt"
    if best.is_file():
        return best
    raise CheckpointError(
        f"{path} holds no model: expected checkpoints/best.ckpt of a run, or the {CONFIG} of a saved model"
    )


def _checked_file(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}")
    return path


def _download(name: str) -> Path:
    """The folder of a model on the hub, downloaded unless it is in the cache."""
    folder = _snapshot(name, [CONFIG, "*.safetensors"])
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{name} on the Hugging Face hub holds no {CONFIG}, so it is no model")
    if not weights_file(folder).is_file():
        folder = _snapshot(name, [CONFIG, "pytorch_model.bin"])
    if not weights_file(folder).is_file():
        raise CheckpointError(
            f"{name} on the Hugging Face hub holds neither model.safetensors nor pytorch_model.bin, so there are no "
            "weights to load"
        )
    return folder


def _snapshot(name: str, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))
    # Each way of downloading has errors of its own.
    except Exception as error:
        raise ConfigError(f"can't get {name} from the Hugging Face hub: {reason_line(error)}") from error


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a given model into evaluation mode, and afterwards back into its modes, device and layout of weights.

    A path is left alone.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    # Models load without the packages that predictions need.
    from perf_vit.inference.options import own_device

    modes, device = {each: each.training for each in model.modules()}, own_device(model)
    strides = {name: each.stride() for name, each in model.named_parameters() if each.ndim == _CONVOLUTION_NDIM}
    if any(modes.values()):
        model.eval()
    try:
        yield
    finally:
        for each, was_training in modes.items():
            each.training = was_training
        if device is not None and own_device(model) != device:
            model.to(device)
        for name, parameter in model.named_parameters():
            if name in strides and parameter.stride() != strides[name]:
                parameter.data = torch.empty_strided(
                    parameter.shape, strides[name], dtype=parameter.dtype, device=parameter.device
                ).copy_(parameter.data)
