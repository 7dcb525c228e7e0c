"""Trains small networks of several tasks in one process or in two; run as a script, since processes start it again.

`python several_processes.py FOLDER DEVICES STRATEGY NUM_VAL CASE...` leaves FOLDER/CASE.json: the scores of a
validation before training, the losses of the steps, and the scores of the validation after them.
"""

import json
import sys
from pathlib import Path

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from perf_vit.data import collate_objects
from perf_vit.data.bags import collate_bags
from perf_vit.data.base import EpochDataModule, EpochLoader, ShareSampler
from perf_vit.data.slide_windows import collate_windows
from perf_vit.models import (
    ClassificationModelConfig,
    ClassificationSpec,
    DetectionModelConfig,
    DetectionSpec,
    SegmentationModelConfig,
    SegmentationSpec,
    SlideClassificationModelConfig,
    SlideClassificationSpec,
)
from perf_vit.tasks import (
    ClassificationOptimConfig,
    ClassificationTask,
    DetectionOptimConfig,
    DetectionTask,
    LossConfig,
    SegmentationOptimConfig,
    SegmentationTask,
    SlideClassificationTask,
    ThroughEncoderTask,
    TrainerConfig,
    build_trainer,
)
from perf_vit.transforms import Normalizer
from perf_vit.types import IGNORE_INDEX, ObjectLabels

SIZE = 32
STEPS, GLOBAL_BATCH = 20, 4
BACKBONE = {
    "backbone": "performer_vit_tiny_patch16_224",
    "backbone_kwargs": {"depth": 2, "embed_dim": 32, "num_heads": 2, "attn_kwargs": {"num_features": 16}},
}
SPEC = {"normalizer": Normalizer((0.0,) * 3, (1.0,) * 3), "tile_px": SIZE}
MONITORS = {
    "fcos": "val/ap50",
    "oriented_fcos": "val/ap50",
    "slides": "val/log_likelihood",
    "through": "val/log_likelihood",
    "classification": "val/f1",
    "regression": "val/r2",
}


class Items(Dataset):
    """Samples that are functions of their index."""

    def __init__(self, make, length: int, start: int = 0) -> None:
        self.make, self.length, self.start = make, length, start

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int):
        return self.make(np.random.default_rng(self.start + index))


class Module(EpochDataModule):
    """One epoch of steps, and some samples to validate on."""

    def __init__(self, make, collate, batch_size: int, num_val: int) -> None:
        super().__init__()
        self.items = [Items(make, STEPS * GLOBAL_BATCH), Items(make, num_val, start=10_000)]
        self.collate, self.batch_size = collate, batch_size

    def train_dataloader(self):
        options = {"batch_size": self.batch_size, "num_workers": 0, "collate_fn": self.collate}
        return self.train_loader(EpochLoader(self.items[0], **options))

    def val_dataloader(self):
        val = self.items[1]
        return DataLoader(val, batch_size=2, sampler=ShareSampler(len(val)), collate_fn=self.collate)


