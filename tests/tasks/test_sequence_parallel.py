"""`trainer.sequence_parallel`: processes that share each tile train as one process."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import train_args

import perf_vit
from perf_vit.data import make_ship_scene
from perf_vit.data.synthetic import ShipScene
from perf_vit.errors import ConfigError

ROOT, DEMO = Path(__file__).parents[2], "configs/segmentation/demo.yaml"
HEAD = "model.head_kwargs={channels: [8, 8, 16, 16], norm: group}"
LAYERS_DROPPED = "model.backbone_kwargs={depth: 2, drop_path_rate: 0.3, attn_kwargs: {num_features: 32}}"
OPTIONS = [HEAD, LAYERS_DROPPED, "data.tile_px=160", "data.batch_size=2", "optim.loss={ce: 1, dice: 1}"]
# Rectifiers turn the rounding of float32 into steps, which grow from batch to batch.
OPTIONS += [
    "trainer.precision=64",
    "trainer.accelerator=cpu",
    "model.grad_checkpointing=true",
    "trainer.num_pictures=0",
]


def run(command: list[str], *args: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *args], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]


def rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_runs_of_torchrun_and_of_two_devices_equal_one_process(tmp_path: Path) -> None:
    scene = make_ship_scene(tmp_path / "scene", seed=1, size_px=256, num_targets=20)
    alone = [sys.executable, "-m", "perf_vit"]
    started = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "perf_vit"]
    together = "trainer.sequence_parallel=true"
    run(alone, *train_args(scene, tmp_path / "one", *OPTIONS, "trainer.devices=1"))
    run(started, *train_args(scene, tmp_path / "torchrun", *OPTIONS, together, "trainer.devices=auto"))
    run(alone, *train_args(scene, tmp_path / "devices", *OPTIONS, together, "trainer.devices=2"))
    one = rows(tmp_path / "one")
    assert len(one) == 2
    expected = torch.load(tmp_path / "one" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name in ("torchrun", "devices"):
        for ours, theirs in zip(rows(tmp_path / name), one, strict=True):
            losses = {key for key in theirs if "loss" in key}
            assert {key: ours[key] for key in losses} == pytest.approx({key: theirs[key] for key in losses}, abs=1e-5)
            # Weights that differ in their last digits decide a pixel or two otherwise.
            assert ours == pytest.approx(theirs, abs=1e-3)
        found = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        assert found.keys() == expected.keys()
        # Adam's first steps are signs of gradients, so weights whose gradient is about 0 may differ by twice a step.
        off = torch.cat([(found[key] - expected[key]).abs().flatten() for key in expected])
        assert float(off.quantile(0.99)) < 1e-5


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> ShipScene:
    return make_ship_scene(tmp_path_factory.mktemp("scene"), seed=1, size_px=128, num_targets=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["trainer.sequence_parallel=true"], "a multiple of 2, got 1; set trainer.devices=2, or start with torchrun"),
        (["trainer.sequence_parallel=3"], "trainer.devices=3"),
        (["trainer.sequence_parallel=1"], "must be true, false or 2 or more processes, got 1"),
        (["trainer.sequence_parallel=2", "trainer.devices=2", "trainer.strategy=fsdp2"], "needs trainer.strategy=ddp"),
        (["trainer.sequence_parallel=2", "trainer.devices=2", "optim.loss={lovasz: 1}"], "needs optim.loss.lovasz=0"),
        (["trainer.sequence_parallel=2", "trainer.devices=2"], r"batch norm in head\..*head_kwargs={norm: group}"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_the_folder_is_made(
    tmp_path: Path, scene: ShipScene, options: list[str], message: str
) -> None:
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match=message):
        perf_vit.train(ROOT / DEMO, train_args(scene, out, "trainer.accelerator=cpu", *options)[2:], progress=False)
    assert not out.exists()
