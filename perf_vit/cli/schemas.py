"""The schemas of runs: the schemas of their parts, put together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from perf_vit.data import (
    ClassificationDataConfig,
    CropsConfig,
    DataConfig,
    ObjectDataConfig,
    RegressionDataConfig,
    SlideDataConfig,
)
from perf_vit.models import ClassifierConfig, DetectorConfig, ModelConfig, SlideModelConfig
from perf_vit.tasks import (
    DetectionOptimConfig,
    DistillationConfig,
    DistillationTrainerConfig,
    OptimConfig,
    PooledOptimConfig,
    TrainerConfig,
)

__all__ = [
    "ClassificationRun",
    "DetectionRun",
    "DistillationRun",
    "PairConfig",
    "RegressionRun",
    "SegmentationRun",
    "SlideRun",
]


@dataclass(kw_only=True)
class SegmentationRun:
    """Everything that decides a segmentation run; dumped into its folder.

    Attributes:
        out: the run folder.
        task: segmentation, which is also what a config without it means.
        seed: decides weights, windows and augmentation.
        resume: continue from the run folder's last checkpoint.
        data: rasters, labels and tiles.
        model: backbone and head.
        optim: loss, optimizer and schedule.
        trainer: how long and where.
    """

    out: str
    data: DataConfig
    task: str = "segmentation"
    seed: int = 0
    resume: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


@dataclass(kw_only=True)
class DetectionRun:
    """Everything that decides a run of object detection; dumped into its folder.

    Attributes:
        out: the run folder.
        task: detection.
        seed: decides weights, windows and augmentation.
        resume: continue from the run folder's last checkpoint.
        data: images, labels of objects and tiles.
        model: backbone, neck and head.
        optim: optimizer and schedule.
        trainer: how long and where.
    """

    out: str
    data: ObjectDataConfig
    task: str = "detection"
    seed: int = 0
    resume: bool = False
    model: DetectorConfig = field(default_factory=DetectorConfig)
    optim: DetectionOptimConfig = field(default_factory=DetectionOptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


@dataclass(kw_only=True)
class ClassificationRun:
    """Everything that decides a run of image classification; dumped into its folder.

    Attributes:
        out: the run folder.
        task: classification.
        seed: decides weights, tiles and augmentation.
        resume: continue from the run folder's last checkpoint.
        data: images, their classes and tiles.
        model: backbone and pooling.
        optim: loss, optimizer and schedule.
        trainer: how long and where.
    """

    out: str
    data: ClassificationDataConfig
    task: str = "classification"
    seed: int = 0
    resume: bool = False
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    optim: PooledOptimConfig = field(default_factory=PooledOptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


@dataclass(kw_only=True)
class RegressionRun:
    """Everything that decides a run that learns to estimate numbers from images; dumped into its folder.

    Attributes:
        out: the run folder.
        task: regression.
        seed: decides weights, tiles and augmentation.
        resume: continue from the run folder's last checkpoint.
        data: images, their numbers and tiles.
        model: backbone and pooling.
        optim: optimizer and schedule.
        trainer: how long and where.
    """

    out: str
    data: RegressionDataConfig
    task: str = "regression"
    seed: int = 0
    resume: bool = False
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    optim: PooledOptimConfig = field(default_factory=PooledOptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


@dataclass(kw_only=True)
class SlideRun:
    """Everything that decides a run of slide classification; dumped into its folder.

    Attributes:
        out: the run folder.
        task: slide.
        seed: decides weights, the order of slides and the windows drawn.
        resume: continue from the run folder's last checkpoint.
        data: slides, their classes and windows.
        model: encoder and attention.
        optim: loss, optimizer and schedule.
        trainer: how long and where.
    """

    out: str
    data: SlideDataConfig
    task: str = "slide"
    seed: int = 0
    resume: bool = False
    model: SlideModelConfig = field(default_factory=SlideModelConfig)
    optim: PooledOptimConfig = field(default_factory=PooledOptimConfig)
    # A bag of features is nothing to draw.
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(num_pictures=0))


@dataclass(kw_only=True)
class PairConfig:
    """A softmax model and how its copy is made linear.

    Attributes:
        name: timm's name of the model.
        weights: its weights, .safetensors or .pth, as timm or the model's authors name them; timm's own if left out.
        kwargs: passed to `timm.create_model`.
        attention: of the student, as `perf_vit.performerize` takes it.
        options: of `perf_vit.performerize`, among them window_size, num_sinks, num_clusters and seed.
        student: a folder of `perf-vit convert` or of an earlier distillation to start from, instead of `attention` and
            `options`.
    """

    name: str
    weights: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    attention: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    student: str | None = None


@dataclass(kw_only=True)
class DistillationRun:
    """Everything that decides a distillation; dumped into its folder.

    Attributes:
        out: the run folder.
        model: teacher and student.
        data: images to take crops of.
        seed: decides the crops.
        resume: continue from the run folder's last checkpoint.
        optim: stages and schedule.
        trainer: where to train and how often to validate.
    """

    out: str
    model: PairConfig
    data: CropsConfig
    seed: int = 0
    resume: bool = False
    optim: DistillationConfig = field(default_factory=DistillationConfig)
    trainer: DistillationTrainerConfig = field(default_factory=DistillationTrainerConfig)