class Losses(lightning.Callback):
    """The mean over all processes of the loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean").item())


def image(rng) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=(3, SIZE, SIZE)).astype(np.float32))


def classified(rng):
    return image(rng), torch.tensor(int(rng.integers(3)))


def numbered(rng):
    return image(rng), torch.tensor([2 + 3 * float(rng.normal())])


def bag(rng):
    return torch.from_numpy(rng.normal(size=(int(rng.integers(2, 9)), 32)).astype(np.float32)), torch.tensor(
        int(rng.integers(2))
    )


def labels(rng, num_classes: int) -> torch.Tensor:
    """Of few pixels of a tile, of most of them, or of none."""
    values = rng.integers(0, num_classes, (SIZE, SIZE))
    values[rng.random((SIZE, SIZE)) < rng.choice([0.1, 0.9, 1.0])] = IGNORE_INDEX
    return torch.from_numpy(values)


def painted(rng):
    return image(rng), labels(rng, 3)


def painted_twice(rng):
    return image(rng), torch.stack([labels(rng, 2), labels(rng, 2)])


def with_objects(rng):
    """Up to twelve objects, or none."""
    number = int(rng.choice([0, 1, 12]))
    corners, sides = rng.uniform(0, SIZE - 12, (number, 2)), rng.uniform(4, 12, (number, 2))
    oriented = np.concatenate([corners + sides / 2, sides, rng.uniform(-1.5, 1.5, (number, 1))], 1)
    tile, valid = image(rng), torch.ones(SIZE, SIZE, dtype=torch.bool)
    objects = ObjectLabels(
        labels=rng.integers(0, 2, number),
        boxes_xyxy=np.concatenate([corners, corners + sides], 1).astype(np.float32),
        oriented_boxes=oriented.astype(np.float32),
        ignored=rng.random(number) < 0.1,
    )
    return tile, objects, valid


def classification() -> tuple:
    spec = ClassificationSpec(kind="single_label", classes=("a", "b", "c"), **SPEC)
    return (
        ClassificationTask(
            ClassificationModelConfig(**BACKBONE), spec, ClassificationOptimConfig(class_weights=[1.0, 2.0, 3.0])
        ),
        classified,
        None,
    )


def regression() -> tuple:
    spec = ClassificationSpec(kind="regression", classes=("a",), target_mean=(2.0,), target_std=(3.0,), **SPEC)
    config = ClassificationModelConfig(backbone="resnet10t", freeze_backbone=True)
    return ClassificationTask(config, spec, ClassificationOptimConfig()), numbered, None


def slides() -> tuple:
    spec = SlideClassificationSpec(classes=("a", "b"), **SPEC)
    config = SlideClassificationModelConfig(**BACKBONE, hidden_dim=16, attention_dim=8, drop_rate=0.0)
    return SlideClassificationTask(config, spec, ClassificationOptimConfig()), bag, collate_bags


class Windows:
    """Windows of a slide that are there already."""

    path = "slide"

    def __init__(self, pixels: torch.Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def batches(self, batch_size: int):
        for part in self.pixels.split(batch_size):
            yield part, None


def windows(rng):
    pixels = rng.normal(size=(int(rng.integers(2, 9)), 3, SIZE, SIZE)).astype(np.float32)
    return Windows(torch.from_numpy(pixels)), torch.tensor(int(rng.integers(2)))


def through() -> tuple:
    """Slides, with a trained encoder."""
    spec = SlideClassificationSpec(classes=("a", "b"), **SPEC)
    config = SlideClassificationModelConfig(
        **BACKBONE, hidden_dim=16, attention_dim=8, drop_rate=0.0, through_encoder=True
    )
    task = ThroughEncoderTask(config, spec, ClassificationOptimConfig(), batch_size=3)
    return task, windows, collate_windows


def segmentation() -> tuple:
    config = SegmentationModelConfig(**BACKBONE, out_indices=[0, 1], head_kwargs={"norm": "group"})
    spec = SegmentationSpec(classes=("a", "b", "c"), **SPEC)
    optim = SegmentationOptimConfig(loss=LossConfig(ce=1.0, dice=1.0, focal=0.5), class_weights=[1.0, 2.0, 3.0])
    return SegmentationTask(config, spec, optim), painted, None


def multilabel() -> tuple:
    config = SegmentationModelConfig(**BACKBONE, out_indices=[0, 1], head="linear")
    spec = SegmentationSpec(classes=("a", "b"), multilabel=True, **SPEC)
    return SegmentationTask(config, spec, SegmentationOptimConfig(loss=LossConfig(dice=1.0))), painted_twice, None


def fcos() -> tuple:
    return _detector(head="fcos"), with_objects, collate_objects


def oriented_fcos() -> tuple:
    return _detector(head="oriented_fcos"), with_objects, collate_objects


def _detector(head: str) -> DetectionTask:
    config = DetectionModelConfig(
        **BACKBONE,
        out_indices=[1],
        strides=[8],
        channels=64,
        head=head,
        head_kwargs={"num_convs": 1, "score_threshold": 0.0},
    )
    return DetectionTask(config, DetectionSpec(classes=("a", "b"), **SPEC), DetectionOptimConfig())


POOLED = {"classification": classification, "regression": regression, "slides": slides, "through": through}
DENSE = {"segmentation": segmentation, "multilabel": multilabel, "fcos": fcos, "oriented_fcos": oriented_fcos}
CASES = {**POOLED, **DENSE}


def run(case: str, folder: Path, devices: int, strategy: str, num_val: int) -> None:
    config = TrainerConfig(accelerator="cpu", devices=str(devices), strategy=strategy, max_epochs=1)

    def prepared(name: str) -> tuple:
        torch.manual_seed(0)
        task, make, collate = CASES[case]()
        trainer = build_trainer(config, folder / name, progress=False, monitor=MONITORS.get(case, "val/iou"))
        return trainer, task, Module(make, collate, GLOBAL_BATCH // devices, num_val)

    # Metrics that counted under Lightning's inference mode can't count in a fit.
    trainer, task, data = prepared(f"{case}_before")
    (before,) = trainer.validate(task, data, verbose=False)
    losses = Losses()
    trainer, task, data = prepared(case)
    trainer.callbacks.append(losses)
    trainer.fit(task, data)
    if trainer.is_global_zero:
        scores = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        (folder / f"{case}.json").write_text(json.dumps({"before": before, "losses": losses.values, "scores": scores}))


def main(folder: str, devices: str, strategy: str, num_val: str, *cases: str) -> None:
    torch.set_num_threads(1)
    for case in cases:
        run(case, Path(folder), int(devices), strategy, int(num_val))


if __name__ == "__main__":
    main(*sys.argv[1:])
