"""Sums and means over the processes of distributed training; no-ops with one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["mean_normalizer", "rank_and_world_size", "sum_over_processes"]


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, (0, 1) without distributed training."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def mean_normalizer(total: Tensor, least: float = 1) -> Tensor:
    """Return the divisor of a sum of losses such that the mean over processes is the mean over all samples.

    A collective operation: all processes must call it.

    Args:
        total: Weight of this process's samples, such as a number of pixels; detached.
        least: Lower bound of the total over all processes.

    Returns:
        The total over all processes, at least `least`, divided by the number of processes.
    """
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return total.clamp(min=least)
    everywhere = total.detach().clone()
    dist.all_reduce(everywhere)
    return everywhere.clamp(min=least) / world_size


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum a tensor over processes, with gradients from all of them.

    A collective operation: all processes must call it, with tensors of one shape.
    """
    if rank_and_world_size()[1] == 1:
        return values
    summed: Tensor = _SumOverProcesses.apply(values)
    return summed


class _SumOverProcesses(torch.autograd.Function):
    """Differentiable all-reduce; torch's own in `torch.distributed.nn` is deprecated."""

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
