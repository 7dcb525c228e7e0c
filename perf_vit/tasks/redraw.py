"""New random projections on a schedule, during training only, and averages of weights that go with them."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.pytorch.callbacks import EMAWeightAveraging

from perf_vit.layers import redraw_projections
from perf_vit.layers.performer_mixer import copy_projections

__all__ = ["RedrawProjections", "RedrawnWeightAveraging"]


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
