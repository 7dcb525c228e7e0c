"""Lightning trainer of a distillation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import lightning

from perf_vit.errors import ConfigError
from perf_vit.tasks.distillation import DistillationOptimConfig
from perf_vit.tasks.history import Curves, HistoryCallback
from perf_vit.tasks.trainer import best_and_last, lightning_trainer

__all__ = ["DistillationTrainerConfig", "build_distillation_trainer"]

_CURVES = Curves(
    losses=("train/block_loss", "train/token_loss"),
    scores=("val/patch_cosine", "val/class_cosine"),
    title="cosine with the teacher, held-out crops",
    log_losses=True,
    score_range=None,
)


@dataclass(kw_only=True)
class DistillationTrainerConfig:
    """Hardware and validation interval of a distillation.

    Attributes:
        val_every_steps: Number of steps between validations; each one saves a checkpoint to resume from.
        precision: Precision: 32-true, bf16-mixed, 16-mixed (GPU) or 64-true.
        accelerator: Lightning accelerator: auto, cpu, gpu, mps. Training uses one device.
    """

    val_every_steps: int = 50
    precision: str = "32-true"
    accelerator: str = "auto"


def build_distillation_trainer(
    config: DistillationTrainerConfig, stages: DistillationOptimConfig, folder: Path, *, progress: bool = True
) -> lightning.Trainer:
    """Build a trainer that writes checkpoints, metrics and logs into the run folder.

    It writes `checkpoints/best.ckpt` (highest patch cosine), `checkpoints/last.ckpt`, `metrics.csv`, `loss_curve.png`
    and TensorBoard logs. An epoch has `val_every_steps` steps.

    Args:
        config: Hardware and validation interval.
        stages: Stages and schedule.
        folder: Run folder.
        progress: Whether to show a progress bar.

    Raises:
        ConfigError: Values are out of range or unknown to Lightning.
    """
    if config.val_every_steps < 1:
        raise ConfigError(f"trainer.val_every_steps must be at least 1, got {config.val_every_steps}")
    return lightning_trainer(
        folder,
        [HistoryCallback(folder, _CURVES), *best_and_last(folder, monitor="val/patch_cosine")],
        precision=config.precision,
        accelerator=config.accelerator,
        devices=1,
        progress=progress,
        max_epochs=-(-stages.total_steps // config.val_every_steps),
        # Validate the untrained student first, on all crops.
        num_sanity_val_steps=-1,
    )
