"""Training on tiles that several processes share, each of which computes a stripe of rows."""

from __future__ import annotations

from typing import Any

import lightning
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from perf_vit.distributed import share_samples
from perf_vit.errors import ConfigError
from perf_vit.streaming.processes import Processes
from perf_vit.streaming.stripes import StripedSegmenter, check_striped
from perf_vit.tasks.segmentation import SegmentationTask

__all__ = ["SequenceParallel", "check_sequence_parallel"]


class SequenceParallel(lightning.Callback):
    """Lets groups of consecutive processes share each tile, with the gradients of one process.

    Each process reads whole tiles, computes its stripe, and its loss is the mean over the tile's pixels, as the means
    over processes of `SegmentationLoss` are those of all samples. Lightning's DDP adds up the gradients.

    Args:
        number: Number of processes of a group; None for all.
    """

    def __init__(self, number: int | None = None) -> None:
        self.number = number
        self._stripes: StripedSegmenter | None = None
        self._group: Any = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Make the groups."""
        size = self.number or trainer.world_size
        # Groups of their own: the order of their sums and of DDP's is free.
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, trainer.world_size, size)]
        self._group = groups[trainer.global_rank // size]
        network: Any = pl_module.model
        self._stripes = StripedSegmenter(network, Processes(self._group))
        share_samples(size)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Let each process have samples of its own again."""
        self._end(pl_module)
        share_samples(1)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Let each process have samples of its own again."""
        self.teardown(trainer, pl_module, "fit")

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Compute stripes."""
        self._begin(pl_module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compute whole tiles, such as those of pictures."""
        self._end(pl_module)

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Compute stripes."""
        self._begin(pl_module)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Compute whole tiles."""
        self._end(pl_module)

    def _begin(self, task: Any) -> None:
        assert self._stripes is not None
        self._stripes.begin()
        task.stripes, task.loss.group = self._stripes, self._group

    def _end(self, task: Any) -> None:
        if task.stripes is not None:
            task.stripes.end()
        task.stripes = task.loss.group = None


def check_sequence_parallel(trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
    """Check that a run fits `trainer.sequence_parallel`.

    Args:
        trainer: Trainer of the run.
        task: Training module.

    Raises:
        ConfigError: The number of processes, the strategy, the task, its network or its loss doesn't fit.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, SequenceParallel):
            _check(callback.number, trainer, task)


def _check(number: int | None, trainer: lightning.Trainer, task: Any) -> None:
    key, num_processes = "trainer.sequence_parallel", trainer.world_size
    number = num_processes if number is None else number
    if num_processes == 1 or num_processes % number:
        raise ConfigError(
            f"{key} needs a number of processes that is a multiple of {max(2, number)}, got {num_processes}; set "
            f"trainer.devices={max(2, number)}, or start with torchrun --nproc-per-node {max(2, number)}"
        )
    if not isinstance(trainer.strategy, DDPStrategy):
        got = type(trainer.strategy).__name__
        raise ConfigError(f"{key} needs trainer.strategy=ddp, which adds up gradients, got {got}; leave strategy out")
    if not isinstance(task, SegmentationTask):
        raise ConfigError(f"{key} is for task: segmentation, got {type(task).__name__}; leave it out")
    if task.loss.terms.lovasz:
        raise ConfigError(f"{key} needs optim.loss.lovasz=0, whose pixels of a tile are sorted together; use dice")
    check_striped(task.model, task.model.spec.tile_px, number)
