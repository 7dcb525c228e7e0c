"""Training with weights, gradients and optimizer states shared out among the processes (FSDP2)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from perf_vit.models import backbone_body

__all__ = ["FullyShardedStrategy", "shard_network"]


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for PyTorch's `fully_shard`, over all processes, with checkpoints of one file each."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Let every process have its share; by itself Lightning shares out among machines only."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard_network(model: nn.Module, mesh: Any) -> None:
    """Share out the weights: each of the backbone's blocks is gathered while it is computed, the rest all along.

    Args:
        model: a network with a `features_only` backbone as its attribute `backbone`.
        mesh: of the processes, one-dimensional.
    """
    # Not part of every build of PyTorch.
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    body: Any = backbone_body(model.backbone)  # type: ignore[arg-type]
    for block in getattr(body, "blocks", None) or body.children():
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if hasattr(model, "losses"):
        register_fsdp_forward_method(model, "losses")
