"""Predictions that pycocotools scores against a given COCO file as they are."""

import contextlib
import io
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from command_line import call, save_detector
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from perf_vit.models import DetectionSpec
from perf_vit.transforms import Normalizer
from perf_vit.workflows.evaluate import evaluate

SPEC = DetectionSpec(
    classes=("car", "bus", "tram"),
    normalizer=Normalizer((100.0,) * 3, (50.0,) * 3),
    tile_px=64,
    label_options={"label_format": "coco"},
)
CATEGORIES = {"bus": 3, "car": 7, "boat": 12}
# Ids in no order; two images of one name.
IMAGES = {"north/x.png": 42, "south/x.png": 17, "south/y.png": 5}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return make_shop(tmp_path_factory.mktemp("boxes"), "boxes")


@pytest.fixture(scope="module")
def mask_shop(tmp_path_factory):
    return make_shop(tmp_path_factory.mktemp("masks"), "masks")


def make_shop(folder, kind):
    """Images, an untrained detector, and labels that are some of its objects, moved a little."""
    rng = np.random.default_rng(0)
    # Masks take longer: two windows an image, not six.
    height, width = (90, 120) if kind == "boxes" else (64, 90)
    for name in IMAGES:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (height, width, 3)).astype(np.uint8)).save(folder / "images" / name)
    options = {"head": "fcos", "head_kwargs": {"detections_per_tile": 60}}
    if kind == "masks":
        # Untrained, it finds objects of several classes and sizes.
        masks = {"detections_per_tile": 30}
        options |= {"head": "mask_rcnn", "backbone": "resnet18", "head_kwargs": masks}
    detector = save_detector(folder / "d.ckpt", replace(SPEC, kind=kind), **options)
    args = ["--checkpoint", detector, "--input", folder / "images", "--output", folder / "first"]
    assert call(["predict", *args, "--score-threshold", "0", "--polygons", "json"]) == 0
    images, annotations = [], []
    for name, number in IMAGES.items():
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        found = json.loads((folder / "first" / name).with_suffix(".json").read_text())
        names = {each["id"]: each["name"] for each in found["categories"]}
        for rank, each in enumerate(found["annotations"][:60:3]):
            x, y, w, h = each["bbox"]
            if names[each["category_id"]] not in CATEGORIES or min(w, h) < 4:
                continue
            # No IoU that lies on one of the thresholds.
            shift = rank % 4 * w / 19
            rings = [np.add(np.reshape(ring, (-1, 2)), [shift, 0]).ravel().tolist() for ring in each["segmentation"]]
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": number, "iscrowd": int(rank % 7 == 0),
                    "category_id": CATEGORIES[names[each["category_id"]]], "bbox": [x + shift, y, w, h],
                    "area": each["area"], "segmentation": rings,
                }
            )  # fmt: skip
    assert len(annotations) > 10
    categories = [{"id": number, "name": name} for name, number in CATEGORIES.items()]
    labels = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "labels.json").write_text(json.dumps(labels))
    return folder


def predict(shop, *more: object) -> int:
    args = ["--checkpoint", shop / "d.ckpt", "--score-threshold", "0", "--coco-images", shop / "labels.json"]
    return call(["predict", *args, *more])


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_results_of_many_images_score_in_pycocotools_what_evaluate_says(kind, request, tmp_path) -> None:
    shop, out = request.getfixturevalue("shop" if kind == "boxes" else "mask_shop"), tmp_path / "out"
    assert predict(shop, "--input", shop / "images", "--output", out) == 0
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(shop / "labels.json"))
        found = truth.loadRes(str(out / "coco_results.json"))
        run = COCOeval(truth, found, "segm" if kind == "masks" else "bbox")
        run.params.maxDets = [1, 10, 1500]
        # Evaluation leaves out classes that the model doesn't know.
        run.params.catIds = [CATEGORIES["bus"], CATEGORIES["car"]]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, -1]
    assert set(found.getImgIds()) == set(IMAGES.values())
    scores = evaluate(shop / "d.ckpt", shop / "images", shop / "labels.json").scores
    assert 0.02 < scores.ap50 < 0.98
    assert scores.ap == pytest.approx(precision[precision > -1].mean(), abs=2e-3)
    assert scores.ap50 == pytest.approx(precision[0][precision[0] > -1].mean(), abs=2e-3)


