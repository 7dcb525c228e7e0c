import contextlib
import io
import json
import math

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchmetrics.detection import MeanAveragePrecision

from perf_vit.errors import InputError
from perf_vit.metrics import DetectionMetrics, plot_precision_recall
from perf_vit.metrics.detection import OBJECT_SIZES
from perf_vit.types import Detections, ObjectLabels

CLASSES = ("boat", "ship", "dock")


def labels_of(boxes, labels, ignored=None, masks=None) -> ObjectLabels:
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    ignored = np.zeros(len(boxes), bool) if ignored is None else np.asarray(ignored, bool)
    return ObjectLabels(labels=np.asarray(labels, np.int64), boxes_xyxy=boxes, ignored=ignored, masks=masks)


def detections_of(boxes, labels, scores) -> Detections:
    boxes = torch.as_tensor(np.asarray(boxes, np.float32)).reshape(-1, 4)
    return Detections(boxes_xyxy=boxes, labels=torch.as_tensor(labels), scores=torch.as_tensor(scores))


def random_images(num: int, seed: int, share_ignored: float = 0.0):
    """Objects of 3 to 100 px, and detections that are objects moved a little, twice, or nothing at all."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(num):
        count = int(rng.integers(0, 9))
        corner, side = rng.uniform(0, 120, (count, 2)), np.exp(rng.uniform(math.log(3), math.log(100), (count, 2)))
        boxes, labels = np.hstack([corner, corner + side]), rng.integers(0, 2, count)
        moved = boxes + rng.normal(0, 1.5, boxes.shape)
        strays = np.hstack([corner, corner + 10])[: count // 2]
        found = np.vstack([moved, boxes[: count // 2] + 1, strays]).clip(0)
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        found_labels = np.concatenate([labels, labels[: count // 2], rng.integers(0, 2, len(strays))])
        scores = rng.permutation(len(found)) / 100 + rng.random() / 200
        truth = labels_of(boxes, labels, rng.random(count) < share_ignored)
        images.append((detections_of(found, found_labels, scores), truth))
    return images


def measure(images, **options):
    metrics = DetectionMetrics(CLASSES, **options)
    for found, truth in images:
        metrics.update([found], [truth])
    return metrics.compute()


def in_coco_files(images, folder, areas=None):
    """The same objects through files, as anyone would give them to pycocotools."""
    truth, found = [], []
    for index, (detections, labels) in enumerate(images):
        for (x0, y0, x1, y1), label, ignored in zip(
            labels.boxes_xyxy.tolist(), labels.labels, labels.ignored, strict=True
        ):
            box = [x0, y0, x1 - x0, y1 - y0]
            each = {"bbox": box, "area": box[2] * box[3], "image_id": index, "category_id": int(label) + 1}
            truth.append({**each, "id": len(truth) + 1, "iscrowd": int(ignored)})
        for (x0, y0, x1, y1), label, score in zip(
            detections.boxes_xyxy.tolist(), detections.labels.tolist(), detections.scores.tolist(), strict=True
        ):
            box = [x0, y0, x1 - x0, y1 - y0]
            found.append({"bbox": box, "image_id": index, "category_id": label + 1, "score": score})
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(CLASSES)]
    listed = [{"id": index} for index in range(len(images))]
    (folder / "truth.json").write_text(json.dumps({"images": listed, "categories": categories, "annotations": truth}))
    (folder / "found.json").write_text(json.dumps(found))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(folder / "truth.json")
        evaluation = COCOeval(coco, coco.loadRes(str(folder / "found.json")), "bbox")
        if areas is not None:
            evaluation.params.areaRng, evaluation.params.areaRngLbl = areas, list(map(str, range(len(areas))))
        evaluation.evaluate()
        evaluation.accumulate()
        if areas is None:
            evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("share_ignored", [0.0, 0.3])
def test_average_precision_is_that_of_pycocotools(tmp_path, share_ignored) -> None:
    images = random_images(40, seed=0, share_ignored=share_ignored)
    scores, expected = measure(images), in_coco_files(images, tmp_path)
    assert [scores.ap, scores.ap50, scores.ap75] == pytest.approx(expected.stats[:3])
    assert scores.recall == pytest.approx(expected.stats[8])
    assert 0.1 < scores.ap < 0.9
    for index in (0, 1):
        assert scores.classes[index].ap == pytest.approx(expected.eval["precision"][:, :, index, 0, 2].mean())
    assert math.isnan(scores.classes[2].ap)


def test_average_precision_by_size_is_that_of_pycocotools_with_the_areas_of_ai_tod(tmp_path) -> None:
    assert list(OBJECT_SIZES.values())[:4] == [(2, 8), (8, 16), (16, 32), (32, 64)]
    images = random_images(40, seed=3, share_ignored=0.1)
    areas = [[4, 64], [64, 256], [256, 1024], [1024, 4096], [4096, 1e10]]
    precision = in_coco_files(images, tmp_path, areas).eval["precision"][..., -1]
    expected = [precision[:, :, :2, index].mean() for index in range(5)]
    assert list(measure(images).ap_by_size.values()) == pytest.approx(expected)
    assert min(expected) >= 0
    assert max(expected) > 0.2


def test_average_precision_is_that_of_torchmetrics() -> None:
    images = random_images(25, seed=1)
    # Its own thresholds are float32: a recall of exactly .3 falls below its .3.
    thresholds = {
        "iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(),
        "rec_thresholds": np.linspace(0, 1, 101).tolist(),
    }
    metric = MeanAveragePrecision(class_metrics=True, **thresholds)
    for found, truth in images:
        predicted = {"boxes": found.boxes_xyxy, "scores": found.scores, "labels": found.labels}
        target = {"boxes": torch.as_tensor(truth.boxes_xyxy), "labels": torch.as_tensor(truth.labels)}
        metric.update([predicted], [target])
    expected, scores = metric.compute(), measure(images)
    assert scores.ap == pytest.approx(expected["map"].item(), abs=1e-6)
    assert scores.ap50 == pytest.approx(expected["map_50"].item(), abs=1e-6)
    assert [each.ap for each in scores.classes[:2]] == pytest.approx(expected["map_per_class"].tolist(), abs=1e-6)


def test_average_precision_of_masks_is_that_of_pycocotools(tmp_path) -> None:
    rng, images, truth, found = np.random.default_rng(5), [], [], []
    rows, columns = np.mgrid[:48, :64]

    def disc(x: float, y: float, radius: float) -> np.ndarray:
        return (columns - x) ** 2 + (rows - y) ** 2 < radius**2

    for index in range(20):
        places = rng.uniform([8, 8, 3], [56, 40, 12], (int(rng.integers(0, 6)), 3))
        masks = np.array([disc(*place) for place in places], bool).reshape(-1, 48, 64)
        moved = np.concatenate([places + rng.normal(0, 1, places.shape), places[:2] + 4])
        guesses = np.array([disc(*place) for place in moved], bool).reshape(-1, 48, 64)
        classes, guessed = rng.integers(0, 2, len(masks)), rng.integers(0, 2, len(guesses))
        guessed[: len(masks)], ignored, scores = (
            classes,
            rng.random(len(masks)) < 0.2,
            rng.permutation(len(guesses)) / 50,
        )
        truth_of = labels_of(np.zeros((len(masks), 4)), classes, ignored, masks)
        scores = scores + rng.random() / 100
        images.append(
            (
                Detections(
                    masks=torch.from_numpy(guesses), labels=torch.as_tensor(guessed), scores=torch.as_tensor(scores)
                ),
                truth_of,
            )
        )
        for mask, label, skipped in zip(masks, classes, ignored, strict=True):
            packed = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
            packed["counts"] = packed["counts"].decode()
            each = {"segmentation": packed, "area": int(mask.sum()), "image_id": index, "category_id": int(label) + 1}
            truth.append({**each, "id": len(truth) + 1, "iscrowd": int(skipped), "bbox": [0, 0, 1, 1]})
        for mask, label, score in zip(guesses, guessed, scores, strict=True):
            packed = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
            packed["counts"] = packed["counts"].decode()
            found.append(
                {"segmentation": packed, "image_id": index, "category_id": int(label) + 1, "score": float(score)}
            )
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(CLASSES)]
    listed = [{"id": index, "height": 48, "width": 64} for index in range(len(images))]
    (tmp_path / "truth.json").write_text(json.dumps({"images": listed, "categories": categories, "annotations": truth}))
    (tmp_path / "found.json").write_text(json.dumps(found))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(tmp_path / "truth.json")
        expected = COCOeval(coco, coco.loadRes(str(tmp_path / "found.json")), "segm")
        expected.evaluate()
        expected.accumulate()
        expected.summarize()
    scores = measure(images, kind="masks")
    assert [scores.ap, scores.ap50, scores.ap75] == pytest.approx(expected.stats[:3])
    assert 0.1 < scores.ap < 0.9


@pytest.mark.parametrize("name", OBJECT_SIZES)
def test_the_score_of_a_size_sees_objects_of_that_size_alone(name) -> None:
    sides = {"very_tiny": 5, "tiny": 12, "small": 24, "medium": 50, "large": 90}
    boxes = [[100 * k, 0, 100 * k + side, side] for k, side in enumerate(sides.values())]
    index = list(sides).index(name)
    scores = measure([(detections_of([boxes[index]], [0], [0.9]), labels_of(boxes, [0] * 5))])
    assert scores.ap_by_size == {size: pytest.approx(1.0 if size == name else 0.0) for size in OBJECT_SIZES}


def test_masks_are_compared_by_their_pixels() -> None:
    masks = np.zeros((2, 30, 30), bool)
    masks[0, 2:12, 2:12] = True
    masks[1, 15:25, 10:28] = True
    truth = labels_of([[2, 2, 12, 12], [10, 15, 28, 25]], [0, 1], masks=masks)
    shifted = masks.copy()
    shifted[1] = np.roll(shifted[1], 3, axis=1)
    found = Detections(masks=torch.as_tensor(shifted), labels=torch.tensor([0, 1]), scores=torch.tensor([0.9, 0.8]))
    scores = measure([(found, truth)], kind="masks")
    assert scores.classes[0].ap == pytest.approx(1)
    # 15 of 21 columns shared: right up to an IoU of .7.
    assert scores.classes[1].ap == pytest.approx(0.5)


def test_the_best_threshold_is_where_f1_is_highest() -> None:
    truth = labels_of([[0, 0, 10, 10], [20, 0, 30, 10]], [0, 0])
    found = detections_of(
        [[0, 0, 10, 10], [50, 50, 60, 60], [20, 0, 30, 10], [70, 70, 80, 80]], [0, 0, 0, 0], [0.9, 0.8, 0.4, 0.3]
    )
    scores = measure([(found, truth)])
    best = scores.classes[0]
    assert (best.f1, best.precision, best.recall) == (pytest.approx(0.8), pytest.approx(2 / 3), 1.0)
    assert best.threshold == scores.threshold == pytest.approx(0.4)
    assert best.num_objects == 2


def test_dense_images_count_beyond_a_hundred_detections() -> None:
    boxes = [[12 * (k % 20), 12 * (k // 20), 12 * (k % 20) + 9, 12 * (k // 20) + 9] for k in range(120)]
    truth = labels_of(boxes, [0] * 120)
    image = (detections_of(boxes, [0] * 120, np.linspace(0.9, 0.1, 120)), truth)
    assert measure([image]).ap50 == pytest.approx(1)
    assert measure([image], max_detections=40).ap50 < 0.4


def test_the_limit_grows_with_the_objects_of_an_image() -> None:
    boxes = [[12 * (k % 50), 12 * (k // 50), 12 * (k % 50) + 9, 12 * (k // 50) + 9] for k in range(1700)]
    found = detections_of(boxes, [0] * 1700, np.linspace(0.9, 0.1, 1700))
    assert measure([(found, labels_of(boxes, [0] * 1700))]).recall == pytest.approx(1)
    # Three an object; of five that hit none and are surer, the limit leaves all.
    strays = detections_of(boxes[:5] * 1700, [1] * 8500, np.linspace(0.9, 0.1, 8500))
    assert len(measure_shapes(strays, labels_of(boxes, [1] * 1700))) == 3 * 1700
    assert len(measure_shapes(strays, labels_of(boxes[:3], [1] * 3))) == 1500


def measure_shapes(found, truth) -> list:
    """The detections that count."""
    metrics = DetectionMetrics(CLASSES)
    metrics.update([found], [truth])
    return [shape for _, shapes in metrics.images for shape in shapes]


def crowded(kind: str, seed: int) -> tuple[Detections, ObjectLabels]:
    """Objects that overlap, some ignored, one of them large; detections are these moved a little, twice, or strays."""
    rng = np.random.default_rng(seed)
    centers, sides = rng.uniform(10, 190, (120, 2)), rng.uniform(4, 24, (120, 2))
    centers[0], sides[0] = 60, 70
    moved = np.vstack([centers + rng.normal(0, 1.5, centers.shape) for _ in range(2)] + [centers[:40] + 9])
    moved_sides = np.vstack([sides, sides * rng.uniform(0.8, 1.2, sides.shape), sides[:40]])
    labels = rng.integers(0, 2, 120)
    ignored = (rng.random(120) < 0.1) | (np.arange(120) == 0)
    found_labels = np.concatenate([labels, labels, labels[:40]])
    scores = rng.permutation(280) / 300
    shapes = []
    for xy, size in ((centers, sides), (moved, moved_sides)):
        if kind == "boxes":
            shapes.append({"boxes_xyxy": np.hstack([xy - size / 2, xy + size / 2]).astype(np.float32)})
        elif kind == "oriented_boxes":
            turned = np.column_stack([xy, size.max(1), size.min(1), xy.sum(1) % 3 - 1.5])
            shapes.append({"oriented_boxes": turned.astype(np.float32)})
        else:
            rows, cols = np.mgrid[:200, :200]
            low, high = xy - size / 2, xy + size / 2
            masks = [
                (cols >= x0) & (cols < x1) & (rows >= y0) & (rows < y1)
                for (x0, y0), (x1, y1) in zip(low, high, strict=True)
            ]
            shapes.append({"masks": np.stack(masks)})
    truth = {"boxes_xyxy": np.zeros((120, 4), np.float32), **shapes[0], "labels": labels, "ignored": ignored}
    return Detections(labels=found_labels, scores=scores, **shapes[1]), ObjectLabels(**truth)


@pytest.mark.parametrize("kind", ["boxes", "oriented_boxes", "masks"])
def test_an_image_in_parts_has_the_scores_of_the_whole(kind, monkeypatch) -> None:
    images = [crowded(kind, seed) for seed in range(2)]
    whole = measure(images, kind=kind)
    monkeypatch.setattr("perf_vit.metrics.matching._PAIRS", 0)
    metrics = DetectionMetrics(CLASSES, kind)
    for found, truth in images:
        metrics.update([found], [truth])
    assert len(metrics.images) > 6
    assert metrics.compute().to_dict() == whole.to_dict()
    assert 0.1 < whole.ap50 < 0.95


@pytest.mark.parametrize("empty", ["detections", "labels", "both", "images"])
def test_nothing_found_or_nothing_there_is_no_error(empty, tmp_path) -> None:
    box = [[1, 1, 9, 9]]
    found = detections_of([], [], []) if empty in ("detections", "both") else detections_of(box, [0], [0.5])
    truth = labels_of([], []) if empty in ("labels", "both") else labels_of(box, [0])
    scores = measure([] if empty == "images" else [(found, truth)])
    assert scores.ap == 0 if empty == "detections" else math.isnan(scores.ap)
    text = json.dumps(scores.to_dict())
    assert "NaN" not in text
    plot_precision_recall(scores, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_another_kind_of_geometry_is_refused() -> None:
    with pytest.raises(InputError, match="expected masks to compare"):
        measure([(detections_of([[1, 1, 9, 9]], [0], [0.5]), labels_of([[1, 1, 9, 9]], [0]))], kind="masks")
