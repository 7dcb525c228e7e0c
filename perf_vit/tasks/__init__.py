"""Training tasks: losses, metrics and Lightning modules."""

from perf_vit.tasks.confusion_plot import save_confusion_matrix
from perf_vit.tasks.detection import DETECTION_CURVES, DETECTION_MONITOR, DetectionOptimConfig, DetectionTask
from perf_vit.tasks.detection_confusion import DetectionConfusion
from perf_vit.tasks.detection_metrics import DetectionMetrics, DetectionScores
from perf_vit.tasks.detection_plots import plot_precision_recall
from perf_vit.tasks.distillation import DistillationOptimConfig, DistillationTask
from perf_vit.tasks.distillation_trainer import DistillationTrainerConfig, build_distillation_trainer
from perf_vit.tasks.fit_tile import TileFit, fit_max_tile
from perf_vit.tasks.froc import FROC_RATES, Froc
from perf_vit.tasks.image_metrics import ClassificationMetrics, ClassificationScores, RegressionScores
from perf_vit.tasks.losses import LossConfig, SegmentationLoss, balanced_weights
from perf_vit.tasks.metrics import ClassScores, class_scores, segmentation_metrics
from perf_vit.tasks.optimize import OptimizerConfig, TrainingTask
from perf_vit.tasks.oriented_metrics import OrientedAveragePrecision
from perf_vit.tasks.panoptic import PanopticQuality
from perf_vit.tasks.pictures import draw_classification, draw_objects, draw_segmentation
from perf_vit.tasks.pooled_optim import ClassificationOptimConfig
from perf_vit.tasks.precision_recall_plot import save_precision_recall
from perf_vit.tasks.scenes import (
    CLASSIFICATION_CURVES,
    CLASSIFICATION_MONITOR,
    REGRESSION_CURVES,
    REGRESSION_MONITOR,
    ClassificationTask,
)
from perf_vit.tasks.segmentation import SegmentationOptimConfig, SegmentationTask
from perf_vit.tasks.segmentation_curves import SegmentationCurves
from perf_vit.tasks.slides import SLIDE_CURVES, SLIDE_MONITOR, SlideClassificationTask
from perf_vit.tasks.trainer import TrainerConfig, build_trainer
from perf_vit.tasks.training_peak import TrainingSteps

__all__ = [
    "CLASSIFICATION_CURVES",
    "CLASSIFICATION_MONITOR",
    "DETECTION_CURVES",
    "DETECTION_MONITOR",
    "FROC_RATES",
    "REGRESSION_CURVES",
    "REGRESSION_MONITOR",
    "SLIDE_CURVES",
    "SLIDE_MONITOR",
    "ClassScores",
    "ClassificationMetrics",
    "ClassificationOptimConfig",
    "ClassificationScores",
    "ClassificationTask",
    "DetectionConfusion",
    "DetectionMetrics",
    "DetectionOptimConfig",
    "DetectionScores",
    "DetectionTask",
    "DistillationOptimConfig",
    "DistillationTask",
    "DistillationTrainerConfig",
    "Froc",
    "LossConfig",
    "OptimizerConfig",
    "OrientedAveragePrecision",
    "PanopticQuality",
    "RegressionScores",
    "SegmentationCurves",
    "SegmentationLoss",
    "SegmentationOptimConfig",
    "SegmentationTask",
    "SlideClassificationTask",
    "TileFit",
    "TrainerConfig",
    "TrainingSteps",
    "TrainingTask",
    "balanced_weights",
    "build_distillation_trainer",
    "build_trainer",
    "class_scores",
    "draw_classification",
    "draw_objects",
    "draw_segmentation",
    "fit_max_tile",
    "plot_precision_recall",
    "save_confusion_matrix",
    "save_precision_recall",
    "segmentation_metrics",
]
