import math

import torch

from perf_vit.metrics import class_scores, segmentation_metrics
from perf_vit.types import IGNORE_INDEX


def test_scores_equal_a_count_by_hand() -> None:
    labels = torch.tensor([[0, 0, 1, 1, 1, IGNORE_INDEX]])
    predicted = torch.tensor([[0, 1, 1, 1, 0, 1]])
    metrics = segmentation_metrics(3)
    metrics.update(predicted, labels)
    background, building, absent = class_scores(metrics, ["background", "building", "absent"])
    assert math.isclose(background.iou, 1 / 3, rel_tol=1e-6)
    assert building.iou == 0.5
    assert math.isclose(building.f1, 2 / 3, rel_tol=1e-6)
    assert math.isclose(building.precision, 2 / 3, rel_tol=1e-6)
    assert math.isclose(building.recall, 2 / 3, rel_tol=1e-6)
    assert (background.num_pixels, building.num_pixels, absent.num_pixels) == (2, 3, 0)
    assert math.isnan(absent.iou)
    assert absent.to_dict()["iou"] is None


def test_updates_in_parts_equal_one_update() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (2, 33, 17), generator=generator)
    predicted = torch.randint(0, 4, (2, 33, 17), generator=generator)
    whole, parts = segmentation_metrics(4), segmentation_metrics(4)
    whole.update(predicted, labels)
    for rows in (slice(0, 1), slice(1, 20), slice(20, 33)):
        parts.update(predicted[:, rows], labels[:, rows])
    assert class_scores(whole, "abcd") == class_scores(parts, "abcd")
