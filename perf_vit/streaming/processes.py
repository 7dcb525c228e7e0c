"""Processes that share an image: stripes of rows, and sums over all of them."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from perf_vit.distributed import rank_and_world_size
from perf_vit.errors import OptionError

__all__ = ["Processes"]


class Processes:
    """Process group of this process, or this process alone.

    Attributes:
        rank: Index of this process.
        number: Number of processes.
        num_bytes: Bytes of the tensors that this process gave to `reduce`.
    """

    def __init__(self) -> None:
        self.rank, self.number = rank_and_world_size()
        self.num_bytes = 0

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

    def reduce(self, values: Tensor, operation: Literal["sum", "max"]) -> Tensor:
        """Return the element-wise sum or maximum of a tensor over all processes, which all must call."""
        if self.number == 1:
            return values
        reduced = values.detach().clone(memory_format=torch.contiguous_format)
        self.num_bytes += reduced.numel() * reduced.element_size()
        dist.all_reduce(reduced, dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX)
        return reduced
