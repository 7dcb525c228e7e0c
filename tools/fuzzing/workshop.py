"""What the fuzzed commands need besides the damaged file: images, labels, configs and the smallest trained models."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import yaml
from fuzzing.images import write_images, write_raster
from fuzzing.labels import write_labels
from PIL import Image

import perf_vit
from perf_vit.cli.main import run

__all__ = ["SHORT", "TASKS", "Workshop", "build_workshop", "save_checkpoint_seeds", "train_checkpoint"]

TASKS = ("segmentation", "detection", "classification", "slide_classification")

SHORT = ["trainer.max_epochs=1", "trainer.accelerator=cpu", "trainer.num_pictures=0", "data.num_workers=0"]
"""Overrides that keep an accepted config from training for hours."""

_BACKBONE = "performer_vit_tiny_patch16_224"
_BACKBONE_KWARGS = {"depth": 1, "embed_dim": 32, "num_heads": 2, "attn_kwargs": {"num_features": 16}}
_CONVERTED = "vit_tiny_patch16_224"
_CLUSTERS = {"max_exact_tokens": 0, "window_size": 2, "num_sinks": 2, "num_clusters": 4}


@dataclass(frozen=True, slots=True)
class Workshop:
    """The folder that everything undamaged lies in.

    Attributes:
        folder: its path.
    """

    folder: Path

    @property
    def image(self) -> Path:
        """A raster of three bands of uint8, 48 x 64 px."""
        return self.images / "a.tif"

    @property
    def images(self) -> Path:
        """Folder of `a.tif` and `b.tif`."""
        return self.folder / "images"

    @property
    def seeds(self) -> Path:
        """One sub-folder of valid files for each kind."""
        return self.folder / "seeds"

    @property
    def slide(self) -> Path:
        """A whole slide of 128 x 160 px."""
        return self.seeds / "slide" / "aperio.svs"

    @property
    def converted(self) -> Path:
        """Folder of a converted model."""
        return self.folder / "converted"

    def config(self, task: str) -> Path:
        """A complete config of a task, without `out`; of `converted_TASK`, with the converted model's folder."""
        return self.folder / "configs" / f"{task}.yaml"

    def checkpoint(self, task: str) -> Path:
        """A checkpoint of a task."""
        return self.folder / "runs" / task / "checkpoints" / "last.ckpt"


def build_workshop(shop: Workshop, seed: int) -> None:
    """Write images, labels, configs and the converted model; the seed decides them."""
    rng = np.random.default_rng(seed)
    for name in ("a", "b"):
        write_raster(shop.images / f"{name}.tif", rng.integers(1, 255, (3, 48, 64), np.uint8), nodata=0)
    mask = np.zeros((1, 48, 64), np.uint8)
    mask[:, 10:30, 10:40] = 1
    write_raster(shop.folder / "mask.tif", mask)
    Image.fromarray(mask[0]).save(shop.folder / "mask.png")
    write_images(shop.seeds, rng)
    write_labels(shop.seeds, shop.images)
    _write_classes(shop, rng)
    (shop.folder / "configs").mkdir()
    (shop.seeds / "yaml").mkdir()
    for task in TASKS:
        text = yaml.safe_dump(_config(task, shop), sort_keys=False)
        for path in (shop.config(task), shop.seeds / "yaml" / f"{task}.yaml"):
            path.write_text(text)
        config = _config(task, shop)
        config["model"] = {**config["model"], "backbone": str(shop.converted), "backbone_kwargs": {}}
        shop.config(f"converted_{task}").write_text(yaml.safe_dump(config))
    model = timm.create_model(_CONVERTED, img_size=32, depth=1, embed_dim=32, num_heads=2, num_classes=0)
    perf_vit.save_converted(perf_vit.linearize(model, **_CLUSTERS), shop.converted)


def train_checkpoint(shop: Workshop, task: str) -> None:
    """Train a task for one epoch."""
    run(["train", str(shop.config(task)), f"out={shop.folder / 'runs' / task}", *SHORT])


def save_checkpoint_seeds(shop: Workshop) -> None:
    """Add what was trained and converted to the seeds."""
    (shop.seeds / "checkpoint").mkdir()
    for task in TASKS:
        shutil.copy(shop.checkpoint(task), shop.seeds / "checkpoint" / f"{task}.ckpt")
    shutil.copytree(shop.converted, shop.seeds / "model folder")
    (shop.seeds / "model folder" / "fidelity.html").unlink(missing_ok=True)


def _write_classes(shop: Workshop, rng: np.random.Generator) -> None:
    """Four images of two classes, in folders by class, and the CSV file of two slides."""
    for name in ("car", "ship"):
        for number in range(2):
            pixels = rng.integers(1, 255, (3, 40, 50), np.uint8)
            write_raster(shop.folder / "classes" / name / f"{number}.tif", pixels)
    slides = shop.folder / "slides"
    slides.mkdir()
    for name in ("one", "two", "three", "four"):
        shutil.copy(shop.slide, slides / f"{name}.svs")
    rows = "one.svs,car\ntwo.svs,ship\nthree.svs,car\nfour.svs,ship\n"
    (slides / "slides.csv").write_text("slide,label\n" + rows)


def _config(task: str, shop: Workshop) -> dict[str, Any]:
    backbone = {"backbone": _BACKBONE, "backbone_kwargs": _BACKBONE_KWARGS}
    labelled = {"image": str(shop.image), "labels": str(shop.folder / "mask.tif")}
    objects = {"image": str(shop.images), "labels": str(shop.seeds / "coco" / "boxes.json"), "label_format": "coco"}
    small = {"tile_px": 32, "batch_size": 1}
    data: dict[str, dict[str, object]] = {
        "segmentation": {
            "train": labelled,
            "val": labelled,
            "classes": ["land", "ship"],
            "background": "land",
            "tiles_per_epoch": 2,
        },
        "detection": {"train": objects, "classes": ["ship", "car"], "tiles_per_epoch": 2, "val_share": 0.5},
        "classification": {"train": {"image": str(shop.folder / "classes")}, "val_share": 0.5},
        "slide_classification": {
            "train": {"image": str(shop.folder / "slides"), "labels": str(shop.folder / "slides" / "slides.csv")},
            "mpp": 0.5,
            "min_tissue": 0.0,
            "max_windows": 4,
            "val_share": 0.5,
        },
    }
    model: dict[str, dict[str, object]] = {
        "segmentation": {**backbone, "out_indices": [0], "head_kwargs": {"channels": [4, 4, 8, 8]}},
        "detection": {
            **backbone,
            "out_indices": [0],
            "strides": [8, 16],
            "channels": 64,
            "head_kwargs": {"num_convs": 1},
        },
        "classification": {**backbone, "pool": "avg"},
        "slide_classification": {**backbone, "pool": "avg", "hidden_dim": 8, "attention_dim": 8},
    }
    return {
        "task": task,
        "seed": 1,
        "data": {**data[task], **small},
        "model": model[task],
        "optim": {"lr": 0.001},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": "1", "num_pictures": 0},
    }
