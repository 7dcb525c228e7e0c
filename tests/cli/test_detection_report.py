"""What `perf-vit evaluate` tells of a detector."""

import json
import math

import numpy as np
import pytest

from perf_vit.metrics import OrientedAveragePrecision
from perf_vit.types import Detections, ObjectLabels
from perf_vit.workflows.reports import DetectionEvaluation

CLASSES = ("ship", "plane", "harbour")


def turned_boxes(seed: int) -> tuple[Detections, ObjectLabels]:
    """Ships and planes at any angle, one ignored; detections are these moved a little, or nothing at all."""
    rng = np.random.default_rng(seed)
    centers = np.stack(np.meshgrid(np.arange(20, 220, 40), np.arange(20, 140, 40)), -1).reshape(-1, 2)
    boxes = np.column_stack([centers, np.full((15, 2), [24, 10]), rng.uniform(-1.5, 1.5, 15)])
    labels = rng.integers(0, 2, 15)
    moved = boxes + rng.normal(0, 1.5, boxes.shape) * [1, 1, 1, 1, 0.05]
    strays = np.column_stack([rng.uniform(0, 200, (6, 2)), np.full((6, 2), [20, 8]), np.zeros(6)])
    found = Detections(
        oriented_boxes=np.vstack([moved, strays]),
        labels=np.concatenate([labels, rng.integers(0, 2, 6)]),
        scores=rng.permutation(21) / 30 + 0.1,
    )
    truth = ObjectLabels(
        labels=labels,
        boxes_xyxy=np.zeros((15, 4), np.float32),
        ignored=np.arange(15) == 3,
        oriented_boxes=boxes.astype(np.float32),
    )
    return found, truth


def test_oriented_boxes_are_scored_by_the_rules_of_dota_too(tmp_path) -> None:
    report = DetectionEvaluation(CLASSES, "oriented_boxes", score_threshold=0.3, title="ships")
    metric = OrientedAveragePrecision(len(CLASSES))
    for seed in range(3):
        found, truth = turned_boxes(seed)
        report.update(found, truth)
        metric.update([found], [truth])
    expected = metric.compute()
    report.to_json(tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())["dota"]
    assert scores["ap50_voc07"] == pytest.approx(expected["map_50_voc07"].item())
    assert scores["ap50_area"] == pytest.approx(expected["map_50"].item())
    assert scores["classes"]["plane"]["ap50_voc07"] == pytest.approx(expected["map_50_voc07_per_class"][1].item())
    assert scores["classes"]["ship"]["ap50_area"] == pytest.approx(expected["map_50_per_class"][0].item())
    assert scores["classes"]["harbour"] == {"ap50_voc07": None, "ap50_area": None}
    assert math.isfinite(scores["ap50_area"])
    shown = str(report)
    assert "AP50 by DOTA's rules" in shown
    assert f"{scores['ap50_voc07']:.3f}" in shown


def test_other_geometries_have_no_scores_of_dota() -> None:
    assert "dota" not in DetectionEvaluation(CLASSES, "boxes", score_threshold=0.3).to_dict()
