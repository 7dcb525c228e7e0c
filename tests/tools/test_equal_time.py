"""tools/benchmarks/equal_time.py: a detector trains as long as it may, and is scored on whole images."""

import importlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "tools" / "benchmarks"
NAMES = {"image": "a.png", "labels": "a.csv"}


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("equal_time")


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    """Overrides of the config of trees: a dark image with a bright crown, and a small network."""
    image = np.full((96, 96, 3), 20, np.uint8)
    image[20:50, 30:60] = 230
    cv2.imwrite(str(tmp_path / "a.png"), image)
    (tmp_path / "a.csv").write_text("image_path,xmin,ymin,xmax,ymax,label\na.png,30,20,60,50,Tree\n")
    parts = [f"data.{part}.{key}={tmp_path / name}" for part in ("train", "val") for key, name in NAMES.items()]
    return [*parts, "data.tile_px=64", "data.batch_size=2", "model.backbone=resnet10t", "trainer.max_epochs=1"]


@pytest.mark.slow
def test_training_takes_the_time_given_and_the_row_holds_time_and_scores(tool, arguments, tmp_path) -> None:
    image, labels, out = tmp_path / "a.png", tmp_path / "a.csv", tmp_path / "run"
    tool.main("detection/trees", out, arguments, 0.03, [image], [labels], None, None)
    row = json.loads((out / "row.json").read_text())
    assert 0.5 < row["train_s"] < 20
    assert row["tiles"] >= 2
    assert 0 <= row["a"]["ap50"] <= 1
    assert row["a"]["test_s"] > 0


def test_without_minutes_only_the_time_of_a_tile_is_printed(tool, arguments, tmp_path, capsys) -> None:
    tool.main("detection/trees", tmp_path / "run", arguments, 0)
    assert float(capsys.readouterr().out.split()[0]) > 0
    assert not (tmp_path / "run").exists()
