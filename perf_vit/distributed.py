"""Sums over the processes that train together; with one process, nothing changes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["mean_normalizer", "process_place", "sum_over_processes"]


def process_place() -> tuple[int, int]:
    """(number of this process, how many there are)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def mean_normalizer(total: Tensor, least: float = 1) -> Tensor:
    """What to divide a sum of losses by, so that the mean over processes is that of one process on all their samples.

    To be called by all processes alike.

    Args:
        total: of this process, such as a number of pixels; no gradient goes through it.
        least: that the total of all processes counts at least.

    Returns:
        The total of all processes, at least `least`, divided by how many they are.
    """
    world_size = process_place()[1]
    if world_size == 1:
        return total.clamp(min=least)
    everywhere = total.detach().clone()
    dist.all_reduce(everywhere)
    return everywhere.clamp(min=least) / world_size


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum of a tensor over processes, through which gradients of all of them go back to each.

    To be called by all processes alike, on tensors of one shape.
    """
    if process_place()[1] == 1:
        return values
    summed: Tensor = _SumOverProcesses.apply(values)
    return summed


class _SumOverProcesses(torch.autograd.Function):
    """Torch's own, in `torch.distributed.nn`, is deprecated."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _summed(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _summed(gradients[0])


def _summed(values: Tensor) -> Tensor:
    total = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total
