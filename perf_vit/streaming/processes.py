"""Processes that share an image: stripes of rows, and sums over all of them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from perf_vit.distributed import rank_and_world_size
from perf_vit.errors import InputError, OptionError

__all__ = ["Processes"]


class Processes:
    """Process group of this process, or this process alone.

    Args:
        group: Process group; None for all processes.

    Attributes:
        rank: Index of this process.
        number: Number of processes.
        num_bytes: Bytes of the tensors that this process gave to `reduce`, those of gradients included.
    """

    def __init__(self, group: Any = None) -> None:
        self.rank, self.number = rank_and_world_size() if group is None else rank_and_world_size(group)
        self.num_bytes, self._group = 0, group

    def stripe(self, rows: int, at_once: int) -> tuple[int, int]:
        """Return the first row of this process's stripe, and the first below it.

        Args:
            rows: Rows of tokens of the image.
            at_once: Number of rows that belong together.

        Raises:
            OptionError: There are more processes than such groups of rows.
        """
        groups = -(-rows // at_once)
        if self.number > groups:
            raise OptionError(
                f"processes must be at most {groups} for an image of {rows} rows of tokens, of which {at_once} belong "
                f"together, got {self.number}; start fewer"
            )
        first, stop = (min(rows, groups * index // self.number * at_once) for index in (self.rank, self.rank + 1))
        return first, stop

    def check_same(self, identity: str) -> None:
        """Check that all processes, which all must call this, have one image.

        Args:
            identity: Description of the image; the same in all processes.

        Raises:
            OptionError: They don't.
        """
        # A number of 31 bits, which the negative of a maximum compares with the minimum.
        number = torch.tensor([zlib.crc32(identity.encode()) >> 1], dtype=torch.int64)
        if int(self.reduce(number, "max")) != -int(self.reduce(-number, "max")):
            raise OptionError(
                f"processes of a group share one image, but they were given different ones, here {identity}; "
                "end the group with torch.distributed.destroy_process_group() to process one image in each"
            )

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Raise in all processes where a block of code fails in one; they would wait for it forever.

        Raises:
            InputError: Another process failed.
        """
        try:
            yield
        except Exception:
            self.reduce(torch.ones(1), "max")
            raise
        if float(self.reduce(torch.zeros(1), "max")) > 0:
            raise InputError("another process that shares the image failed, its message says why; start all again")

    def reduce(self, values: Tensor, operation: Literal["sum", "max"]) -> Tensor:
        """Return the element-wise sum or maximum of a tensor over all processes, which all must call.

        The gradient of a sum is the sum of the gradients of all processes, which all must compute; a maximum has none.
        """
        if self.number == 1:
            return values
        if operation == "sum" and torch.is_grad_enabled() and values.requires_grad:
            summed: Tensor = _CountedSum.apply(values, self)
            return summed
        reduced = values.detach().clone(memory_format=torch.contiguous_format)
        self.num_bytes += reduced.numel() * reduced.element_size()
        self._all_reduce(reduced, operation)
        return reduced

    def _all_reduce(self, values: Tensor, operation: Literal["sum", "max"]) -> None:
        dist.all_reduce(values, dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX, self._group)


class _CountedSum(torch.autograd.Function):
    """Sum over processes whose gradient is such a sum, too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return processes.reduce(values.detach(), "sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.processes.reduce(gradients[0], "sum"), None
