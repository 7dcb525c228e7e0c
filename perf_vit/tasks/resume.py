"""What a run needs to be taken up in the middle of an epoch, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint

__all__ = ["StepCheckpoint", "StepSeeds"]


class StepSeeds(lightning.Callback):
    """Makes what is random in a training step (dropout, sampled anchors) a function of the step and the process alone.

    So it needs no place in a checkpoint, which one process writes for all.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed torch's generators."""
        place = (self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1))


class StepCheckpoint(Checkpoint):
    """Writes a checkpoint to resume from every few optimizer steps, over that of the last epoch.

    At the end of an epoch, where its checkpoint follows after validation, it writes none.

    Args:
        path: the checkpoint.
        every_n_steps: optimizer steps between checkpoints.
    """

    def __init__(self, path: Path, every_n_steps: int) -> None:
        self.path = path
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write one if it is due; between the batches of one step there is nothing to go on from."""
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and trainer.global_step % self.every_n_steps == 0 and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)
