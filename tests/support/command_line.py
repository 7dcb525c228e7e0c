"""What the command-line tests share."""

from pathlib import Path

import pytest
import torch

from perf_vit.cli.main import run
from perf_vit.data.synthetic import ShipScene
from perf_vit.models import CHECKPOINT_KEY, DetectionModelConfig, DetectionSpec, build_detector, checkpoint_metadata

SMALL = [
    "data.tile_px=64",
    "data.tiles_per_epoch=8",
    "data.batch_size=4",
    "model.backbone_kwargs={depth: 2, attn_kwargs: {num_features: 32}}",
    "model.out_indices=[0,1]",
    "model.head_kwargs={channels: [8, 8, 16, 16]}",
    "trainer.max_epochs=2",
    # It takes longer than the training.
    "trainer.report=false",
]


def train_args(scene: ShipScene, out: Path, *extra: str) -> list[str]:
    """The command line that trains the smallest model on a scene."""
    files = [f"data.{part}.{key}={getattr(scene, key)}" for part in ("train", "val") for key in ("image", "labels")]
    return ["train", "configs/segmentation/demo.yaml", *files, f"out={out}", *SMALL, *extra]


def save_detector(path: Path, spec: DetectionSpec, **changes) -> Path:
    """The checkpoint of an untrained detector, which finds something everywhere."""
    torch.manual_seed(0)
    config = DetectionModelConfig(**{"backbone": "test_resnet", "strides": [8, 16], "channels": 64, **changes})
    model = build_detector(config, spec)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, CHECKPOINT_KEY: checkpoint_metadata(config, model)}, path)
    return path


def call(args: list[str]) -> int:
    """Run the real entry point; its exit code."""
    with pytest.raises(SystemExit) as exit_:
        run([str(arg) for arg in args])
    return exit_.value.code or 0
