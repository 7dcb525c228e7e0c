"""Where a model runs."""

from __future__ import annotations

import torch
from torch import nn

from perf_vit.errors import OptionError, reason_line

__all__ = ["move_to_device", "resolve_device"]


def resolve_device(device: str) -> str:
    """A GPU if there is one instead of "auto"; others as they are."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def move_to_device(model: nn.Module, device: str) -> str:
    """Move a model to a device; return the device's name.

    Args:
        model: Model to move.
        device: Name, or "auto" for a GPU if there is one.

    Raises:
        OptionError: There is no such device.
    """
    device = resolve_device(device)
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device {device}: {reason_line(error)}") from error
    return device