def test_each_result_has_the_ids_of_the_given_file(shop, tmp_path) -> None:
    out = tmp_path / "out"
    assert predict(shop, "--input", shop / "images", "--output", out) == 0
    parts = []
    for name, number in IMAGES.items():
        part = json.loads((out / name).with_suffix(".json").read_text())
        assert {each["image_id"] for each in part} == {number}
        # A class that the file doesn't have gets an id beyond its own.
        assert {each["category_id"] for each in part} <= {7, 3, 13}
        parts += part
    together = json.loads((out / "coco_results.json").read_text())
    assert sorted(map(json.dumps, together)) == sorted(map(json.dumps, parts))


def test_one_image_makes_one_file_of_results(shop, tmp_path) -> None:
    args = ["--input", shop / "images" / "south" / "x.png", "--output"]
    assert predict(shop, *args, tmp_path / "x.json") == 0
    with contextlib.redirect_stdout(io.StringIO()):
        found = COCO(str(shop / "labels.json")).loadRes(str(tmp_path / "x.json"))
    assert {each["image_id"] for each in found.anns.values()} == {17}
    assert predict(shop, *args, tmp_path / "x.gpkg") == 2


def test_an_interrupted_folder_is_completed_and_other_files_are_left(shop, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    args = ["--input", shop / "images", "--output", out]
    assert predict(shop, *args) == 0
    whole = (out / "coco_results.json").read_bytes()
    (out / "south" / "y.json").unlink()
    (out / "coco_results.json").unlink()
    assert predict(shop, *args) == 0
    assert (out / "coco_results.json").read_bytes() == whole
    for mine in ('[{"image_id": [42], "score": 1}]', '{"mine": 1}'):
        (out / "coco_results.json").write_text(mine)
        assert predict(shop, *args) == 2
        assert "exists already, but holds no COCO results of these images" in " ".join(capsys.readouterr().err.split())
        assert (out / "coco_results.json").read_text() == mine
    assert predict(shop, *args, "--overwrite") == 0
    assert (out / "coco_results.json").read_bytes() == whole


def test_results_of_an_earlier_run_are_not_mixed_with_those_that_replace_them(shop, tmp_path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(shop / "images", images)
    assert predict(shop, "--input", images, "--output", out) == 0
    (images / "south" / "y.png").write_bytes(b"no picture")
    args = ["--input", images, "--output", out, "--overlap", "8", "--overwrite", "--on-error", "skip"]
    assert predict(shop, *args) == 2
    together = json.loads((out / "coco_results.json").read_text())
    assert {each["image_id"] for each in together} == {42, 17}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images[1:], "doesn't list"),
        (lambda images: [{**images[0], "height": 91}, *images[1:]], "91 x 120 px, .* has 90 x 120"),
        (lambda images: [{**each, "file_name": "x.png"} for each in images[:1]] + images[2:], "are the same image of"),
    ],
)
def test_images_that_the_file_does_not_describe_are_refused_at_once(
    shop, tmp_path, capsys, monkeypatch, change, message
) -> None:
    content = json.loads((shop / "labels.json").read_text())
    content["images"] = change(content["images"])
    (tmp_path / "other.json").write_text(json.dumps(content))
    monkeypatch.setattr("perf_vit.inference.detection.predict_objects", None)
    args = ["--checkpoint", shop / "d.ckpt", "--input", shop / "images", "--output", tmp_path / "out"]
    assert call(["predict", *args, "--coco-images", tmp_path / "other.json"]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
