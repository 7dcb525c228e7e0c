"""Panoptic quality, FROC, confusion of objects and curves of pixels, each against a reference."""

import dataclasses
import math
import tracemalloc

import numpy as np
import pytest
import torch
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision, MulticlassAUROC, MulticlassAveragePrecision
from torchmetrics.detection import PanopticQuality as TorchmetricsPanopticQuality

from perf_vit.errors import InputError
from perf_vit.metrics import FROC_RATES, DetectionConfusion, DetectionMetrics, Froc, PanopticQuality, SegmentationCurves
from perf_vit.metrics.matching import FALSE_ALARM, NOT_COUNTED, match_objects
from perf_vit.types import IGNORE_INDEX, Detections, MaskCrops, ObjectLabels


def truth_of(boxes, labels, ignored=None, **geometry) -> ObjectLabels:
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    ignored = np.zeros(len(boxes), bool) if ignored is None else np.asarray(ignored, bool)
    return ObjectLabels(labels=np.asarray(labels, np.int64), boxes_xyxy=boxes, ignored=ignored, **geometry)


def masks_of(rng, num: int, size: int = 40) -> np.ndarray:
    masks = np.zeros((num, size, size), bool)
    for mask in masks:
        row, col, height, width = *rng.integers(0, size - 8, 2), *rng.integers(4, 16, 2)
        mask[row : row + height, col : col + width] = True
    return masks


def instances(seed: int, share_ignored: float = 0.0):
    """Overlapping objects, and detections that are objects moved by a pixel or two, or nothing at all."""
    rng = np.random.default_rng(seed)
    masks = masks_of(rng, 6)
    labels = rng.integers(0, 2, 6)
    truth = truth_of(np.zeros((6, 4)), labels, rng.random(6) < share_ignored, masks=masks)
    moved = np.roll(masks, rng.integers(-1, 2, 2), (1, 2))
    found = Detections(
        masks=torch.from_numpy(np.concatenate([moved, masks_of(rng, 3)])),
        labels=torch.from_numpy(np.concatenate([labels, rng.integers(0, 2, 3)])),
        scores=torch.from_numpy(rng.permutation(9) / 10 + 0.05),
    )
    return found, truth


def naive_panoptic(images, num_classes: int, threshold: float) -> list[tuple[float, float, float]]:
    """Sets of pixels, pair by pair, as the definition says."""
    counts = [[0.0, 0, 0, 0] for _ in range(num_classes)]
    for found, truth in images:
        order = [i for i in np.argsort(-found.scores.numpy(), kind="stable") if found.scores[i] >= threshold]
        segments = [_own_pixels([found.masks[i].numpy() for i in order]), None]
        segments[1] = _own_pixels([m for m, i in zip(truth.masks, truth.ignored, strict=True) if not i])
        labels = [found.labels.numpy()[order].tolist(), truth.labels[~truth.ignored].tolist()]
        void = set().union(*(_pixels(m) for m in truth.masks[truth.ignored]))
        void -= set().union(*segments[1])
        paired_found, paired_truth = set(), set()
        for i, ours in enumerate(segments[0]):
            for j, theirs in enumerate(segments[1]):
                iou = len(ours & theirs) / max(1, len((ours - void) | theirs))
                if labels[0][i] == labels[1][j] and iou > 0.5:
                    counts[labels[0][i]][0] += iou
                    counts[labels[0][i]][1] += 1
                    paired_found.add(i)
                    paired_truth.add(j)
        for i, ours in enumerate(segments[0]):
            counts[labels[0][i]][2] += bool(ours) and i not in paired_found and 2 * len(ours & void) <= len(ours)
        for j, theirs in enumerate(segments[1]):
            counts[labels[1][j]][3] += bool(theirs) and j not in paired_truth
    return [(s / (t + v / 2 + m / 2), s / t if t else 0.0, t / (t + v / 2 + m / 2)) for s, t, v, m in counts]


def _pixels(mask) -> set:
    return set(map(tuple, np.argwhere(mask)))


def _own_pixels(masks) -> list[set]:
    taken, segments = set(), []
    for mask in masks:
        segments.append(_pixels(mask) - taken)
        taken |= segments[-1]
    return segments


@pytest.mark.parametrize("share_ignored", [0.0, 0.3])
def test_panoptic_quality_is_that_of_sets_of_pixels(share_ignored) -> None:
    images = [instances(seed, share_ignored) for seed in range(6)]
    metric = PanopticQuality(2, 0.3)
    for found, truth in images:
        metric.update([found], [truth])
    mean, each = metric.compute()
    expected = naive_panoptic(images, 2, 0.3)
    assert [(s.pq, s.sq, s.rq) for s in each] == [pytest.approx(values) for values in expected]
    assert mean.pq == pytest.approx(np.mean([values[0] for values in expected]))
    assert 0.1 < mean.pq < 0.9


