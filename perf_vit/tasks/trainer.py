"""The Lightning trainer of a run folder."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from perf_vit.errors import ConfigError
from perf_vit.tasks.history import HistoryCallback
from perf_vit.tasks.redraw import RedrawProjections

__all__ = ["TrainerConfig", "build_trainer"]

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
    """

    max_epochs: int = 50
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: str = "auto"
    gradient_clip: float = 1.0
    val_every_epochs: int = 1
    redraw_every_steps: int = 0


def build_trainer(config: TrainerConfig, folder: Path, *, progress: bool = True) -> lightning.Trainer:
    """A trainer that keeps `checkpoints/best.ckpt` (by mean validation IoU) and `last.ckpt`, `metrics.csv`,
    `loss_curve.png` and TensorBoard logs in the run folder.

    Raises:
        ConfigError: values that Lightning doesn't know.
    """  # noqa: D205
    if config.precision not in _PRECISIONS:
        raise ConfigError(f"trainer.precision must be one of {', '.join(_PRECISIONS)}, got {config.precision}")
    if config.max_epochs < 1 or config.val_every_epochs < 1:
        raise ConfigError("trainer.max_epochs and trainer.val_every_epochs must be at least 1")
    if config.redraw_every_steps < 0:
        raise ConfigError(
            f"trainer.redraw_every_steps must be 0 or more, got {config.redraw_every_steps}; use 0 to never redraw"
        )
    _quieten()
    try:
        return lightning.Trainer(
            max_epochs=config.max_epochs,
            precision=config.precision,
            accelerator=config.accelerator,
            devices=config.devices,
            gradient_clip_val=config.gradient_clip or None,
            check_val_every_n_epoch=config.val_every_epochs,
            # bilinear resizing has no deterministic backward on CUDA: a warning there, exact on the CPU.
            deterministic="warn",
            default_root_dir=folder,
            logger=TensorBoardLogger(folder, name="tensorboard", version=""),
            callbacks=_callbacks(config, folder, progress),
            enable_progress_bar=progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
        )
    except (ValueError, RuntimeError, lightning.fabric.utilities.exceptions.MisconfigurationException) as error:
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from error


def _callbacks(config: TrainerConfig, folder: Path, progress: bool) -> list[Callback]:
    # The history comes before the checkpoint, which must hold this epoch's row.
    checkpoints = folder / "checkpoints"
    shared: dict[str, Any] = {"enable_version_counter": False, "save_on_train_epoch_end": True}
    callbacks: list[Callback] = [
        HistoryCallback(folder),
        ModelCheckpoint(dirpath=checkpoints, filename="best", monitor="val/iou", mode="max", **shared),
        # Without a monitor the newest is kept; `save_last` would follow the best one.
        ModelCheckpoint(dirpath=checkpoints, filename="last", **shared),
    ]
    if config.redraw_every_steps:
        callbacks.append(RedrawProjections(config.redraw_every_steps))
    return [*callbacks, RichProgressBar()] if progress else callbacks


def _quieten() -> None:
    for message in (".*does not have many workers.*", ".*treespec.*", ".*litlogger.*", ".*exists and is not empty.*"):
        warnings.filterwarnings("ignore", message)
