"""What the command-line tests share."""

from pathlib import Path

import pytest

from perf_vit.cli.main import run
from perf_vit.data import ShipScene

SMALL = [
    "data.tile_px=64",
    "data.tiles_per_epoch=8",
    "data.batch_size=4",
    "model.backbone_kwargs={depth: 2, attn_kwargs: {num_features: 32}}",
    "model.out_indices=[0,1]",
    "model.head_kwargs={channels: [8, 8, 16, 16]}",
    "trainer.max_epochs=2",
]


def train_args(scene: ShipScene, out: Path, *extra: str) -> list[str]:
    """The command line that trains the smallest model on a scene."""
    files = [f"data.{part}.{key}={getattr(scene, key)}" for part in ("train", "val") for key in ("image", "labels")]
    return ["train", "configs/segmentation/demo.yaml", *files, f"out={out}", *SMALL, *extra]


def call(args: list[str]) -> int:
    """Run the real entry point; its exit code."""
    with pytest.raises(SystemExit) as exit_:
        run([str(arg) for arg in args])
    return exit_.value.code or 0
