"""The Lightning trainer of a run folder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    RichProgressBar,
)
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from perf_vit.errors import ConfigError, reason_line
from perf_vit.tasks.callbacks import (
    EpochMeans,
    FolderCheckpoint,
    Patience,
    RedrawnWeightAveraging,
    RedrawProjections,
    StepCheckpoint,
    StepSeeds,
    WholeCheckpoints,
)
from perf_vit.tasks.history import SEGMENTATION_CURVES, Curves, HistoryCallback
from perf_vit.tasks.optim import FullyShardedStrategy
from perf_vit.tasks.pictures import Draw, PredictionPictures

__all__ = ["TrainerConfig", "best_and_last", "build_trainer", "lightning_trainer"]

_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")


@dataclass(kw_only=True)
class TrainerConfig:
    """How long and where to train.

    Attributes:
        max_epochs: epochs of `data.tiles_per_epoch` tiles.
        precision: 32-true, bf16-mixed, 16-mixed (GPU) or 64-true.
        accelerator: auto, cpu, gpu, mps: as Lightning names them.
        devices: how many; "auto" for all.
        gradient_clip: largest gradient norm; 0 for no clipping.
        val_every_epochs: epochs between validations.
        redraw_every_steps: optimizer steps between new draws of the attention's random projections, 0 to keep the first
            draw. Choromanski et al. 2020 redraw while training, so that the weights don't fit themselves to one draw,
            which may be a poor one. It changes nothing in a model without Performer attention.
        accumulate_batches: batches whose gradients make one step.
        ema_decay: share of the old average at each step, such as 0.998, when weights are averaged while training; the
            average is validated and kept. 0 for no average.
        early_stop_epochs: validations without a better score after which training ends; 0 to go on to the end.
        checkpoint_every_steps: optimizer steps between checkpoints inside an epoch, from which `resume=true` goes on
            with the samples that were left, to the same weights; 0 for none but that of the last epoch.
        num_pictures: validation tiles that are drawn with truth and prediction after each validation, into the folder
            `pictures` and to the logger; 0 for none.
        logger: tensorboard, or wandb for Weights & Biases beside it, which takes the extra `wandb`; `metrics.csv` is
            written anyway.
        strategy: of several devices: fsdp2, which shares weights, gradients and optimizer states out among them, or as
            Lightning names it: auto, ddp, ...
    """

    max_epochs: int = 50
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: str = "auto"
    gradient_clip: float = 1.0
    val_every_epochs: int = 1
    redraw_every_steps: int = 0
    accumulate_batches: int = 1
    ema_decay: float = 0.0
    early_stop_epochs: int = 0
    checkpoint_every_steps: int = 0
    num_pictures: int = 4
    logger: str = "tensorboard"
    strategy: str = "auto"


def build_trainer(
    config: TrainerConfig,
    folder: Path,
    *,
    progress: bool = True,
    monitor: str = "val/iou",
    curves: Curves = SEGMENTATION_CURVES,
    draw: Draw | None = None,
    seed: int = 0,
) -> lightning.Trainer:
    """A trainer that keeps `checkpoints/best.ckpt` (by the highest `monitor`) and `last.ckpt`, `metrics.csv`,
    `loss_curve.png` and TensorBoard logs in the run folder.

    Args:
        config: how long and where to train.
        folder: of the run.
        progress: show a progress bar.
        monitor: the score that `best.ckpt` is chosen by.
        curves: what is drawn and named in the log.
        draw: makes the pictures of a validation tile, `draw_segmentation`, `draw_objects` or `draw_classification`;
            None for no pictures.
        seed: decides dropout and whatever else is random in a training step.

    Raises:
        ConfigError: values that Lightning doesn't know.
    """  # noqa: D205
    if config.max_epochs < 1 or config.val_every_epochs < 1:
        raise ConfigError("trainer.max_epochs and trainer.val_every_epochs must be at least 1")
    if config.redraw_every_steps < 0:
        raise ConfigError(
            f"trainer.redraw_every_steps must be 0 or more, got {config.redraw_every_steps}; use 0 to never redraw"
        )
    if not 0 <= config.ema_decay < 1 or config.accumulate_batches < 1 or config.early_stop_epochs < 0:
        raise ConfigError(
            "expected trainer.ema_decay from 0 to below 1, accumulate_batches from 1 on and early_stop_epochs from 0 "
            f"on, got {config.ema_decay:g}, {config.accumulate_batches} and {config.early_stop_epochs}"
        )
    for key in ("checkpoint_every_steps", "num_pictures"):
        if getattr(config, key) < 0:
            raise ConfigError(f"trainer.{key} must be 0 or more, got {getattr(config, key)}")
    if config.strategy == "fsdp2" and config.ema_decay:
        raise ConfigError(
            "trainer.ema_decay can't average weights that strategy=fsdp2 shares out; leave one of them out"
        )
    callbacks = [StepSeeds(seed), HistoryCallback(folder, curves), *best_and_last(folder, monitor=monitor)]
    if config.num_pictures and draw is not None:
        # Before the average of the weights, which takes itself out of the network when validation ends.
        callbacks.append(PredictionPictures(folder, config.num_pictures, draw))
    if config.early_stop_epochs:
        callbacks.append(Patience(monitor, mode="max", patience=config.early_stop_epochs))
    if config.ema_decay:
        average = RedrawnWeightAveraging if config.redraw_every_steps else EMAWeightAveraging
        callbacks.append(average(decay=config.ema_decay))
    if config.redraw_every_steps:
        callbacks.append(RedrawProjections(config.redraw_every_steps))
    if config.checkpoint_every_steps:
        callbacks.append(StepCheckpoint(folder / "checkpoints" / "last.ckpt", config.checkpoint_every_steps))
    return lightning_trainer(
        folder,
        callbacks,
        precision=config.precision,
        accelerator=config.accelerator,
        devices=config.devices,
        progress=progress,
        logger=config.logger,
        max_epochs=config.max_epochs,
        strategy=FullyShardedStrategy() if config.strategy == "fsdp2" else config.strategy,
        accumulate_grad_batches=config.accumulate_batches,
        gradient_clip_val=config.gradient_clip or None,
        check_val_every_n_epoch=config.val_every_epochs,
        num_sanity_val_steps=0,
    )


def lightning_trainer(
    folder: Path,
    callbacks: Sequence[Callback],
    *,
    precision: str,
    accelerator: str,
    devices: str | int,
    progress: bool,
    logger: str = "tensorboard",
    **options: Any,
) -> lightning.Trainer:
    """A trainer as all tasks want it; `options` are Lightning's.

    Raises:
        ConfigError: values that Lightning doesn't know.
    """
    if precision not in _PRECISIONS:
        raise ConfigError(f"trainer.precision must be one of {', '.join(_PRECISIONS)}, got {precision}")
    _quieten()
    # Deterministic algorithms come with NaN written to every new tensor, a help in looking for bugs that costs a
    # sixth of the time of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        return lightning.Trainer(
            precision=precision,
            accelerator=accelerator,
            devices=devices,
            # bilinear resizing has no deterministic backward on CUDA: a warning there, exact on the CPU.
            deterministic="warn",
            default_root_dir=folder,
            logger=_loggers(logger, folder),
            callbacks=[EpochMeans(), *callbacks, *([RichProgressBar()] if progress else [])],
            plugins=[WholeCheckpoints()],
            enable_progress_bar=progress,
            # Ours share the samples of one process out; Lightning's would shuffle them.
            use_distributed_sampler=False,
            enable_model_summary=False,
            log_every_n_steps=10,
            **options,
        )
    except (
        TypeError,
        ValueError,
        RuntimeError,
        lightning.fabric.utilities.exceptions.MisconfigurationException,
    ) as error:
        raise ConfigError(f"trainer: {reason_line(error)}") from error


def best_and_last(folder: Path, monitor: str) -> list[Callback]:
    """The callbacks that keep `checkpoints/best.ckpt`, by the highest `monitor`, and `last.ckpt`.

    They go after the history, whose rows of this epoch are part of the checkpoint.
    """
    shared: dict[str, Any] = {
        "dirpath": folder / "checkpoints",
        "enable_version_counter": False,
        "save_on_train_epoch_end": True,
    }
    return [
        FolderCheckpoint(filename="best", monitor=monitor, mode="max", **shared),
        # Without a monitor the newest is kept; `save_last` would follow the best one.
        FolderCheckpoint(filename="last", **shared),
    ]


def _loggers(name: str, folder: Path) -> list[Logger]:
    tensorboard = TensorBoardLogger(folder, name="tensorboard", version="")
    if name == "tensorboard":
        return [tensorboard]
    if name != "wandb":
        raise ConfigError(f"trainer.logger must be tensorboard or wandb, got {name}")
    try:
        return [tensorboard, WandbLogger(project="perf_vit", name=folder.name, save_dir=folder)]
    except ModuleNotFoundError as error:
        raise ConfigError(
            "trainer.logger=wandb needs wandb; pip install perf-vit[wandb], or use tensorboard"
        ) from error


def _quieten() -> None:
    for message in (
        ".*does not have many workers.*",
        ".*treespec.*",
        ".*litlogger.*",
        ".*exists and is not empty.*",
        # A distillation validates as often as it likes, and keeps both models in evaluation mode.
        ".*smaller than the logging interval.*",
        ".*in eval mode at the start of training.*",
        ".*overridden `transfer_batch_to_device`.*",
        # `configure_model` does something with sharded weights only, and those are not averaged.
        ".*WeightAveraging callback with a model that overrides.*",
        # Ours takes up the middle of an epoch through the data module's state.
        ".*your dataloader is not resumable.*",
        # Epochs without validation have no score to choose the best by.
        ".*could not find the monitored key.*",
    ):
        warnings.filterwarnings("ignore", message)
