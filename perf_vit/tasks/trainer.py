"""Lightning trainer of a training run."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from perf_vit.distributed import training_precision
from perf_vit.errors import ConfigError, PerfVitError, extra, reason_line
from perf_vit.registry import did_you_mean
from perf_vit.tasks.callbacks import (
    SEGMENTATION_CURVES,
    Curves,
    EpochMeans,
    EpochProgressBar,
    FolderCheckpoint,
    HistoryCallback,
    Patience,
    RedrawProjections,
    StepCheckpoint,
    StepSeeds,
    ValidateLastEpoch,
    WholeCheckpoints,
)
from perf_vit.tasks.finite_loss import FiniteLoss
from perf_vit.tasks.optim import FullyShardedStrategy, WeightAverage
from perf_vit.tasks.pictures import Draw, PredictionPictures
from perf_vit.tasks.sequence_parallel import SequenceParallel

__all__ = ["TrainerConfig", "best_and_last", "build_trainer", "lightning_trainer", "precision_name"]

_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")
_SHORT_PRECISIONS = {"32": "32-true", "64": "64-true", "bf16": "bf16-mixed", "16": "16-mixed", "fp16": "16-mixed"}


def precision_name(precision: str) -> str:
    """Return Lightning's name of a precision: "bf16-mixed" for "bf16", as prediction calls it, and so on."""
    return _SHORT_PRECISIONS.get(precision, precision)


@dataclass(kw_only=True)
class TrainerConfig:
    """Length, hardware and outputs of a training run.

    Attributes:
        max_epochs: Number of epochs of `data.tiles_per_epoch` tiles.
        precision: Precision: 32-true, bf16-mixed, 16-mixed (GPU) or 64-true, for short 32, bf16, 16 or 64; auto for
            bf16-mixed on GPUs and CPUs with instructions for bfloat16, else 32-true.
        accelerator: Lightning accelerator: auto, cpu, gpu, mps.
        devices: Number of devices, or list of the indices of GPUs; "auto" for all, or with torchrun for as many as it
            started processes.
        gradient_clip: Maximum gradient norm; 0 for no clipping.
        val_every_epochs: Number of epochs between validations; the last epoch is always validated.
        redraw_every_steps: Number of optimizer steps between redraws of the attention's random projections; 0 to keep
            the first draw. Redrawing keeps the weights from fitting a single, possibly poor draw (Choromanski et al.
            2020). It has no effect on models without Performer attention.
        accumulate_batches: Number of batches whose gradients are accumulated per optimizer step.
        ema_decay: Decay of the exponential moving average of the weights, e.g. 0.998; the average is validated and
            saved. 0 for no average.
        early_stop_epochs: Number of validations without improvement after which training stops; 0 to train all epochs.
        checkpoint_every_steps: Number of optimizer steps between checkpoints within an epoch. With `resume=true`
            training continues there with the remaining samples and gives the same weights. 0 for a checkpoint per epoch
            only.
        num_pictures: Number of validation tiles drawn with truth and prediction after each validation, into the folder
            `pictures` and to the logger; 0 for none.
        report: Whether to write `report.html` when training ends: curves, scores and pictures of the best model.
        logger: tensorboard, or wandb for TensorBoard and Weights & Biases (extra `wandb`); `metrics.csv` is always
            written.
        strategy: Strategy for several devices: fsdp2, which shards weights, gradients and optimizer states, or a
            Lightning strategy: auto, ddp, ...
        sequence_parallel: Whether all processes share each tile, of which each computes a stripe of rows; or the
            number of processes that do. For segmentation with linear attention.
    """

    max_epochs: int = 50
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: int | str | list[int] = "auto"
    gradient_clip: float = 1.0
    val_every_epochs: int = 1
    redraw_every_steps: int = 0
    accumulate_batches: int = 1
    ema_decay: float = 0.0
    early_stop_epochs: int = 0
    checkpoint_every_steps: int = 0
    num_pictures: int = 4
    report: bool = True
    logger: Literal["tensorboard", "wandb"] = "tensorboard"
    strategy: str = "auto"
    sequence_parallel: bool | int = False

    def __post_init__(self) -> None:
        self.precision = precision_name(self.precision)

    @property
    def num_devices(self) -> int:
        """Number of devices, 1 where it isn't known yet."""
        if isinstance(self.devices, list):
            return len(self.devices)
        return max(1, int(self.devices)) if str(self.devices).lstrip("-").isdigit() else 1


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
    """Build a trainer that writes checkpoints, metrics and logs into the run folder.

    It writes `checkpoints/best.ckpt` (highest `monitor`), `checkpoints/last.ckpt`, `metrics.csv`, `loss_curve.png` and
    TensorBoard logs.

    Args:
        config: Length, hardware and outputs of the run.
        folder: Run folder.
        progress: Whether to show a progress bar.
        monitor: Metric that selects `best.ckpt`.
        curves: Metrics to plot and log.
        draw: Function that draws a validation tile: `draw_segmentation`, `draw_objects` or `draw_classification`; None
            for no pictures.
        seed: Seed of dropout and other randomness in training steps.

    Raises:
        ConfigError: Values are out of range or unknown to Lightning.
    """
    _check(config)
    callbacks = [StepSeeds(seed), ValidateLastEpoch(config.val_every_epochs), HistoryCallback(folder, curves)]
    callbacks += best_and_last(folder, monitor=monitor)
    if config.num_pictures and draw is not None:
        # Before weight averaging, which restores the training weights when validation ends.
        callbacks.append(PredictionPictures(folder, config.num_pictures, draw))
    callbacks += _optional_callbacks(config, folder, monitor)
    return lightning_trainer(
        folder,
        callbacks,
        precision=config.precision,
        accelerator=config.accelerator,
        devices=config.devices,
        progress=progress,
        logger=config.logger,
        options={
            "max_epochs": config.max_epochs,
            "strategy": FullyShardedStrategy() if config.strategy == "fsdp2" else config.strategy,
            "accumulate_grad_batches": config.accumulate_batches,
            "gradient_clip_val": config.gradient_clip or None,
            "check_val_every_n_epoch": config.val_every_epochs,
            "num_sanity_val_steps": 0,
        },
    )


