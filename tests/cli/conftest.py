"""A small trained run, shared by the command-line tests."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import call, train_args

from perf_vit.data import make_ship_scene
from perf_vit.data.synthetic import ShipScene


@dataclass(frozen=True)
class TrainedRun:
    scene: ShipScene
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> TrainedRun:
    root = tmp_path_factory.mktemp("trained")
    scene = make_ship_scene(root / "scene", seed=0, size_px=192, num_targets=10)
    assert call(train_args(scene, root / "run", "trainer.report=true")) == 0
    return TrainedRun(scene, root / "run")
