"""Training tasks: losses, metrics and Lightning modules."""

from perf_vit.tasks.losses import SegmentationLoss
from perf_vit.tasks.metrics import ClassScores, class_scores, segmentation_metrics
from perf_vit.tasks.redraw import RedrawProjections
from perf_vit.tasks.segmentation import OptimConfig, SegmentationTask
from perf_vit.tasks.trainer import TrainerConfig, build_trainer

__all__ = [
    "ClassScores",
    "OptimConfig",
    "RedrawProjections",
    "SegmentationLoss",
    "SegmentationTask",
    "TrainerConfig",
    "build_trainer",
    "class_scores",
    "segmentation_metrics",
]
