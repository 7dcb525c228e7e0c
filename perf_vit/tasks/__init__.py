"""Training tasks: losses, metrics and Lightning modules."""

from perf_vit.tasks.distillation import DistillationConfig, DistillationTask
from perf_vit.tasks.distillation_trainer import DistillationTrainerConfig, build_distillation_trainer
from perf_vit.tasks.losses import SegmentationLoss
from perf_vit.tasks.metrics import ClassScores, class_scores, segmentation_metrics
from perf_vit.tasks.redraw import RedrawProjections
from perf_vit.tasks.segmentation import OptimConfig, SegmentationTask
from perf_vit.tasks.trainer import TrainerConfig, build_trainer

__all__ = [
    "ClassScores",
    "DistillationConfig",
    "DistillationTask",
    "DistillationTrainerConfig",
    "OptimConfig",
    "RedrawProjections",
    "SegmentationLoss",
    "SegmentationTask",
    "TrainerConfig",
    "build_distillation_trainer",
    "build_trainer",
    "class_scores",
    "segmentation_metrics",
]
