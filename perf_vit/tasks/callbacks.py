"""New random projections on a schedule, during training only, and averages of weights that go with them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from torch import Tensor

from perf_vit.errors import OutputError, reason_line
from perf_vit.files import replaced
from perf_vit.layers import redraw_projections
from perf_vit.layers.performer_mixer import copy_projections

__all__ = [
    "EpochMeans",
    "FolderCheckpoint",
    "Patience",
    "RedrawProjections",
    "RedrawnWeightAveraging",
    "StepCheckpoint",
    "StepSeeds",
    "WholeCheckpoints",
]


class RedrawProjections(lightning.Callback):
    """Redraws the random projections of a model's Performer attention every few optimizer steps.

    Batches from optimizer step s on train with draw number s // every_n_steps. The number follows from
    `trainer.global_step` alone: every process finds the same one without communication, a resumed run takes up the
    schedule where it was, and batches whose gradients accumulate into one step share a draw.

    A redraw takes place before a training batch, so validation and prediction use the draw of the last batch trained.
    The weights belong to it: `SegmentationTask` keeps its number in the checkpoint, where `load_segmenter` finds it; a
    Lightning module of your own needs `current_draw` and `redraw_projections` in its checkpoint hooks.

    Args:
        every_n_steps: optimizer steps that train with one draw.

    Raises:
        ValueError: fewer than one step.
    """

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(
                f"every_n_steps must be at least 1, got {every_n_steps}; leave the callback out to keep the first draw"
            )
        self.every_n_steps = every_n_steps

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Redraw if the batch's step is due another draw than the model holds."""
        redraw_projections(pl_module, trainer.global_step // self.every_n_steps)


class RedrawnWeightAveraging(EMAWeightAveraging):
    """Lightning's exponential average of the weights, for a model whose projections are redrawn.

    Lightning averages buffers as it does weights, and the mean of several draws is none: here the average has the
    projections of the last training batch, as the checkpoint says.
    """

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Update the average."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        copy_projections(pl_module, self._average_model.module)


_MEANS = "perf_vit_means"
"""Where the sums of an epoch lie inside a Lightning checkpoint."""


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its name and moves it there, so a killed process leaves the one before.

    Lightning moves it from the folder for temporary files, which copies where that is another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            OutputError: it can't be written, or the disk is full.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with replaced(path) as unfinished, unfinished.open("wb") as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:
            # What torch raises where writing fails.
            raise OutputError(f"can't write {path}: {reason_line(error)}; is the disk full?") from error


class FolderCheckpoint(ModelCheckpoint):
    """Lightning's checkpoint by a score, which knows its best score also after the run folder was moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up scores and files, in the folder where they are now."""
        state = {**state_dict, "dirpath": self.dirpath}
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = self._here(state[key])
        state["best_k_models"] = {self._here(path): score for path, score in state["best_k_models"].items()}
        super().load_state_dict(state)

    def _here(self, path: str) -> str:
        return os.path.join(str(self.dirpath), os.path.basename(path)) if path else path


class Patience(EarlyStopping):
    """Lightning's early stopping with the config's patience after a resume; a run that it ended stays ended."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best score and the validations since."""
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop at once if patience had run out."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True


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


class EpochMeans(lightning.Callback):
    """Carries the sums behind the epoch's training means through a checkpoint inside the epoch.

    Lightning begins them anew. A checkpoint holds those of the process that writes it, so with several processes the
    row of the interrupted epoch has the means of the batches after the resume.
    """

    def __init__(self) -> None:
        self._before: dict[str, list[Tensor]] = {}

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the sums so far."""
        if trainer.training and trainer.world_size == 1:
            checkpoint[_MEANS] = {key: list(_sums(metric)) for key, metric in _means(trainer).items()}

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up the sums of an epoch that isn't over."""
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
        if epochs["processed"] < epochs["started"] and trainer.world_size == 1:
            self._before = checkpoint.get(_MEANS, {})

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add them to those of the first batch."""
        means = _means(trainer)
        for key, before in self._before.items():
            if key in means:
                for now, earlier in zip(_sums(means[key]), before, strict=True):
                    now += earlier.to(now.device)
        self._before = {}


def _means(trainer: lightning.Trainer) -> dict[str, Any]:
    """Lightning's metrics of values that are logged as means over the epoch's batches."""
    results = trainer._results
    return {key: each for key, each in (results or {}).items() if each.meta.on_epoch and each.meta.is_mean_reduction}


def _sums(metric: Any) -> tuple[Tensor, Tensor]:
    """Sum of the values, each times its batch size, and of the batch sizes."""
    return metric.value, metric.cumulated_batch_size


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
