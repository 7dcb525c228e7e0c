"""Scores of a detector on images as they come: with holes, and large."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
from command_line import save_detector
from PIL import Image
from small_models import DETECTOR_SPEC, save_small_detector, write_half_empty

from perf_vit.data import ObjectValidity
from perf_vit.geometry import Objects
from perf_vit.inference import DetectionPredictor
from perf_vit.labels.objects import OutlineMasks, objects_in, read_object_labels
from perf_vit.reporting import object_sample
from perf_vit.sources import open_source
from perf_vit.types import Detections, Window
from perf_vit.workflows import detection
from perf_vit.workflows.evaluate import evaluate
from perf_vit.workflows.reports import DetectionEvaluation


def test_objects_on_no_data_are_not_missed_in_evaluation(tmp_path) -> None:
    write_half_empty(tmp_path / "a.tif")
    rows = ["5,5,20,20", "60,40,80,60", "75,5,90,20", "120,70,140,90"]
    lines = ["image,xmin,ymin,xmax,ymax,label", *(f"a.tif,{row},car" for row in rows)]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    checkpoint = save_detector(tmp_path / "last.ckpt", DETECTOR_SPEC, head_kwargs={"detections_per_tile": 20})
    report = evaluate(checkpoint, tmp_path / "a.tif", tmp_path / "labels.csv")
    assert report.scores.classes[0].num_objects == 2


def test_masks_are_scored_inside_their_rectangles_as_whole_ones_are(tmp_path, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    numbers, outlines = np.zeros((90, 110), np.uint16), []
    for number in range(1, 13):
        row, col = rng.integers(0, 80), rng.integers(0, 100)
        numbers[row : row + 10, col : col + 9] = 50 * number
        left, top = np.array([col, row]) + rng.integers(0, 3, 2)
        outlines.append(shapely.box(left, top, min(left + 9, 110), min(top + 10, 90)))
    found = Objects("polygons", np.array(outlines), rng.random(12).astype(np.float32), np.zeros(12, np.int32))
    for name, values in (("images", numbers.astype(np.uint8)), ("masks", numbers)):
        (tmp_path / name).mkdir()
        Image.fromarray(values).save(tmp_path / name / "a.png")
    spec = replace(DETECTOR_SPEC, label_options={"label_format": "instances"})
    checkpoint = save_detector(tmp_path / "last.ckpt", spec, head="mask_rcnn", strides=[8])

    def search(model, reader, normalize, *, extent, **options) -> Objects:
        reader.read(extent)
        return found

    monkeypatch.setattr("perf_vit.inference.detection.predict_objects", search)
    report = evaluate(checkpoint, tmp_path / "images", tmp_path / "masks")
    (record,) = read_object_labels(tmp_path / "masks", tmp_path / "images", label_format="instances", classes=["car"])
    masks = OutlineMasks(outlines).read(np.arange(12), record.extent)
    whole = DetectionEvaluation(("car",), "masks", score_threshold=0.5)
    whole.update(
        Detections(masks=masks, scores=found.scores, labels=found.labels),
        objects_in(record, record.extent, min_visible=0.0),
    )
    assert report.to_dict() == whole.to_dict()
    assert 0.1 < report.scores.ap50 < 1


@pytest.mark.parametrize("head", ["mask_rcnn", "fcos"])
def test_outlines_without_a_pixel_at_the_edge_do_not_shift_the_others(tmp_path, monkeypatch, head) -> None:
    """A polygon of which the image holds no pixel's centre has no mask."""
    Image.fromarray(np.full((90, 110, 3), 90, np.uint8)).save(tmp_path / "a.png")
    # The first and third reach 0.3 px into the image.
    corners = [(-9, 10, 0.3, 20), (20, 30, 50, 45), (109.7, 50, 130, 60), (60, 70, 90, 80)]
    annotations = [
        {
            "id": index,
            "image_id": 1,
            "category_id": 1,
            "bbox": [left, top, right - left, bottom - top],
            "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
        }
        for index, (left, top, right, bottom) in enumerate(corners, 1)
    ]
    images = [{"id": 1, "file_name": "a.png", "width": 110, "height": 90}]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "car"}]}
    (tmp_path / "labels.json").write_text(json.dumps(content))
    drawn = []

    def noted(title, source, truth, *rest):
        drawn.append(truth)
        return object_sample(title, source, truth, *rest)

    monkeypatch.setattr(detection, "object_sample", noted)
    spec = replace(DETECTOR_SPEC, label_options={"label_format": "coco"})
    checkpoint = save_detector(tmp_path / "last.ckpt", spec, head=head, strides=[8])
    report = evaluate(checkpoint, tmp_path / "a.png", tmp_path / "labels.json")
    ((outlines, found),) = drawn
    assert report.scores.classes[0].num_objects == len(outlines) == len(found) == 2
    assert shapely.bounds(outlines).tolist() == [[20, 30, 50, 45], [60, 70, 90, 80]]


def test_an_object_is_seen_once_a_window_shows_a_valid_pixel_of_it(tmp_path) -> None:
    write_half_empty(tmp_path / "a.tif")
    boxes = np.array([[5, 5, 20, 20], [60.2, 40, 80, 60], [69.5, 5, 90, 20], [70, 70, 140, 90]])
    with open_source(tmp_path / "a.tif") as source:
        reader = ObjectValidity(source, boxes)
        reader.read(Window(0, 64, 64, 64))
        assert reader.seen.tolist() == [False, True, True, False]
        for row in (0, 32):
            for col in (0, 64, 96):
                reader.read(Window(row, col, 64, 64))
        assert reader.seen.tolist() == [True, True, True, False]


def test_the_next_image_is_read_while_the_model_computes_and_scores_stay_the_same(tmp_path, monkeypatch) -> None:
    names = [f"{letter}.png" for letter in "abcd"]
    (tmp_path / "images").mkdir()
    for seed, name in enumerate(names):
        pixels = np.random.default_rng(seed).integers(0, 255, (90, 120, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    rows = [f"{name},{5 * seed},20,{5 * seed + 30},60,car" for seed, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("\n".join(["image,xmin,ymin,xmax,ymax,label", *rows]))
    checkpoint = save_small_detector(tmp_path / "last.ckpt")
    given = (checkpoint, tmp_path / "images", tmp_path / "labels.csv")
    before = evaluate(*given).to_dict()

    read, opened, find = {name: threading.Event() for name in names}, detection._opened, DetectionPredictor.find

    def opened_noted(predictor, record):
        found = opened(predictor, record)
        read[Path(record.path).name].set()
        return found

    def find_waiting(self, reader, extent, **options) -> Objects:
        # This image and the next one.
        assert all(read[name].wait(10) for name in names[: len(asked) + 2])
        asked.append(len(reader._images))
        return find(self, reader, extent, **options)

    asked: list[int] = []
    monkeypatch.setattr(detection, "num_processors", lambda: 1)
    monkeypatch.setattr(detection, "_opened", opened_noted)
    monkeypatch.setattr(DetectionPredictor, "find", find_waiting)
    assert evaluate(*given).to_dict() == before
    # Windows of 64 px with a quarter of overlap: 2 rows, 3 columns, of which 2 batches and a reader's are held.
    assert asked == [3, 3, 3, 3]
