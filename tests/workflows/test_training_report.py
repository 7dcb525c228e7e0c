"""The report of a training run, in which no run hangs or fails."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from pages import parsed

import perf_vit
from perf_vit.data.synthetic import make_ship_scene
from perf_vit.errors import DataWarning, OutputError
from perf_vit.workflows.reports import training
from perf_vit.workflows.train import Run

# A second run goes on in the same processes.
SCRIPT = """
import json, sys
import torch
import perf_vit

torch.set_num_threads(1)
for name in ("first", "second"):
    perf_vit.train("segmentation/demo", json.loads(sys.argv[1]), out=f"{sys.argv[2]}/{name}", progress=False)
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict:
    """Overrides of a small run on a CPU."""
    scene = make_ship_scene(tmp_path_factory.mktemp("scene"), seed=0, size_px=192, num_targets=10)
    return {
        **{f"data.{part}.{key}": str(getattr(scene, key)) for part in ("train", "val") for key in ("image", "labels")},
        "data.tile_px": 64,
        "data.tiles_per_epoch": 4,
        "data.batch_size": 2,
        "model.backbone_kwargs": {"depth": 2, "attn_kwargs": {"num_features": 32}},
        "model.out_indices": [0, 1],
        "model.head_kwargs": {"channels": [8, 8, 16, 16]},
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": 1,
        "trainer.num_pictures": 0,
    }


def trained(overrides: dict, folder: Path) -> tuple[Path, list[str]]:
    """The folder of a run, and what it warned of, but for the scene that it trains and validates on."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        run = perf_vit.train("segmentation/demo", overrides, out=folder, progress=False)
    warned = [str(each.message) for each in caught if issubclass(each.category, DataWarning)]
    return run.folder, [each for each in warned if "is also in data.train" not in each]


@pytest.mark.slow
def test_several_processes_leave_a_report(small, tmp_path) -> None:
    overrides = {**small, "trainer.devices": 2, "trainer.strategy": "ddp"}
    # `-c` would not be found again by the second process.
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), json.dumps(overrides), str(tmp_path)]
    # What waits for another process waits for ever.
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("first", "second"):
        found = parsed(tmp_path / name / "report.html")
        assert {"Curves", "Scores", "Worst", "Settings"} <= set(found.headings)
        assert "Best model on" in found.text


def test_tiles_of_the_report_are_scored_on_the_device_of_the_training(small, tmp_path, monkeypatch) -> None:
    devices = []
    real = training.move_to_device
    monkeypatch.setattr(training, "move_to_device", lambda model, name: devices.append(name) or real(model, name))
    folder, _ = trained(small, tmp_path / "run")
    Run(folder).report(tmp_path / "again.html")
    assert devices == ["cpu", "cpu"]


def test_a_run_without_a_best_checkpoint_has_a_report_without_scores(small, tmp_path) -> None:
    folder, warned = trained({**small, "trainer.report": False}, tmp_path / "run")
    (folder / "checkpoints" / "best.ckpt").unlink()
    Run(folder).report()
    Run(folder).report()
    (tmp_path / "notes.html").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.html exists already"):
        Run(folder).report(tmp_path / "notes.html")
    assert (tmp_path / "notes.html").read_text() == "mine"
    headings = parsed(folder / "report.html").headings
    assert {"Curves", "Settings"} <= set(headings)
    assert "Scores" not in headings
    assert warned == []


def test_a_run_whose_report_fails_is_a_finished_run(small, tmp_path, monkeypatch) -> None:
    def fail(*args) -> None:
        raise RuntimeError("CUDA error: out of memory\nCompile with more")

    monkeypatch.setattr(training, "_validated", fail)
    folder, warned = trained(small, tmp_path / "run")
    assert warned == [f"{folder} is trained but has no report: CUDA error: out of memory"]
    assert (folder / "checkpoints" / "best.ckpt").is_file()
    assert not (folder / "report.html").exists()
