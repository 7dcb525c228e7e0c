"""Norms of decoders whose own are batch norms."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn

__all__ = ["Norm", "apply_norm", "with_group_norm"]

Norm = Literal["batch", "group"]


def apply_norm(module: nn.Module, norm: Norm) -> None:
    """Leave a module its batch norms, or put group norms in their places.

    Raises:
        ValueError: neither batch nor group.
    """
    if norm not in ("batch", "group"):
        raise ValueError(f"norm must be batch or group, got {norm}")
    if norm == "group":
        with_group_norm(module)


def with_group_norm(module: nn.Module) -> None:
    """Put group norms of up to 8 groups in the places of batch norms."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            # Two channels a group at least: of one, a map of one cell has no spread.
            setattr(module, name, nn.GroupNorm(math.gcd(8, child.num_features // 2), child.num_features))
        else:
            with_group_norm(child)
