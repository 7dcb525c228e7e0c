"""Training tasks: losses, metrics and Lightning modules."""

from perf_vit.tasks.detection import DETECTION_CURVES, DETECTION_MONITOR, DetectionOptimConfig, DetectionTask
from perf_vit.tasks.detection_metrics import OBJECT_SIZES, DetectionClassScores, DetectionMetrics, DetectionScores
from perf_vit.tasks.detection_plots import plot_precision_recall
from perf_vit.tasks.distillation import DistillationConfig, DistillationTask
from perf_vit.tasks.distillation_trainer import DistillationTrainerConfig, build_distillation_trainer
from perf_vit.tasks.losses import LossConfig, SegmentationLoss, balanced_weights
from perf_vit.tasks.metrics import ClassScores, class_scores, segmentation_metrics
from perf_vit.tasks.multilabel_losses import MultilabelLoss
from perf_vit.tasks.oriented_metrics import OrientedAveragePrecision
from perf_vit.tasks.redraw import RedrawProjections
from perf_vit.tasks.segmentation import OptimConfig, SegmentationTask
from perf_vit.tasks.trainer import TrainerConfig, build_trainer

__all__ = [
    "DETECTION_CURVES",
    "DETECTION_MONITOR",
    "OBJECT_SIZES",
    "ClassScores",
    "DetectionClassScores",
    "DetectionMetrics",
    "DetectionOptimConfig",
    "DetectionScores",
    "DetectionTask",
    "DistillationConfig",
    "DistillationTask",
    "DistillationTrainerConfig",
    "LossConfig",
    "MultilabelLoss",
    "OptimConfig",
    "OrientedAveragePrecision",
    "RedrawProjections",
    "SegmentationLoss",
    "SegmentationTask",
    "TrainerConfig",
    "balanced_weights",
    "build_distillation_trainer",
    "build_trainer",
    "class_scores",
    "plot_precision_recall",
    "segmentation_metrics",
]
