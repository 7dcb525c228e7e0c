"""Training with weights, gradients and optimizer states shared out among the processes (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

__all__ = ["FullyShardedStrategy", "shard_network"]


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for PyTorch's `fully_shard`, over all processes, with checkpoints of one file each."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Let every process have its share; by itself Lightning shares out among machines only."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard_network(model: nn.Module, body: nn.Module, mesh: Any) -> None:
    """Share out the weights: each of the body's blocks is gathered while it is computed, the rest all along.

    Args:
        model: a network.
        body: the part of it with the blocks.
        mesh: of the processes, one-dimensional.
    """
    # Not part of every build of PyTorch.
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # Weights of any other order can't be shared out.
    model.to(memory_format=torch.contiguous_format)
    for block in _blocks(body):
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if hasattr(model, "losses"):
        register_fsdp_forward_method(model, "losses")


def _blocks(body: nn.Module) -> Iterator[nn.Module]:
    """Blocks, or what else is called one after the other; a list of modules is never called itself."""
    for block in getattr(body, "blocks", None) or body.children():
        yield from block if isinstance(block, nn.ModuleList) else (block,)