def _check(config: TrainerConfig) -> None:
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
    if not 0 <= config.gradient_clip < math.inf:
        raise ConfigError(
            f"trainer.gradient_clip must be a number of at least 0, got {config.gradient_clip:g}; use 0 for no clipping"
        )
    for key in ("checkpoint_every_steps", "num_pictures"):
        if getattr(config, key) < 0:
            raise ConfigError(f"trainer.{key} must be 0 or more, got {getattr(config, key)}")
    if not isinstance(config.sequence_parallel, bool) and config.sequence_parallel < 2:
        raise ConfigError(
            f"trainer.sequence_parallel must be true, false or 2 or more processes, got {config.sequence_parallel}"
        )
    if config.strategy == "fsdp2" and config.ema_decay:
        raise ConfigError("trainer.ema_decay can't average weights that strategy=fsdp2 shards; leave one of them out")


def _optional_callbacks(config: TrainerConfig, folder: Path, monitor: str) -> list[Callback]:
    callbacks: list[Callback] = []
    if config.early_stop_epochs:
        callbacks.append(Patience(monitor, mode="max", patience=config.early_stop_epochs))
    if config.ema_decay:
        callbacks.append(WeightAverage(decay=config.ema_decay))
    if config.redraw_every_steps:
        callbacks.append(RedrawProjections(config.redraw_every_steps))
    if config.checkpoint_every_steps:
        callbacks.append(StepCheckpoint(folder / "checkpoints" / "last.ckpt", config.checkpoint_every_steps))
    if config.sequence_parallel:
        callbacks.append(SequenceParallel(None if config.sequence_parallel is True else config.sequence_parallel))
    return callbacks


