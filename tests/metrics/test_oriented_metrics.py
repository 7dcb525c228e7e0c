from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import shapely
import torch

from perf_vit.errors import InputError
from perf_vit.geometry.boxes import oriented_box_corners
from perf_vit.metrics import DetectionMetrics, OrientedAveragePrecision
from perf_vit.metrics import detection as detection_metrics
from perf_vit.types import Detections, ObjectLabels

NUM_CLASSES = 3
THRESHOLDS = (0.5, 0.75, 0.9)


def labels_of(boxes, labels, ignored=None) -> ObjectLabels:
    boxes = np.asarray(boxes, np.float32).reshape(-1, 5)
    ignored = np.zeros(len(boxes), bool) if ignored is None else np.asarray(ignored, bool)
    upright = np.zeros((len(boxes), 4), np.float32)
    return ObjectLabels(labels=np.asarray(labels, np.int64), boxes_xyxy=upright, oriented_boxes=boxes, ignored=ignored)


def detections_of(boxes, labels, scores) -> Detections:
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 5)
    return Detections(oriented_boxes=boxes, labels=torch.as_tensor(labels), scores=torch.as_tensor(scores))


def random_image(rng: np.random.Generator) -> tuple[Detections, ObjectLabels]:
    """Up to six objects, and detections that are objects moved a little, in two copies, or nothing at all."""
    num = int(rng.integers(0, 7))
    boxes = np.column_stack([rng.uniform(0, 40, (num, 2)), rng.uniform(4, 20, (num, 2)), rng.uniform(-1.5, 1.5, num)])
    labels = rng.integers(0, NUM_CLASSES, num)
    noise = rng.normal(0, 1, (2 * num, 5)) * [0.8, 0.8, 0.8, 0.8, 0.08]
    found = np.concatenate([np.concatenate([boxes, boxes]) + noise, rng.uniform(3, 30, (2, 5))])
    found[:, 2:4] = np.abs(found[:, 2:4]) + 0.5
    found_labels = np.concatenate([labels, labels, rng.integers(0, NUM_CLASSES, 2)])
    chosen = rng.random(len(found)) < 0.7
    # Coarse scores have ties.
    scores = rng.integers(1, 30, len(found)) / 30
    detections = detections_of(found[chosen], found_labels[chosen], scores[chosen])
    return detections, labels_of(boxes, labels, rng.random(num) < 0.2)


def reference(images: list[tuple[Detections, ObjectLabels]], index: int, threshold: float, eleven: bool) -> float:
    """One walk over all detections of a class, surest first, as the DOTA paper tells it; polygons by shapely."""
    objects = [
        [
            (shapely.Polygon(corners), hard)
            for corners, label, hard in zip(
                oriented_box_corners(target.oriented_boxes.astype(float)), target.labels, target.ignored, strict=True
            )
            if label == index
        ]
        for _, target in images
    ]
    total = sum(not hard for image in objects for _, hard in image)
    if not total:
        return float("nan")
    found = [
        (-float(score), number, shapely.Polygon(corners))
        for number, (detections, _) in enumerate(images)
        for corners, label, score in zip(
            oriented_box_corners(detections.oriented_boxes.double().numpy()),
            detections.labels,
            detections.scores.float(),
            strict=True,
        )
        if label == index
    ]
    taken, true, false, curve = set(), 0, 0, []
    for _, number, outline in sorted(found, key=lambda entry: entry[0]):
        rivals = [outline.intersection(other).area / outline.union(other).area for other, _ in objects[number]]
        best = int(np.argmax(rivals)) if rivals else -1
        if rivals and rivals[best] > threshold:
            if objects[number][best][1]:
                continue
            if (number, best) in taken:
                false += 1
            else:
                taken.add((number, best))
                true += 1
        else:
            false += 1
        curve.append((true, true / (true + false)))
    if eleven:
        return sum(max((p for t, p in curve if 10 * t >= k * total), default=0) for k in range(11)) / 11
    return sum(max((p for t, p in curve if t >= k), default=0) for k in range(1, total + 1)) / total


def measure(images: list[tuple[Detections, ObjectLabels]], **kwargs) -> dict[str, torch.Tensor]:
    metric = OrientedAveragePrecision(NUM_CLASSES, **kwargs)
    for detections, target in images:
        metric.update([detections], [target])
    return metric.compute()


@pytest.mark.parametrize(
    ("num_images", "num_cases"),
    [(1, 120), (7, 20), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, 850), (7, 150)))],
)
def test_precision_is_that_of_a_walk_over_polygons(num_images, num_cases) -> None:
    rng = np.random.default_rng(num_images)
    for _ in range(num_cases):
        images = [random_image(rng) for _ in range(num_images)]
        got = measure(images, iou_thresholds=THRESHOLDS)
        areas = np.array([[reference(images, k, t, False) for t in THRESHOLDS] for k in range(NUM_CLASSES)])
        points = np.array([reference(images, k, 0.5, True) for k in range(NUM_CLASSES)])
        np.testing.assert_allclose(got["map_50_per_class"], areas[:, 0], atol=1e-6)
        np.testing.assert_allclose(got["map_per_class"], areas.mean(1), atol=1e-6)
        np.testing.assert_allclose(got["map_50_voc07_per_class"], points, atol=1e-6)


def polygon_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    one, other = (shapely.polygons(oriented_box_corners(boxes.double().numpy())) for boxes in (a, b))
    shared = shapely.area(shapely.intersection(one[:, None], other))
    return torch.from_numpy(shared / (shapely.area(one)[:, None] + shapely.area(other) - shared))


