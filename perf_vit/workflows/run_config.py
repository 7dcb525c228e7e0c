"""The schemas of runs: the schemas of their parts, put together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from perf_vit.data import (
    ClassificationDataConfig,
    DetectionDataConfig,
    DistillationDataConfig,
    RegressionDataConfig,
    SegmentationDataConfig,
    SlideClassificationDataConfig,
)
from perf_vit.models import (
    ClassificationModelConfig,
    DetectionModelConfig,
    SegmentationModelConfig,
    SlideClassificationModelConfig,
)
from perf_vit.tasks import (
    ClassificationOptimConfig,
    DetectionOptimConfig,
    DistillationOptimConfig,
    DistillationTrainerConfig,
    SegmentationOptimConfig,
    TrainerConfig,
)

__all__ = [
    "ClassificationRun",
    "DetectionRun",
    "DistillationModelConfig",
    "DistillationRun",
    "RegressionRun",
    "RunConfig",
    "SegmentationRun",
    "SlideClassificationRun",
    "TaskRunConfig",
]


@dataclass(kw_only=True)
class RunConfig:
    """What every run has.

    Attributes:
        out: Run folder.
        task: Name of the task.
        seed: Seed of weights, tiles, augmentation, and of the choice of validation data where `data.val` is left out.
        resume: Continue from the run folder's last checkpoint.
    """

    out: str
    task: str
    seed: int = 0
    resume: bool = False


@dataclass(kw_only=True)
class TaskRunConfig(RunConfig):
    """What every run of `perf-vit train` has.

    Attributes:
        trainer: Length, hardware and outputs of the training.
    """

    trainer: TrainerConfig = field(default_factory=TrainerConfig)


@dataclass(kw_only=True)
class SegmentationRun(TaskRunConfig):
    """Everything that decides a segmentation run; dumped into its folder.

    Attributes:
        data: Rasters, labels and tiles.
        model: Backbone and head.
        optim: Loss, optimizer and schedule.
    """

    data: SegmentationDataConfig
    task: str = "segmentation"
    model: SegmentationModelConfig = field(default_factory=SegmentationModelConfig)
    optim: SegmentationOptimConfig = field(default_factory=SegmentationOptimConfig)


@dataclass(kw_only=True)
class DetectionRun(TaskRunConfig):
    """Everything that decides a run of object detection; dumped into its folder.

    Attributes:
        data: Images, labels of objects and tiles.
        model: Backbone, neck and head.
        optim: Optimizer and schedule.
    """

    data: DetectionDataConfig
    task: str = "detection"
    model: DetectionModelConfig = field(default_factory=DetectionModelConfig)
    optim: DetectionOptimConfig = field(default_factory=DetectionOptimConfig)


@dataclass(kw_only=True)
class ClassificationRun(TaskRunConfig):
    """Everything that decides a run of image classification; dumped into its folder.

    Attributes:
        data: Images, their classes and tiles.
        model: Backbone and pooling.
        optim: Loss, optimizer and schedule.
    """

    data: ClassificationDataConfig
    task: str = "classification"
    model: ClassificationModelConfig = field(default_factory=ClassificationModelConfig)
    optim: ClassificationOptimConfig = field(default_factory=ClassificationOptimConfig)


@dataclass(kw_only=True)
class RegressionRun(TaskRunConfig):
    """Everything that decides a run that learns to predict targets from images; dumped into its folder.

    Attributes:
        data: Images, their targets and tiles.
        model: Backbone and pooling.
        optim: Optimizer and schedule.
    """

    data: RegressionDataConfig
    task: str = "regression"
    model: ClassificationModelConfig = field(default_factory=ClassificationModelConfig)
    optim: ClassificationOptimConfig = field(default_factory=ClassificationOptimConfig)


@dataclass(kw_only=True)
class SlideClassificationRun(TaskRunConfig):
    """Everything that decides a run of slide classification; dumped into its folder.

    Attributes:
        data: Slides, their classes and windows.
        model: Encoder and attention.
        optim: Loss, optimizer and schedule.
    """

    data: SlideClassificationDataConfig
    task: str = "slide_classification"
    model: SlideClassificationModelConfig = field(default_factory=SlideClassificationModelConfig)
    optim: ClassificationOptimConfig = field(default_factory=ClassificationOptimConfig)
    # A bag of features is nothing to draw.
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(num_pictures=0))


@dataclass(kw_only=True)
class DistillationModelConfig:
    """A softmax model and how its copy is made linear.

    Attributes:
        backbone: Name of the timm model.
        weights: Weights file, .safetensors or .pth, with the names of timm or of the model's authors; None for
            timm's own.
        backbone_kwargs: Arguments of `timm.create_model`.
        mixer: Mixer of the student, as `perf_vit.linearize` takes it.
        options: Options of the mixer; of "clustered": window_size, num_sinks, num_clusters, max_exact_tokens (0 by
            default).
        student: Folder of a converted or distilled model to start from, instead of `mixer` and `options`.
    """

    backbone: str
    weights: str | None = None
    backbone_kwargs: dict[str, Any] = field(default_factory=dict)
    mixer: str = "clustered"
    options: dict[str, Any] = field(default_factory=dict)
    student: str | None = None


@dataclass(kw_only=True)
class DistillationRun(RunConfig):
    """Everything that decides a distillation; dumped into its folder.

    Attributes:
        model: Teacher and student.
        data: Images to take tiles of.
        optim: Stages and schedule.
        trainer: Hardware and validation interval.
    """

    model: DistillationModelConfig
    data: DistillationDataConfig
    task: str = "distillation"
    optim: DistillationOptimConfig = field(default_factory=DistillationOptimConfig)
    trainer: DistillationTrainerConfig = field(default_factory=DistillationTrainerConfig)
