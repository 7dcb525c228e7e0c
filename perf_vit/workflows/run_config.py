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
        out: run folder.
        task: name of the task.
        seed: seed of weights, tiles, augmentation, and of the choice of validation data where `data.val` is left out.
        resume: continue from the run folder's last checkpoint.
    """

    out: str
    task: str
    seed: int = 0
    resume: bool = False


@dataclass(kw_only=True)
class TaskRunConfig(RunConfig):
    """What every run of `perf-vit train` has.

    Attributes:
        trainer: how long and where.
    """

    trainer: TrainerConfig = field(default_factory=TrainerConfig)


@dataclass(kw_only=True)
class SegmentationRun(TaskRunConfig):
    """Everything that decides a segmentation run; dumped into its folder.

    Attributes:
        data: rasters, labels and tiles.
        model: backbone and head.
        optim: loss, optimizer and schedule.
    """

    data: SegmentationDataConfig
    task: str = "segmentation"
    model: SegmentationModelConfig = field(default_factory=SegmentationModelConfig)
    optim: SegmentationOptimConfig = field(default_factory=SegmentationOptimConfig)


@dataclass(kw_only=True)
class DetectionRun(TaskRunConfig):
    """Everything that decides a run of object detection; dumped into its folder.

    Attributes:
        data: images, labels of objects and tiles.
        model: backbone, neck and head.
        optim: optimizer and schedule.
    """

    data: DetectionDataConfig
    task: str = "detection"
    model: DetectionModelConfig = field(default_factory=DetectionModelConfig)
    optim: DetectionOptimConfig = field(default_factory=DetectionOptimConfig)


@dataclass(kw_only=True)
class ClassificationRun(TaskRunConfig):
    """Everything that decides a run of image classification; dumped into its folder.

    Attributes:
        data: images, their classes and tiles.
        model: backbone and pooling.
        optim: loss, optimizer and schedule.
    """

    data: ClassificationDataConfig
    task: str = "classification"
    model: ClassificationModelConfig = field(default_factory=ClassificationModelConfig)
    optim: ClassificationOptimConfig = field(default_factory=ClassificationOptimConfig)


@dataclass(kw_only=True)
class RegressionRun(TaskRunConfig):
    """Everything that decides a run that learns to predict targets from images; dumped into its folder.

    Attributes:
        data: images, their targets and tiles.
        model: backbone and pooling.
        optim: optimizer and schedule.
    """

    data: RegressionDataConfig
    task: str = "regression"
    model: ClassificationModelConfig = field(default_factory=ClassificationModelConfig)
    optim: ClassificationOptimConfig = field(default_factory=ClassificationOptimConfig)


@dataclass(kw_only=True)
class SlideClassificationRun(TaskRunConfig):
    """Everything that decides a run of slide classification; dumped into its folder.

    Attributes:
        data: slides, their classes and windows.
        model: encoder and attention.
        optim: loss, optimizer and schedule.
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
        backbone: timm's name of the model.
        weights: its weights, .safetensors or .pth, as timm or the model's authors name them; timm's own if left out.
        backbone_kwargs: passed to `timm.create_model`.
        mixer: mixer of the student, as `perf_vit.linearize` takes it.
        options: of the mixer; of "clustered": window_size, num_sinks, num_clusters, max_exact_tokens (0 by default).
        student: folder of a converted or distilled model to start from, instead of `mixer` and `options`.
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
        model: teacher and student.
        data: images to take tiles of.
        optim: stages and schedule.
        trainer: where to train and how often to validate.
    """

    model: DistillationModelConfig
    data: DistillationDataConfig
    task: str = "distillation"
    optim: DistillationOptimConfig = field(default_factory=DistillationOptimConfig)
    trainer: DistillationTrainerConfig = field(default_factory=DistillationTrainerConfig)