def test_panoptic_quality_is_that_of_torchmetrics_where_nothing_is_ignored() -> None:
    ours, theirs = (
        PanopticQuality(2, 0.0),
        TorchmetricsPanopticQuality(things={0, 1}, stuffs={2}, return_per_class=True),
    )
    for seed in range(4):
        found, truth = instances(seed)
        order = found.scores.argsort(descending=True)
        ours.update([found], [truth])
        maps = [_category_and_number(found.masks[order].numpy(), found.labels[order].numpy())]
        maps.append(_category_and_number(truth.masks, truth.labels))
        theirs.update(*(torch.from_numpy(each)[None] for each in maps))
    expected = theirs.compute()[0, :2].tolist()
    assert [scores.pq for scores in ours.compute()[1]] == pytest.approx(expected, abs=1e-6)


def _category_and_number(masks, labels) -> np.ndarray:
    result = np.full((*masks.shape[1:], 2), (2, 0))
    for number in reversed(range(len(masks))):
        result[masks[number]] = labels[number], number + 1
    return result


def test_panoptic_quality_of_nothing_is_unknown_and_boxes_are_refused() -> None:
    metric = PanopticQuality(1, 0.5)
    assert math.isnan(metric.compute()[0].pq)
    boxes = Detections(boxes_xyxy=np.zeros((0, 4)), scores=np.zeros(0), labels=np.zeros(0, int))
    with pytest.raises(InputError, match="needs masks"):
        metric.update([boxes], [truth_of([], [])])


def test_froc_is_that_of_monai() -> None:
    rng = np.random.default_rng(0)
    metric, vain, hits, num_images, num_lesions = Froc(1), [], [], 7, 0
    for _ in range(num_images):
        corners = rng.uniform(0, 200, (int(rng.integers(1, 5)), 2))
        boxes = np.hstack([corners, corners + 12])
        middles = np.vstack([rng.permutation(boxes)[:2, :2] + 5, rng.uniform(0, 200, (6, 2))])
        scores = rng.random(len(middles)).round(3)
        found = np.hstack([middles - 3, middles + 3])
        metric.update(
            [Detections(boxes_xyxy=found, scores=scores, labels=np.zeros(len(found), int))],
            [truth_of(boxes, np.zeros(len(boxes)))],
        )
        boxes = np.asarray(boxes, np.float32)
        inside = ((middles[:, None] >= boxes[:, :2]) & (middles[:, None] < boxes[:, 2:])).all(2)
        hits += [scores[column].max(initial=0) for column in inside.T]
        vain += scores[~inside.any(1)].tolist()
        num_lesions += len(boxes)
    assert 0 in hits
    # Imported here: every process collects this file, and one runs this test.
    from monai.metrics import compute_froc_curve_data, compute_froc_score

    rates, sensitivity = compute_froc_curve_data(np.array(vain), np.array(hits), num_lesions, num_images)
    (scores,) = metric.compute()
    assert scores["mean"] == pytest.approx(compute_froc_score(rates, sensitivity, FROC_RATES))
    assert 0.1 < scores["mean"] < 0.95
    assert scores["sensitivity"] == sorted(scores["sensitivity"])


def test_ignored_lesions_and_second_hits_are_no_false_positives() -> None:
    lesions = truth_of([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], [0, 0, 0], [False, False, True])
    found = np.array([[4, 4, 6, 6], [3, 3, 7, 7], [44, 4, 46, 6], [60, 60, 62, 62]])
    metric = Froc(2)
    metric.update([Detections(boxes_xyxy=found, scores=[0.9, 0.8, 0.95, 0.7], labels=[0, 0, 0, 0])], [lesions])
    one, other = metric.compute()
    # Half the lesions are found before the only false positive comes.
    assert one == {"sensitivity": [0.5] * 6, "mean": 0.5}
    assert math.isnan(other["mean"])