def test_the_scores_of_training_are_those_with_the_iou_of_polygons(monkeypatch) -> None:
    classes, polygons, all_scores = tuple("abc"), Mock(side_effect=polygon_iou), []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        images = [random_image(rng) for _ in range(3)]
        scores = []
        for iou in (detection_metrics.oriented_iou_matrix, polygons):
            with monkeypatch.context() as patch:
                patch.setattr(detection_metrics, "oriented_iou_matrix", iou)
                metrics = DetectionMetrics(classes, "oriented_boxes")
                for found, truth in images:
                    metrics.update([found], [truth])
                each = metrics.compute()
                scores.append([each.ap, each.ap50, each.ap75, *(one.ap for one in each.classes)])
        np.testing.assert_allclose(*scores, atol=1e-6)
        all_scores += scores
    assert polygons.call_count > 150
    assert 0.1 < np.nanmean(all_scores) < 0.9


SHIP = [20, 20, 16, 4, 0.5]


def test_a_perfect_detector_scores_one_and_a_silent_one_zero() -> None:
    image = labels_of([SHIP, [50, 40, 10, 5, -0.3]], [0, 2])
    perfect = measure([(detections_of(image.oriented_boxes, image.labels, [0.9, 0.8]), image)])
    silent = measure([(detections_of([], [], []), image)])
    for key in ("map", "map_50", "map_50_voc07"):
        assert perfect[key] == 1
        assert silent[key] == 0
    assert perfect["map_per_class"].isnan().tolist() == [False, True, False]


def test_nothing_seen_is_not_a_number() -> None:
    got = measure([(detections_of([], [], []), labels_of([], []))])
    assert got["map"].isnan()
    assert got["map_50_voc07"].isnan()


def test_the_second_detection_of_an_object_is_false() -> None:
    found = detections_of([[20, 20, 16, 4, 0.5 + np.pi], SHIP, [60, 60, 9, 4, 0]], [0, 0, 0], [0.9, 0.8, 0.7])
    got = measure([(found, labels_of([SHIP, [60, 60, 9, 4, 0]], [0, 0]))])
    assert got["map_50"] == pytest.approx((1 + 2 / 3) / 2)


def test_detections_of_ignored_objects_count_nowhere() -> None:
    found = detections_of([SHIP, SHIP, [60, 60, 9, 4, 0]], [0, 0, 0], [0.9, 0.8, 0.7])
    got = measure([(found, labels_of([SHIP, [60, 60, 9, 4, 0]], [0, 0], [True, False]))])
    assert got["map_50"] == 1


def test_boxes_of_another_class_or_angle_do_not_count() -> None:
    other_class = detections_of([SHIP], [1], [0.9])
    other_angle = detections_of([[20, 20, 16, 4, -0.5]], [0], [0.9])
    for found in (other_class, other_angle):
        assert measure([(found, labels_of([SHIP], [0]))])["map_50_per_class"][0] == 0


def test_batches_of_images_and_ranks_add_up() -> None:
    rng = np.random.default_rng(5)
    images = [random_image(rng) for _ in range(8)]
    expected = measure(images)
    whole = OrientedAveragePrecision(NUM_CLASSES)
    whole.update([detections for detections, _ in images], [target for _, target in images])
    torch.testing.assert_close(whole.compute(), expected, equal_nan=True)
    first, second = OrientedAveragePrecision(NUM_CLASSES), OrientedAveragePrecision(NUM_CLASSES)
    for number, (detections, target) in enumerate(images):
        (first if number < 3 else second).update([detections], [target])
    second.merge_state(first)
    torch.testing.assert_close(second.compute(), expected, equal_nan=True)


def test_the_metrics_of_upright_boxes_give_the_same_for_oriented_ones() -> None:
    rng = np.random.default_rng(6)
    oriented, upright = (DetectionMetrics(("a", "b", "c"), kind) for kind in ("oriented_boxes", "boxes"))
    for _ in range(12):
        found, target = random_image(rng)
        found, target = square_angles(found), square_angles(target)
        oriented.update([found], [target])
        upright.update([with_bounds(found)], [with_bounds(target)])
    got, expected = oriented.compute(), upright.compute()
    assert 0.2 < expected.ap < 0.9
    assert got.to_dict() == expected.to_dict()


def square_angles(objects):
    """The same objects with sides along the axes."""
    boxes = torch.as_tensor(objects.oriented_boxes).clone().round()
    boxes[:, 2:4] = 2 * (boxes[:, 2:4] / 2).round().clamp(min=1)
    boxes[:, 4] = 0
    return replace(objects, oriented_boxes=boxes if isinstance(objects, Detections) else boxes.numpy())


def with_bounds(objects):
    boxes = torch.as_tensor(objects.oriented_boxes)
    bounds = torch.cat([boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2], 1)
    return replace(objects, boxes_xyxy=bounds, oriented_boxes=None)


def test_boxes_some_at_a_time_have_the_scores_of_all_at_once(monkeypatch) -> None:
    images = [random_image(np.random.default_rng(seed)) for seed in range(30)]
    expected = measure(images)
    monkeypatch.setattr("perf_vit.metrics.oriented._BOXES_AT_ONCE", 3)
    found = measure(images)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)


def test_missing_oriented_boxes_are_an_error() -> None:
    upright = Detections(boxes_xyxy=torch.zeros(0, 4), labels=torch.zeros(0), scores=torch.zeros(0))
    with pytest.raises(InputError, match="expected oriented boxes"):
        OrientedAveragePrecision(1).update([upright], [labels_of([], [])])
    with pytest.raises(ValueError, match=r"expected 0\.5"):
        OrientedAveragePrecision(1, iou_thresholds=[0.75])
