"""Reading a trained network back, with everything that prediction needs, from the one file that training wrote."""

from __future__ import annotations

import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from perf_vit._version import __version__
from perf_vit.errors import CheckpointError
from perf_vit.layers import current_draw, redraw_projections
from perf_vit.models.build import ModelConfig, build_segmenter
from perf_vit.models.segmenter import Segmenter, SegmenterSpec

__all__ = ["CHECKPOINT_KEY", "checkpoint_metadata", "load_segmenter", "restore_draw"]

CHECKPOINT_KEY = "perf_vit"
"""Where our metadata lies inside a Lightning checkpoint."""

STATE_PREFIX = "model."
"""The network's attribute name inside the Lightning module."""


def checkpoint_metadata(config: ModelConfig, model: Segmenter) -> dict[str, Any]:
    """What `load_segmenter` needs beside the weights, as plain values."""
    return {
        "version": __version__,
        "model": asdict(config),
        "spec": model.spec.to_dict(),
        "draw": current_draw(model),
        # A converted backbone's folder may be gone when the checkpoint is used.
        "saved_backbone": model.saved_backbone,
    }


def restore_draw(model: Segmenter, metadata: dict[str, Any]) -> None:
    """Give the model the random projections that a checkpoint's weights were trained with."""
    # Checkpoints without a number are older than redrawing.
    redraw_projections(model, metadata.get("draw", 0))


def load_segmenter(path: str | Path) -> Segmenter:
    """Load a network that `perf-vit train` wrote, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: the file is missing, is not a checkpoint, or wasn't written by perf_vit.
    """
    content = _read(Path(path))
    if not isinstance(content, dict) or CHECKPOINT_KEY not in content:
        raise CheckpointError(f"{path} is not a perf_vit checkpoint; give a .ckpt file that `perf-vit train` wrote")
    metadata = content[CHECKPOINT_KEY]
    try:
        config = ModelConfig(**{**metadata["model"], "pretrained": False})
        model = build_segmenter(config, SegmenterSpec.from_dict(metadata["spec"]), metadata.get("saved_backbone"))
        state = content["state_dict"]
        model.load_state_dict(
            {key.removeprefix(STATE_PREFIX): value for key, value in state.items() if key.startswith(STATE_PREFIX)}
        )
    except (KeyError, TypeError, RuntimeError) as error:
        version = metadata.get("version", "of unknown number")
        raise CheckpointError(
            f"{path} was written by perf_vit {version}, whose networks differ from those of {__version__}; use that "
            "version, or train anew"
        ) from error
    restore_draw(model, metadata)
    return model.eval()


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} can't be read as a checkpoint: {str(error).splitlines()[0]}") from error
