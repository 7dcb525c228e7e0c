"""Devices and processes: the precision that a device is fast in, and sums over the processes of a training run."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "end_processes",
    "fast_dtype",
    "has_processes",
    "mean_normalizer",
    "rank_and_world_size",
    "sample_rank_and_world_size",
    "share_samples",
    "started_rank_and_world_size",
    "sum_over_processes",
    "training_precision",
]


def fast_dtype(device: str | torch.device) -> torch.dtype:
    """Return the dtype of the fastest safe autocast of a device: bfloat16 if it has instructions for it, else float32.

    These are GPUs that multiply matrices of bfloat16, and CPUs with AVX-512 BF16, which all CPUs with AMX have. Other
    CPUs emulate bfloat16, slower than float32. float16, whose range needs scaled losses, is never chosen.

    Args:
        device: Device; one that is not there has no such instructions.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        # Of the current GPU: machines with GPUs of several generations are rare.
        is_fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # The oldest supported version of PyTorch has no public function for this.
        has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        is_fast = kind == "cpu" and has_bfloat16()
    return torch.bfloat16 if is_fast else torch.float32


def training_precision(precision: str, accelerator: str) -> str:
    """Resolve the precision of a training run.

    Args:
        precision: Precision as Lightning names it, or "auto".
        accelerator: Lightning accelerator that the run uses.

    Returns:
        The precision as Lightning names it: for "auto", bf16-mixed or 32-true.
    """
    if precision != "auto":
        return precision
    device = {"gpu": "cuda", "auto": "cpu"}.get(accelerator, accelerator)
    if accelerator == "auto" and torch.cuda.is_available():
        device = "cuda"
    elif accelerator == "auto" and torch.backends.mps.is_available():
        device = "mps"
    is_known = device in ("cpu", "cuda")
    return "bf16-mixed" if is_known and fast_dtype(device) == torch.bfloat16 else "32-true"


def rank_and_world_size(group: Any = None) -> tuple[int, int]:
    """Return the rank of this process and the number of processes, (0, 1) without distributed training.

    Args:
        group: Process group that holds this process; None for all processes.
    """
    return (dist.get_rank(group), dist.get_world_size(group)) if has_processes() else (0, 1)


_per_sample = 1


def started_rank_and_world_size() -> tuple[int, int]:
    """Return the rank and number of processes, also of those that torchrun started and that form no group yet."""
    if not has_processes() and dist.is_available() and dist.is_torchelastic_launched():
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return rank_and_world_size()


def share_samples(number: int) -> None:
    """Let each `number` consecutive processes work on the same samples, until the group ends; 1 for none."""
    global _per_sample
    _per_sample = number


def sample_rank_and_world_size() -> tuple[int, int]:
    """Return the rank and number as `rank_and_world_size`, with processes that share samples counted as one."""
    rank, world_size = rank_and_world_size()
    return rank // _per_sample, max(1, world_size // _per_sample)


def has_processes() -> bool:
    """Return whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def end_processes() -> None:
    """Leave the process group, so that each process can go on alone.

    In a group, metrics wait for all processes.
    """
    share_samples(1)
    if has_processes():
        dist.destroy_process_group()


def mean_normalizer(total: Tensor, least: float = 1, group: Any = None) -> Tensor:
    """Return the divisor of a sum of losses such that the mean over processes is the mean over all samples.

    A collective operation: all processes must call it.

    Args:
        total: Weight of this process's samples, such as a number of pixels; detached.
        least: Lower bound of the total over all processes.
        group: Process group; None for all processes.

    Returns:
        The total over all processes, at least `least`, divided by the number of processes.
    """
    world_size = rank_and_world_size(group)[1]
    if world_size == 1:
        return total.clamp(min=least)
    everywhere = total.detach().clone()
    dist.all_reduce(everywhere, group=group)
    return everywhere.clamp(min=least) / world_size


def sum_over_processes(values: Tensor, group: Any = None) -> Tensor:
    """Sum a tensor over processes, with gradients from all of them.

    A collective operation: all processes must call it, with tensors of one shape.

    Args:
        values: Tensor.
        group: Process group; None for all processes.
    """
    if rank_and_world_size(group)[1] == 1:
        return values
    summed: Tensor = _SumOverProcesses.apply(values, group)
    return summed


class _SumOverProcesses(torch.autograd.Function):
    """Differentiable all-reduce; torch's own in `torch.distributed.nn` is deprecated."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _summed(values, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group), None


def _summed(values: Tensor, group: Any) -> Tensor:
    total = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
