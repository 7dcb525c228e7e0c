"""Training tasks: losses, metrics and Lightning modules."""

from perf_vit.errors import extra

with extra("train", __name__):
    from perf_vit.tasks.classification import (
        CLASSIFICATION_CURVES,
        CLASSIFICATION_MONITOR,
        LOSS_MONITOR,
        REGRESSION_CURVES,
        REGRESSION_MONITOR,
        ClassificationTask,
    )
    from perf_vit.tasks.detection import DETECTION_CURVES, DETECTION_MONITOR, DetectionOptimConfig, DetectionTask
    from perf_vit.tasks.distillation import (
        DistillationOptimConfig,
        DistillationTask,
        DistillationTrainerConfig,
        build_distillation_trainer,
    )
    from perf_vit.tasks.memory import TileFit, TrainingSteps, fit_max_tile
    from perf_vit.tasks.optim import ClassificationOptimConfig, OptimizerConfig, TrainingTask
    from perf_vit.tasks.pictures import draw_classification, draw_objects, draw_segmentation
    from perf_vit.tasks.segmentation import (
        LossConfig,
        SegmentationLoss,
        SegmentationOptimConfig,
        SegmentationTask,
        balanced_weights,
    )
    from perf_vit.tasks.slide_classification import SLIDE_CURVES, SLIDE_MONITOR, SlideClassificationTask
    from perf_vit.tasks.through_encoder import ThroughEncoderTask
    from perf_vit.tasks.trainer import TrainerConfig, build_trainer

__all__ = [
    "CLASSIFICATION_CURVES",
    "CLASSIFICATION_MONITOR",
    "DETECTION_CURVES",
    "DETECTION_MONITOR",
    "LOSS_MONITOR",
    "REGRESSION_CURVES",
    "REGRESSION_MONITOR",
    "SLIDE_CURVES",
    "SLIDE_MONITOR",
    "ClassificationOptimConfig",
    "ClassificationTask",
    "DetectionOptimConfig",
    "DetectionTask",
    "DistillationOptimConfig",
    "DistillationTask",
    "DistillationTrainerConfig",
    "LossConfig",
    "OptimizerConfig",
    "SegmentationLoss",
    "SegmentationOptimConfig",
    "SegmentationTask",
    "SlideClassificationTask",
    "ThroughEncoderTask",
    "TileFit",
    "TrainerConfig",
    "TrainingSteps",
    "TrainingTask",
    "balanced_weights",
    "build_distillation_trainer",
    "build_trainer",
    "draw_classification",
    "draw_objects",
    "draw_segmentation",
    "fit_max_tile",
]
