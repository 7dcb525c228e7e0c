"""tools/benchmarks/tiny_objects: tiles hold what they say, variants differ in their mixer, recall counts rightly."""

import importlib
import json
import runpy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from perf_vit.metrics import DetectionMetrics
from perf_vit.types import Detections, ObjectLabels

FOLDER = Path(__file__).parents[2] / "tools" / "benchmarks" / "tiny_objects"
XML = """<annotation><filename>{name}.jpg</filename><size><width>240</width><height>160</height><depth>3</depth></size>
{objects}</annotation>"""
OBJECT = """<object><name>{name}</name><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax>
<ymax>{box[3]}</ymax></bndbox></object>"""


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def bccd(tmp_path: Path) -> Path:
    """Ten photographs of dark cells on white; the class follows from the cell's colour."""
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "Annotations"):
        (tmp_path / folder).mkdir()
    for index in range(10):
        image, objects = np.full((160, 240, 3), 255, np.uint8), []
        for column in range(3):
            left, top = 20 + 70 * column, int(rng.integers(10, 80))
            box = (left, top, left + 50, top + 50)
            # Blue, green, red, as OpenCV writes them.
            image[box[1] : box[3], box[0] : box[2]] = [(0, 0, 90), (90, 0, 0), (0, 90, 0)][column]
            objects.append(OBJECT.format(name=("RBC", "WBC", "Platelets")[column], box=box))
        cv2.imwrite(str(tmp_path / "JPEGImages" / f"{index}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 100])
        (tmp_path / "Annotations" / f"{index}.xml").write_text(XML.format(name=index, objects="".join(objects)))
    return tmp_path


def test_boxes_lie_on_their_cells(tool, bccd: Path) -> None:
    mosaic = tool("mosaic")
    train, test = mosaic.read_smears(bccd)
    assert (len(train), len(test)) == (8, 2)
    image, labels = mosaic.make_mosaic(train, 220, seed=3)
    assert image.shape == (220, 220, 3)
    whole = labels.boxes_xyxy[~labels.ignored]
    assert len(whole) > 50
    for (left, top, right, bottom), label in zip(whole, labels.labels[~labels.ignored], strict=True):
        middle = image[int((top + bottom) / 2), int((left + right) / 2)]
        assert middle[[0, 2, 1][label]] > 70
        assert np.delete(middle, [0, 2, 1][label]).max() < 30


def test_a_seed_decides_the_tile_and_shrinking_moves_boxes_with_it(tool, bccd: Path) -> None:
    mosaic = tool("mosaic")
    train, _ = mosaic.read_smears(bccd)
    image, labels = mosaic.make_mosaic(train, 96, seed=1)
    again, other = (mosaic.make_mosaic(train, 96, seed=seed)[0] for seed in (1, 2))
    np.testing.assert_array_equal(image, again)
    assert (image != other).any()
    small, small_labels = mosaic.shrunk(image, labels, 4)
    np.testing.assert_allclose(small, image.reshape(24, 4, 24, 4, 3).mean((1, 3)), atol=1)
    np.testing.assert_allclose(small_labels.boxes_xyxy * 4, labels.boxes_xyxy)


def test_variants_without_own_weights_have_the_same(tool) -> None:
    variants = tool("variants")
    states = {}
    for name, variant in variants.VARIANTS.items():
        if not variant.has_own_weights:
            torch.manual_seed(0)
            states[name] = variants.build_variant(variant, ("cell",), 256).state_dict()
    assert {"performer", "windows", "registers", "reformer", "softmax"} <= states.keys()
    first = states["performer"]
    for state in states.values():
        assert sorted(state) == sorted(first)
        assert all(torch.equal(state[name], first[name]) for name in state)


@pytest.mark.parametrize("name", ["s4", "h3", "linformer", "reformer", "registers", "resnet18"])
def test_every_variant_learns_from_a_tile(tool, name: str) -> None:
    variants, fitting = tool("variants"), tool("fitting")
    model = variants.build_variant(variants.VARIANTS[name], ("cell",), 128)
    boxes = np.array([[30, 30, 45, 45]], np.float32)
    labels = ObjectLabels(labels=np.array([0]), boxes_xyxy=boxes, ignored=np.array([False]))
    tile = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    seconds, losses = fitting.fit(model, lambda step, side: (tile, labels), [64], 1e-3, name)
    assert len(seconds) == 1
    assert np.isfinite(losses[0])
    assert losses[0] > 0
    found, _ = fitting.detect(model.eval(), tile, shrink=4)
    assert (found.boxes_xyxy <= 256).all()


def test_an_object_is_found_once_and_by_its_own_class(tool) -> None:
    scores = tool("scores").SizeScores()
    boxes = np.array([[0, 0, 5, 5], [20, 20, 30, 30], [50, 50, 60, 60], [80, 80, 85, 85]], np.float32)
    truth = ObjectLabels(labels=np.array([0, 0, 1, 0]), boxes_xyxy=boxes, ignored=np.array([False] * 3 + [True]))
    found = Detections(
        # The second object twice, the third as another class.
        boxes_xyxy=torch.tensor(boxes)[[0, 1, 1, 2]],
        scores=torch.tensor([0.9, 0.8, 0.7, 0.6]),
        labels=torch.tensor([0, 0, 0, 0]),
    )
    scores.update(found, truth)
    rows = {(row["low"], row["high"]): row for row in scores.to_dict()["by_size"]["0.5"]}
    assert (rows[4.0, 6.0]["num"], rows[4.0, 6.0]["recall"]) == (1, 1.0)
    assert (rows[8.0, 11.0]["num"], rows[8.0, 11.0]["recall"]) == (2, 0.5)
    assert (rows[8.0, 16.0]["num"], rows[8.0, 16.0]["recall"]) == (2, 0.5)


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_pycocotools(tool, seed: int) -> None:
    scores, reference = tool("scores").SizeScores(), DetectionMetrics(tool("mosaic").CLASSES)
    rng = np.random.default_rng(seed)
    for num in (0, 1, 40, 60):
        boxes = np.repeat(rng.uniform(0, 90, (num, 2)), 2, axis=0).reshape(num, 4)
        boxes[:, 2:] += rng.uniform(4, 20, (num, 2))
        truth = ObjectLabels(
            labels=rng.integers(0, 3, num), boxes_xyxy=boxes.astype(np.float32), ignored=rng.random(num) < 0.15
        )
        moved = np.concatenate([boxes + rng.normal(0, spread, boxes.shape) for spread in (0.5, 2)]).astype(np.float32)
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        found = Detections(
            boxes_xyxy=torch.from_numpy(moved),
            scores=torch.from_numpy(rng.random(2 * num).astype(np.float32)),
            labels=torch.from_numpy(np.where(rng.random(2 * num) < 0.2, 0, np.tile(truth.labels, 2))),
        )
        scores.update(found, truth)
        reference.update([found], [truth])
    expected, result = reference.compute(), scores.to_dict()
    assert result["ap50"] == pytest.approx(expected.ap50, abs=1e-6)
    assert list(result["ap50_by_class"].values()) == pytest.approx([each.ap50 for each in expected.classes], abs=1e-6)
    assert result["threshold"] == pytest.approx(expected.threshold)


@pytest.mark.parametrize("variant", ["downsampled", "performer"])
def test_a_run_leaves_a_row_of_the_report(tool, bccd: Path, tmp_path: Path, variant: str) -> None:
    commands = runpy.run_path(str(FOLDER / "__main__.py"), run_name="tiny_objects")
    commands["train"](bccd, variant, tmp_path / "runs", steps=1, small_steps=2, side=128, num_tests=1)
    result = json.loads((tmp_path / "runs" / f"{variant}_0.json").read_text())
    assert result["parameters"] == 972_232
    assert result["loss"] > 0
    commands["report"](tmp_path / "runs", tmp_path / "recall.png")
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert result["title"] in tool("figure").table([result])
