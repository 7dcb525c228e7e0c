"""Trained and converted models, by the path or the name of whatever holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from perf_vit.conversion import load_converted, load_softmax
from perf_vit.conversion.save import CONFIG, is_converted
from perf_vit.errors import CheckpointError, ConfigError, extra, reason_line

__all__ = ["find_model", "load", "task_name"]

_HUB = "hf-hub:"


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


def task_name(model: nn.Module | str | Path) -> str:
    """The name of the task of a model, or of its checkpoint; a model that doesn't say is one of segmentation.

    Raises:
        CheckpointError: It can't be read, or holds a backbone without a task.
    """
    if isinstance(model, nn.Module):
        return str(getattr(model, "task", "segmentation"))
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
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    wanted: Any = [CONFIG, "*.safetensors"]
    try:
        folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))
    # Each way of downloading has errors of its own.
    except Exception as error:
        raise ConfigError(f"can't get {name} from the Hugging Face hub: {reason_line(error)}") from error
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{name} on the Hugging Face hub holds no {CONFIG}, so it is no model")
    return folder