def test_a_point_hits_a_mask_or_oriented_box_only_inside_its_outline() -> None:
    mask = np.zeros((1, 20, 20), bool)
    mask[0, :10, :10] = True
    mask[0, 4:, 4:] = False
    for point, expected in (((2, 2), 1.0), ((6, 6), 0.0), ((25, 2), 0.0)):
        metric = Froc(1)
        box = np.array([[point[0] - 1, point[1] - 1, point[0] + 1, point[1] + 1]])
        found = Detections(boxes_xyxy=box, scores=[0.5], labels=[0])
        metric.update([found], [truth_of([[0, 0, 10, 10]], [0], masks=mask)])
        assert metric.compute()[0]["sensitivity"][-1] == expected
    slanted = np.array([[10, 10, 20, 2, math.pi / 4]], np.float32)
    for point, expected in (((15, 15), 1.0), ((15, 6), 0.0)):
        metric = Froc(1)
        found = Detections(oriented_boxes=np.array([[*point, 4, 2, 0.0]]), scores=[0.5], labels=[0])
        metric.update([found], [truth_of([[3, 3, 17, 17]], [0], oriented_boxes=slanted)])
        assert metric.compute()[0]["sensitivity"][-1] == expected


def test_confusion_counts_each_object_once_and_leaves_the_ignored_out() -> None:
    truth = truth_of([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]], [0, 1, 1, 0], [0, 0, 0, 1])
    boxes = [[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 9], [60, 0, 70, 10], [90, 0, 95, 5], [40, 0, 50, 10]]
    found = Detections(boxes_xyxy=np.array(boxes), scores=[0.9, 0.8, 0.7, 0.6, 0.5, 0.2], labels=[0, 0, 0, 0, 1, 1])
    metric = DetectionConfusion(2, score_threshold=0.4)
    metric.update([found], [truth])
    # A hit and a second one on the same object; a ship taken for a boat, one below the threshold; a stray.
    assert metric.matrix.tolist() == [[1, 0, 0], [1, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize("kind", ["oriented_boxes", "masks"])
def test_confusion_compares_any_geometry(kind) -> None:
    oriented = np.array([[10, 10, 8, 4, 0.0], [10, 30, 8, 4, 0.5]], np.float32)
    masks = np.zeros((2, 40, 40), bool)
    masks[0, 8:12, 6:14], masks[1, 28:32, 6:14] = True, True
    shapes = {"oriented_boxes": oriented} if kind == "oriented_boxes" else {"masks": masks}
    metric = DetectionConfusion(1, kind, score_threshold=0.5)
    metric.update(
        [Detections(scores=[0.9, 0.9], labels=[0, 0], **shapes)], [truth_of(np.zeros((2, 4)), [0, 0], **shapes)]
    )
    assert metric.matrix.tolist() == [[2, 0], [0, 0]]
    with pytest.raises(InputError, match="another kind of geometry"):
        metric.update([Detections(scores=[], labels=[], boxes_xyxy=np.zeros((0, 4)))], [truth_of([], [])])


@pytest.mark.parametrize("kind", ["boxes", "oriented_boxes", "masks"])
def test_detections_within_a_crowd_are_no_false_alarms(kind) -> None:
    def shapes(boxes):
        corners = np.array(boxes, float)
        if kind == "boxes":
            return {"boxes_xyxy": corners}
        if kind == "oriented_boxes":
            middle, sides = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
            return {"oriented_boxes": np.hstack([middle, sides, np.zeros((len(boxes), 1))])}
        rows, cols = np.mgrid[:64, :64]
        inside = [(cols >= x0) & (cols < x1) & (rows >= y0) & (rows < y1) for x0, y0, x1, y1 in boxes]
        return {"masks": np.stack(inside)}

    # With all, three quarters, 9/16 and nothing of their area inside.
    boxes = [[5, 5, 15, 15], [32, 5, 48, 15], [35, 30, 51, 40], [50, 50, 60, 60]]
    found = Detections(scores=[0.9] * 4, labels=[0] * 4, **shapes(boxes))
    truth = ObjectLabels(
        labels=np.array([0]),
        ignored=np.array([True]),
        **{"boxes_xyxy": np.array([[0, 0, 44, 44]], np.float32), **shapes([[0, 0, 44, 44]])},
    )
    owners = match_objects(found, truth, kind, score_threshold=0.5)
    assert owners.tolist() == [NOT_COUNTED, NOT_COUNTED, NOT_COUNTED, FALSE_ALARM]
    assert match_objects(found, truth, kind, score_threshold=0.5, iou_threshold=0.6)[2] == FALSE_ALARM


@pytest.mark.parametrize("metric", ["average_precision", "froc", "confusion", "panoptic"])
def test_masks_inside_their_rectangles_have_the_scores_of_whole_ones(metric) -> None:
    make = {
        "average_precision": lambda: DetectionMetrics(("a", "b"), "masks"),
        "froc": lambda: Froc(2),
        "confusion": lambda: DetectionConfusion(2, "masks", score_threshold=0.3),
        "panoptic": lambda: PanopticQuality(2, 0.3),
    }[metric]
    whole, cropped = make(), make()
    for seed in range(4):
        found, truth = instances(seed, 0.3)
        whole.update([found], [truth])
        crops = [MaskCrops.from_masks(np.asarray(each.masks)) for each in (found, truth)]
        cropped.update(
            [dataclasses.replace(found, masks=None, mask_crops=crops[0])],
            [dataclasses.replace(truth, masks=None, mask_crops=crops[1])],
        )
    if metric == "confusion":
        assert (whole.matrix == cropped.matrix).all()
        assert np.trace(whole.matrix) > 3
    else:
        assert whole.compute() == cropped.compute()


def test_panoptic_quality_of_an_image_row_by_row_is_that_of_the_whole(monkeypatch) -> None:
    whole, rows = PanopticQuality(2, 0.3), PanopticQuality(2, 0.3)
    image = instances(1, 0.3)
    whole.update([image[0]], [image[1]])
    monkeypatch.setattr("perf_vit.metrics.panoptic._PIXELS", 7 * 40)
    rows.update([image[0]], [image[1]])
    assert rows.compute() == whole.compute()


def test_many_objects_of_a_large_image_fit_in_memory() -> None:
    side, num = 20_000, 400
    rng = np.random.default_rng(0)
    corners = rng.integers(0, side - 40, (num, 2))
    crops = MaskCrops([np.ones((30, 30), bool)] * num, corners, (side, side))
    moved = MaskCrops([np.ones((30, 30), bool)] * num, corners + rng.integers(0, 4, (num, 2)), (side, side))
    labels = np.zeros(num, np.int64)
    truth = truth_of(np.zeros((num, 4)), labels, mask_crops=crops)
    found = Detections(mask_crops=moved, labels=labels, scores=rng.permutation(num) / num)
    average, confusion = DetectionMetrics(("a",), "masks"), DetectionConfusion(1, "masks", score_threshold=0.0)
    metrics = (average, confusion, Froc(1))
    # Whole masks would take 160 GB.
    tracemalloc.start()
    for metric in metrics:
        metric.update([found], [truth])
    assert average.compute().ap50 > 0.95
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert confusion.matrix[0, 0] > 0.95 * num


def test_curves_of_pixels_are_those_of_torchmetrics(tmp_path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (50, 60)).astype(np.uint8)
    logits = rng.normal(0, 1, (3, 50, 60)) + 1.5 * (labels == np.arange(3)[:, None, None])
    labels[:5] = IGNORE_INDEX
    probabilities = torch.softmax(torch.from_numpy(logits), 0).float()
    curves = SegmentationCurves(["a", "b", "c", "d"])
    padded = torch.cat([probabilities, torch.zeros(1, 50, 60)])
    for rows in (slice(0, 17), slice(17, 50)):
        curves.update(padded[:, rows].numpy(), labels[rows])
    target = torch.from_numpy(labels.astype(np.int64))[None]
    for metric, values in (
        (MulticlassAUROC, curves.auroc()),
        (MulticlassAveragePrecision, curves.average_precision()),
    ):
        expected = metric(3, average=None, ignore_index=IGNORE_INDEX)(probabilities[None], target)
        assert values[:3] == pytest.approx(expected.tolist(), abs=2e-3)
        assert math.isnan(values[3])
    assert curves.confusion.sum() == 45 * 60
    assert np.trace(curves.confusion) == (probabilities.argmax(0).numpy() == labels).sum()
    assert curves.to_dict()["auroc"]["d"] is None
    curves.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


@pytest.mark.parametrize("num_classes", [1, 3])
def test_curves_of_layers_are_those_of_torchmetrics_class_by_class(tmp_path, num_classes: int) -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, (num_classes, 40, 50)).astype(np.uint8)
    probabilities = torch.sigmoid(torch.from_numpy(rng.normal(2.0 * labels - 1, 1))).float()
    # Each class has pixels without a label of its own.
    for layer in range(num_classes):
        labels[layer, 7 * layer : 7 * layer + 5] = IGNORE_INDEX
    curves = SegmentationCurves([f"c{layer}" for layer in range(num_classes)], multilabel=True)
    for rows in (slice(0, 13), slice(13, 40)):
        curves.update(probabilities[:, rows].numpy(), labels[:, rows])
    for layer in range(num_classes):
        target = torch.from_numpy(labels[layer].astype(np.int64))
        for metric, values in ((BinaryAUROC, curves.auroc()), (BinaryAveragePrecision, curves.average_precision())):
            expected = metric(ignore_index=IGNORE_INDEX)(probabilities[layer], target)
            assert values[layer] == pytest.approx(expected.item(), abs=2e-3)
    assert curves.confusion is None
    assert set(curves.to_dict()) == {"auroc", "average_precision"}
    curves.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000
