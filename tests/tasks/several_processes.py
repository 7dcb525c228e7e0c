"""Trains small networks of several tasks in one process or in two; run as a script, since processes start it again.

`python several_processes.py FOLDER DEVICES STRATEGY NUM_VAL CASE...` leaves FOLDER/CASE.json: the losses of the steps
and the scores of the validation.
"""

import json
import sys
from pathlib import Path

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from perf_vit.data import collate_bags
from perf_vit.data.epochs import EpochDataModule, ShareSampler
from perf_vit.models import (
    ClassifierConfig,
    ClassifierSpec,
    SlideModelConfig,
    SlideSpec,
)
from perf_vit.tasks import (
    PooledOptimConfig,
    SceneTask,
    SlideTask,
    TrainerConfig,
    build_trainer,
)
from perf_vit.transforms import Normalizer

SIZE = 32
STEPS, GLOBAL_BATCH = 20, 4
BACKBONE = {
    "backbone": "performer_vit_tiny_patch16_224",
    "backbone_kwargs": {"depth": 2, "embed_dim": 32, "num_heads": 2, "attn_kwargs": {"num_features": 16}},
}
SPEC = {"normalizer": Normalizer((0.0,) * 3, (1.0,) * 3), "tile_px": SIZE}
MONITORS = {"slides": "val/log_likelihood", "classification": "val/f1", "regression": "val/r2"}


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
        return self.train_loader(self.items[0], **options)

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


def classification() -> tuple:
    spec = ClassifierSpec(kind="single_label", outputs=("a", "b", "c"), **SPEC)
    return (
        SceneTask(ClassifierConfig(**BACKBONE), spec, PooledOptimConfig(class_weights=[1.0, 2.0, 3.0])),
        classified,
        None,
    )


def regression() -> tuple:
    spec = ClassifierSpec(kind="regression", outputs=("a",), target_mean=(2.0,), target_std=(3.0,), **SPEC)
    config = ClassifierConfig(backbone="resnet10t", freeze_backbone=True)
    return SceneTask(config, spec, PooledOptimConfig()), numbered, None


def slides() -> tuple:
    spec = SlideSpec(classes=("a", "b"), **SPEC)
    config = SlideModelConfig(**BACKBONE, hidden_dim=16, attention_dim=8, drop_rate=0.0)
    return SlideTask(config, spec, PooledOptimConfig()), bag, collate_bags


CASES = {"classification": classification, "regression": regression, "slides": slides}


def run(case: str, folder: Path, devices: int, strategy: str, num_val: int) -> None:
    torch.manual_seed(0)
    task, make, collate = CASES[case]()
    config = TrainerConfig(accelerator="cpu", devices=str(devices), strategy=strategy, max_epochs=1)
    losses = Losses()
    trainer = build_trainer(config, folder / case, progress=False, monitor=MONITORS.get(case, "val/iou"))
    trainer.callbacks.append(losses)
    trainer.fit(task, Module(make, collate, GLOBAL_BATCH // devices, num_val))
    if trainer.is_global_zero:
        scores = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        (folder / f"{case}.json").write_text(json.dumps({"losses": losses.values, "scores": scores}))


def main(folder: str, devices: str, strategy: str, num_val: str, *cases: str) -> None:
    torch.set_num_threads(1)
    for case in cases:
        run(case, Path(folder), int(devices), strategy, int(num_val))


if __name__ == "__main__":
    main(*sys.argv[1:])
