"""Weights from files, and timm models that take them up through timm's own filters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from perf_vit.errors import CheckpointError, parsing

__all__ = ["create_with_weights", "read_weights"]

# Where training scripts put the weights inside of what they save.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# These weights and no others: what timm knows of a model names its hub, and what stands there may come first.
_NO_OTHER_SOURCE = {"source": None, "file": None, "url": None, "hf_hub_id": None, "custom_load": False}
_SIZE_MISMATCH = re.compile(r"size mismatch for ([^:]+): .*?Size\((\[[^]]*\])\).*?Size\((\[[^]]*\])\)")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from `.safetensors`, or from what `torch.save` wrote, of which only tensors are read.

    A state dict may lie under "state_dict" or "model", and its names may begin with "module.".

    Returns:
        Name -> tensor on the CPU; floating-point ones in float32.

    Raises:
        CheckpointError: no such file, one that can't be read, or one that holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no weights file {path}")
    content: Any
    with parsing(path, "weights", CheckpointError):
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    for name in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} must hold a state dict, names and tensors, got {type(content).__name__}")
    if not content:
        raise CheckpointError(f"{path} holds no tensors; get the file again")
    return {
        name.removeprefix("module."): value.float() if value.is_floating_point() else value
        for name, value in content.items()
    }


def create_with_weights(
    name: str,
    weights: Mapping[str, Tensor],
    origin: str | Path,
    overlay: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A timm model with weights as timm takes them: names of the original authors, other sizes, other bands.

    Args:
        name: of the model.
        weights: a state dict.
        origin: the weights' file, for messages.
        overlay: what is so of the weights' `pretrained_cfg`; where its num_classes is not the model's, timm leaves the
            classifier out and doesn't ask for all other names either.
        **kwargs: of `timm.create_model`.

    Raises:
        CheckpointError: weights of another architecture.
    """
    # A copy: filters take names out of the dict that they are given.
    cfg = {**(overlay or {}), **_NO_OTHER_SOURCE, "state_dict": dict(weights)}
    try:
        model: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=cfg, **kwargs)
    except (RuntimeError, KeyError, AttributeError, IndexError) as error:
        # What timm says of arguments comes before it looks at the weights.
        timm.create_model(name, pretrained=False, **kwargs)
        raise CheckpointError(f"{origin} doesn't fit {name}: {_misfit(error)}; name the model it is of") from error
    # Or the weights would stay in memory, and be written into every config.
    (model if hasattr(model, "pretrained_cfg") else model.model).pretrained_cfg.pop("state_dict", None)
    made: nn.Module = model
    return made


def _misfit(error: Exception) -> str:
    """What `load_state_dict` found, in one line: the first names of each kind, and how many more."""
    text = str(error)
    parts = []
    for kind in ("Missing", "Unexpected"):
        found = re.search(rf"{kind} key\(s\) in state_dict: (.*)", text)
        if found:
            names = re.findall(r'"([^"]+)"', found[1])
            parts.append(f"{kind.lower()} {_first(names)}")
    sizes = [f"{name} (expected {there}, got {came})" for name, came, there in _SIZE_MISMATCH.findall(text)]
    if sizes:
        parts.append(f"mis-shaped {_first(sizes)}")
    return "; ".join(parts) or f"{type(error).__name__} {text.splitlines()[0] if text else ''}".strip()


def _first(names: list[str], count: int = 2) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
