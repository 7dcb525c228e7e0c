"""The schema of a run: the schemas of its parts, put together."""

from __future__ import annotations

from dataclasses import dataclass, field

from perf_vit.data import DataConfig
from perf_vit.models import ModelConfig
from perf_vit.tasks import OptimConfig, TrainerConfig

__all__ = ["SegmentationRun"]


@dataclass(kw_only=True)
class SegmentationRun:
    """Everything that decides a segmentation run; dumped into its folder.

    Attributes:
        out: the run folder.
        seed: decides weights, windows and augmentation.
        resume: continue from the run folder's last checkpoint.
        data: rasters, labels and tiles.
        model: backbone and head.
        optim: loss, optimizer and schedule.
        trainer: how long and where.
    """

    out: str
    data: DataConfig
    seed: int = 0
    resume: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
