"""tools/benchmarks/native_size.py: scenes are held out in turn, and scores are those of their definitions."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torchmetrics.functional.classification import binary_auroc

FOLDER = Path(__file__).parents[2] / "tools" / "benchmarks"
MODEL, NATIVE_PX = "test_vit", 64


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("native_size")


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.manual_seed(0)
    save_file(timm.create_model(MODEL, num_classes=0, img_size=NATIVE_PX).state_dict(), tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors"


def test_scores_are_those_of_their_definitions(tool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, truth = torch.randn(500, generator=generator), torch.rand(500, generator=generator) > 0.6
    best, threshold = tool.best_iou(logits, truth)
    ious = [float(((logits >= x) & truth).sum() / ((logits >= x) | truth).sum()) for x in logits]
    assert best == pytest.approx(max(ious))
    assert float(logits[int(np.argmax(ious))]) == threshold
    assert tool.auc_of(logits, truth) == pytest.approx(binary_auroc(logits, truth.long()).item(), abs=1e-6)


def test_windows_overlap_by_a_share_of_their_side_and_reach_the_edge(tool) -> None:
    assert tool.starts(148, 37, 0.25) == [0, 28, 56, 83, 111]
    assert tool.starts(37, 37, 0.25) == [0]
    assert tool.starts(74, 37, 0.0) == [0, 37]


def test_layers_are_scored_on_the_scene_that_they_were_not_trained_on(tool, weights, make_scene, tmp_path) -> None:
    rng, scenes, labels = np.random.default_rng(0), [], []
    for _ in range(2):
        mask = np.zeros((1, 140, 150), dtype=np.uint8)
        mask[:, 40:90, 30:110] = 1
        scenes.append(make_scene(pixels=rng.integers(1, 200, (3, 140, 150), dtype=np.uint8) + 50 * mask))
        labels.append(make_scene(pixels=mask, nodata=None))
    out, models = tmp_path / "out.jsonl", "softmax,default,none,2.5,2.5/4,interpolated:5"
    common = {"native_px": NATIVE_PX, "model_name": MODEL, "models": models, "size": 128}
    tool.probe(weights, scenes, labels, out, factors="1,2", l2="1", train_patches=50, **common)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 2 * 6 * 2 * 2
    assert {row["held_out"] for row in rows} == {path.stem for path in scenes}
    assert all(0 <= row["iou"] <= row["best_iou"] + 1e-6 <= 1 for row in rows)
    assert all(0 < row["auc"] <= 1 for row in rows)
    tool.blend(weights, scenes[:1], tmp_path / "blend.jsonl", **{**common, "models": "none,2.5"}, overlap=0.25)
    found = [json.loads(line) for line in (tmp_path / "blend.jsonl").read_text().splitlines()]
    assert [row["model"] for row in found] == ["none", "2.5"]
    assert all(-1 <= row["cosine"] <= 1 and row["ratio"] > 0 for row in found)