def lightning_trainer(
    folder: Path,
    callbacks: Sequence[Callback],
    *,
    precision: str,
    accelerator: str,
    devices: int | str | list[int],
    progress: bool,
    logger: str = "tensorboard",
    options: Mapping[str, Any],
) -> lightning.Trainer:
    """Build a Lightning trainer with the settings that all tasks share.

    Args:
        folder: Run folder.
        callbacks: Callbacks of the task.
        precision: Precision, as Lightning names it, or "auto".
        accelerator: Lightning accelerator.
        devices: Number of devices, list of their indices, or "auto".
        progress: Whether to show a progress bar.
        logger: "tensorboard" or "wandb".
        options: Further arguments of `lightning.Trainer`.

    Raises:
        ConfigError: Values are unknown to Lightning.
    """
    precision = training_precision(precision, accelerator)
    if precision not in _PRECISIONS:
        near = did_you_mean(precision, _PRECISIONS)
        raise ConfigError(f"trainer.precision must be one of {', '.join(_PRECISIONS)}, auto, got {precision}{near}")
    _quieten()
    # Deterministic mode fills new tensors with NaN, a debugging aid that costs a sixth of the step time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        return lightning.Trainer(
            precision=precision,
            accelerator=accelerator,
            devices=_devices(devices, accelerator),
            num_nodes=_num_machines(),
            # Bilinear resizing has no deterministic backward on CUDA, so warn instead of raising.
            deterministic="warn",
            default_root_dir=folder,
            logger=_loggers(logger, folder),
            callbacks=[FiniteLoss(), EpochMeans(), *callbacks, *([EpochProgressBar()] if progress else [])],
            plugins=[WholeCheckpoints()],
            enable_progress_bar=progress,
            # Our samplers split the samples of one process; Lightning's would shuffle them.
            use_distributed_sampler=False,
            enable_model_summary=False,
            log_every_n_steps=10,
            **options,
        )
    except PerfVitError:
        raise
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"trainer: {reason_line(error)}") from error


def _devices(devices: int | str | list[int], accelerator: str) -> int | str | list[int]:
    """Return devices as Lightning takes them: with torchrun as many as it started processes on this machine.

    Processes on a CPU have no indices, so a list of them is their number.
    """
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    taken = len(devices) if isinstance(devices, list) and on_cpu else devices
    if not _is_torchrun():
        return taken
    started = int(os.environ["LOCAL_WORLD_SIZE"])
    if devices == "auto":
        # Lightning would take all GPUs, or one process on a CPU, and refuse another number of processes.
        return started
    number = str(len(devices) if isinstance(devices, list) else devices)
    if number.isdigit() and int(number) != started:
        raise ConfigError(
            f"trainer.devices must be auto or the number of processes that torchrun started on this machine, "
            f"{started}, got {devices}; pass trainer.devices=auto"
        )
    return taken


def _is_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def _num_machines() -> int:
    """Return the number of machines on which torchrun has started processes; 1 without torchrun."""
    if not _is_torchrun():
        return 1
    return int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])


def best_and_last(folder: Path, monitor: str) -> list[Callback]:
    """Build the callbacks that write `checkpoints/best.ckpt` (highest `monitor`) and `last.ckpt`.

    They run after the history callback, whose rows of the epoch are part of the checkpoint.
    """
    shared: dict[str, Any] = {
        "dirpath": folder / "checkpoints",
        "enable_version_counter": False,
        "save_on_train_epoch_end": True,
    }
    return [
        FolderCheckpoint(filename="best", monitor=monitor, mode="max", **shared),
        # Without a monitor the newest checkpoint is kept; `save_last` would copy the best one.
        FolderCheckpoint(filename="last", **shared),
    ]


def _loggers(name: str, folder: Path) -> list[Logger]:
    tensorboard = TensorBoardLogger(folder, name="tensorboard", version="")
    if name == "tensorboard":
        return [tensorboard]
    if name != "wandb":
        raise ConfigError(f"trainer.logger must be tensorboard or wandb, got {name}")
    with extra("wandb", "trainer.logger=wandb"):
        try:
            return [tensorboard, WandbLogger(project="perf_vit", name=folder.name, save_dir=folder)]
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(str(error), name="wandb") from error


def _quieten() -> None:
    for message in (
        ".*does not have many workers.*",
        ".*treespec.*",
        ".*litlogger.*",
        ".*exists and is not empty.*",
        # Distillation validates at any step and keeps both models in evaluation mode.
        ".*smaller than the logging interval.*",
        ".*in eval mode at the start of training.*",
        ".*overridden `transfer_batch_to_device`.*",
        # `configure_model` only acts on sharded weights, which are not averaged.
        ".*WeightAveraging callback with a model that overrides.*",
        # Training resumes within an epoch through the data module's state.
        ".*your dataloader is not resumable.*",
        # Epochs without validation have no score to select the best checkpoint.
        ".*could not find the monitored key.*",
    ):
        warnings.filterwarnings("ignore", message)
