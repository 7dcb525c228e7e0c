"""How much memory training steps take; `main` measures them in a process of their own."""

from __future__ import annotations

import gc
import pickle
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

from perf_vit.models import DetectionModelConfig, DetectionSpec, SegmentationModelConfig, SegmentationSpec
from perf_vit.tasks.detection import DetectionOptimConfig, DetectionTask
from perf_vit.tasks.optimize import TrainingTask
from perf_vit.tasks.segmentation import SegmentationOptimConfig, SegmentationTask
from perf_vit.tasks.trainer import TrainerConfig
from perf_vit.transforms import Normalizer
from perf_vit.types import ObjectLabels

__all__ = ["TrainingSteps", "main", "make_task", "training_peak"]

# The first step makes the optimizer's states, which the second one has beside its activations.
_NUM_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class TrainingSteps:
    """What is trained.

    Attributes:
        model: the network.
        optim: its optimizer and loss; the defaults if None.
        trainer: precision, accelerator, averaged weights.
        num_bands: of a tile.
        classes: names.
        tile_px: side of a tile, in pixels.
        batch_size: tiles a step.
        multilabel: several classes may be true at a pixel.
        objects_per_mpx: labelled objects in a million pixels, for detectors.
    """

    model: SegmentationModelConfig | DetectionModelConfig
    trainer: TrainerConfig
    num_bands: int
    classes: tuple[str, ...]
    optim: SegmentationOptimConfig | DetectionOptimConfig | None = None
    tile_px: int = 224
    batch_size: int = 1
    multilabel: bool = False
    objects_per_mpx: float = 100.0


def make_task(steps: TrainingSteps) -> TrainingTask:
    """The task, with random weights."""
    statistics = Normalizer((0.0,) * steps.num_bands, (1.0,) * steps.num_bands)
    spec: dict[str, Any] = {"classes": steps.classes, "normalizer": statistics, "tile_px": steps.tile_px}
    model: Any = replace(steps.model, pretrained=False)
    optim: Any = steps.optim
    if isinstance(model, DetectionModelConfig):
        return DetectionTask(model, DetectionSpec(**spec), optim or DetectionOptimConfig())
    return SegmentationTask(
        model, SegmentationSpec(**spec, multilabel=steps.multilabel), optim or SegmentationOptimConfig()
    )


def training_peak(steps: TrainingSteps) -> int | None:
    """The most bytes that this process ever held while it trained a little, None if they weren't there.

    On a GPU, what PyTorch reserved there; else resident memory, with all that Python and its packages take.
    """
    config = steps.trainer
    trainer = lightning.Trainer(
        accelerator=config.accelerator,
        devices=1,
        precision=config.precision,
        gradient_clip_val=config.gradient_clip or None,
        callbacks=[EMAWeightAveraging(decay=config.ema_decay)] if config.ema_decay else [],
        max_steps=_NUM_STEPS,
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(make_task(steps), _Batches(steps))
    except (torch.cuda.OutOfMemoryError, MemoryError):
        return None
    except RuntimeError as error:
        if "can't allocate memory" in str(error) or "not enough memory" in str(error):
            return None
        raise
    device = trainer.strategy.root_device
    gc.collect()
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _resident_peak()


class _Batches:
    """As many equal batches as there are steps."""

    def __init__(self, steps: TrainingSteps) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return _NUM_STEPS

    def __iter__(self) -> Any:
        yield from (self._batch() for _ in range(_NUM_STEPS))

    def _batch(self) -> tuple[Tensor | list[Tensor], Any, Tensor | list[Tensor]]:
        steps, size = self.steps, self.steps.tile_px
        images = torch.randn(steps.batch_size, steps.num_bands, size, size)
        # Attention with a mask takes no less memory than without.
        valid = torch.ones(steps.batch_size, size, size, dtype=torch.bool)
        valid[:, :, size // 2 :] = False
        if isinstance(steps.model, DetectionModelConfig):
            with_masks = steps.model.head == "mask_rcnn"
            labels = [_objects(size, steps.objects_per_mpx, with_masks=with_masks) for _ in range(steps.batch_size)]
            return list(images), labels, list(valid)
        num_classes = len(steps.classes)
        if steps.multilabel:
            return images, torch.randint(0, 2, (steps.batch_size, num_classes, size, size)), valid
        return images, torch.randint(0, num_classes, (steps.batch_size, size, size)), valid


def _objects(size: int, per_mpx: float, *, with_masks: bool) -> ObjectLabels:
    number = max(1, round(per_mpx * size**2 / 1e6))
    rng = np.random.default_rng(0)
    side = min(24, size // 2)
    corners = rng.integers(0, size - side, (number, 2))
    masks = None
    if with_masks:
        masks = np.zeros((number, size, size), bool)
        for mask, (x, y) in zip(masks, corners, strict=True):
            mask[y : y + side, x : x + side] = True
    centers = corners + side / 2
    oriented = np.concatenate([centers, np.full((number, 2), side), np.zeros((number, 1))], axis=1)
    return ObjectLabels(
        labels=np.zeros(number, np.int64),
        boxes_xyxy=np.concatenate([corners, corners + side], axis=1).astype(np.float32),
        oriented_boxes=oriented.astype(np.float32),
        ignored=np.zeros(number, bool),
        masks=masks,
    )


def _resident_peak() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        # `ru_maxrss` begins with what the process that started this one held.
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    # Not on every system.
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Measure the pickled steps of stdin, and write the peak into the file that is named on the command line."""
    steps = pickle.load(sys.stdin.buffer)
    Path(sys.argv[1]).write_text(str(training_peak(steps)), encoding="utf-8")
