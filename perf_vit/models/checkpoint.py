"""Reading a trained network back, with everything that prediction needs, from the one file that training wrote."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perf_vit._version import __version__
from perf_vit.errors import CheckpointError
from perf_vit.layers import current_draw, redraw_projections
from perf_vit.models.build import ModelConfig, build_segmenter
from perf_vit.models.build_detector import DetectorConfig, build_detector
from perf_vit.models.detector import Detector, DetectorSpec
from perf_vit.models.segmenter import Segmenter, SegmenterSpec

__all__ = [
    "CHECKPOINT_KEY",
    "checkpoint_metadata",
    "checkpoint_task",
    "load_detector",
    "load_segmenter",
    "restore_draw",
]

_SEGMENTATION, _DETECTION = "segmentation", "detection"
_MODELS = {_SEGMENTATION: "a segmentation model", _DETECTION: "an object detector"}

CHECKPOINT_KEY = "perf_vit"
"""Where our metadata lies inside a Lightning checkpoint."""

STATE_PREFIX = "model."
"""The network's attribute name inside the Lightning module."""


def checkpoint_metadata(config: ModelConfig | DetectorConfig, model: Segmenter | Detector) -> dict[str, Any]:
    """What `load_segmenter` or `load_detector` needs beside the weights, as plain values."""
    return {
        "version": __version__,
        "task": _DETECTION if isinstance(model, Detector) else _SEGMENTATION,
        "model": asdict(config),
        "spec": model.spec.to_dict(),
        "draw": current_draw(model),
        # A converted backbone's folder may be gone when the checkpoint is used.
        "saved_backbone": model.saved_backbone,
    }


def restore_draw(model: nn.Module, metadata: dict[str, Any]) -> None:
    """Give the model the random projections that a checkpoint's weights were trained with."""
    # Checkpoints without a number are older than redrawing.
    redraw_projections(model, metadata.get("draw", 0))


def checkpoint_task(path: str | Path) -> str:
    """What a checkpoint's network does: "segmentation" or "detection".

    Raises:
        CheckpointError: the file is missing, is not a checkpoint, or wasn't written by perf_vit.
    """
    return _task_of(_read(Path(path))[CHECKPOINT_KEY])


def load_segmenter(path: str | Path) -> Segmenter:
    """Load a segmentation network that `perf-vit train` wrote, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: the file is missing, is not a checkpoint, holds another task's network, or wasn't written by
            perf_vit.
    """
    content = _read(Path(path), _SEGMENTATION)
    metadata = content[CHECKPOINT_KEY]
    with _other_versions(path, metadata):
        config = ModelConfig(**{**metadata["model"], "pretrained": False})
        model = build_segmenter(config, SegmenterSpec.from_dict(metadata["spec"]), metadata.get("saved_backbone"))
        _restore(model, content)
    return model.eval()


def load_detector(path: str | Path) -> Detector:
    """Load an object detector that `perf-vit train` wrote, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: the file is missing, is not a checkpoint, holds another task's network, wasn't written by
            perf_vit, or was written by a version whose networks differ.
    """
    content = _read(Path(path), _DETECTION)
    metadata = content[CHECKPOINT_KEY]
    with _other_versions(path, metadata):
        config = DetectorConfig(**{**metadata["model"], "pretrained": False})
        model = build_detector(config, DetectorSpec.from_dict(metadata["spec"]), metadata.get("saved_backbone"))
        _restore(model, content)
    return model.eval()


@contextmanager
def _other_versions(path: str | Path, metadata: dict[str, Any]) -> Iterator[None]:
    """Say which version wrote a checkpoint that doesn't fit the networks of this one."""
    try:
        yield
    except (KeyError, TypeError, RuntimeError) as error:
        version = metadata.get("version", "of unknown number")
        raise CheckpointError(
            f"{path} was written by perf_vit {version}, whose networks differ from those of {__version__}; use that "
            "version, or train anew"
        ) from error


def _restore(model: nn.Module, content: dict[str, Any]) -> None:
    state = content["state_dict"]
    model.load_state_dict(
        {key.removeprefix(STATE_PREFIX): value for key, value in state.items() if key.startswith(STATE_PREFIX)}
    )
    restore_draw(model, content[CHECKPOINT_KEY])


def _task_of(metadata: dict[str, Any]) -> str:
    # Checkpoints without a task are older than detectors.
    return str(metadata.get("task", _SEGMENTATION))


def _read(path: Path, task: str | None = None) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} can't be read as a checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or CHECKPOINT_KEY not in content:
        raise CheckpointError(f"{path} is not a perf_vit checkpoint; give a .ckpt file that `perf-vit train` wrote")
    found = _task_of(content[CHECKPOINT_KEY])
    if task is not None and found != task:
        raise CheckpointError(f"expected {_MODELS[task]} in {path}, got {_MODELS.get(found, found)}")
    return content
