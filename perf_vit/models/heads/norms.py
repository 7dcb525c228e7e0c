"""Batch and group norms of segmentation heads."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["GroupNorm", "Norm", "apply_norm", "with_group_norm"]

Norm = Literal["batch", "group"]


class GroupNorm(nn.GroupNorm):
    """Group norm whose float32 statistics have all their digits in any layout of the map.

    PyTorch adds up channels-last maps one value at a time on CPUs: on a map of 2,048 px its result is off by 0.3 %.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a map, [B, C, h, w]."""
        if x.device.type != "cpu" or x.is_contiguous():
            return super().forward(x)
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


def apply_norm(module: nn.Module, norm: Norm) -> None:
    """Keep a module's batch norms, or replace them by group norms.

    Raises:
        ValueError: `norm` is neither "batch" nor "group".
    """
    if norm not in ("batch", "group"):
        raise ValueError(f"norm must be batch or group, got {norm}")
    if norm == "group":
        with_group_norm(module)


def with_group_norm(module: nn.Module) -> None:
    """Replace batch norms by group norms of up to 8 groups."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            # At least two channels per group: a group of one channel has zero variance on a map of one cell.
            setattr(module, name, GroupNorm(math.gcd(8, child.num_features // 2), child.num_features))
        else:
            with_group_norm(child)
