"""tools/benchmarks/control_lanes: the control decides the class, distances and split are right, scores see both."""

import importlib
import json
import runpy
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perf_vit.types import Detections, ObjectLabels

FOLDER = Path(__file__).parents[2] / "tools" / "benchmarks"
XML = """<annotation><filename>{name}.jpg</filename><size><width>640</width><height>480</height><depth>3</depth></size>
{objects}</annotation>"""
OBJECT = """<object><name>{name}</name><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax>
<ymax>{box[3]}</ymax></bndbox></object>"""


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER / "tiny_objects"))
        patch.syspath_prepend(str(FOLDER / "control_lanes"))
        yield importlib.import_module


@pytest.fixture(scope="module")
def bccd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten photographs with a blue white cell on the left and green platelets; the last two are darker."""
    folder, rng = tmp_path_factory.mktemp("bccd"), np.random.default_rng(0)
    for name in ("JPEGImages", "Annotations"):
        (folder / name).mkdir()
    for index in range(10):
        image, objects = np.full((480, 640, 3), 255 if index < 8 else 160, np.uint8), []
        tops = rng.integers(20, 420, 3)
        cells = [("WBC", (80, 150, 280, 350))]
        cells += [
            ("Platelets", (left, top, left + 40, top + 40)) for left, top in zip((330, 430, 560), tops, strict=True)
        ]
        for name, box in cells:
            # Blue, green, red, as OpenCV writes them.
            image[box[1] : box[3], box[0] : box[2]] = (120, 0, 0) if name == "WBC" else (0, 120, 0)
            objects.append(OBJECT.format(name=name, box=box))
        cv2.imwrite(str(folder / "JPEGImages" / f"{index}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 100])
        (folder / "Annotations" / f"{index}.xml").write_text(XML.format(name=index, objects="".join(objects)))
    return folder


@pytest.fixture(scope="module")
def lanes(tool) -> ModuleType:
    return tool("lanes")


@pytest.fixture(scope="module")
def makers(tool, lanes: ModuleType, bccd: Path) -> list:
    return [lanes.LaneMaker(smears) for smears in tool("mosaic").read_smears(bccd, (lanes.SHRINK,))]


@settings(max_examples=25, deadline=None)
@given(num_lanes=st.integers(1, 4), width=st.integers(64, 500), seed=st.integers(0, 10_000))
def test_the_control_of_a_lane_decides_its_class(lanes, makers, num_lanes: int, width: int, seed: int) -> None:
    image, labels = makers[0].make(128 * num_lanes, width, seed)
    assert image.shape == (128 * num_lanes, width, 3)
    lane = labels.boxes_xyxy[:, 1].astype(int) // 128
    for index in range(num_lanes):
        rows = image[128 * index : 128 * (index + 1)].astype(int)
        assert not rows[120:].any()
        is_blue = (rows[..., 2] > 60) & (rows[..., 0] < 60)
        # All of the white cell, 50 x 50 px, or none of it; and none outside the control.
        share = is_blue[:120, :64].sum() / 2500
        assert share > 0.9 or share < 0.01
        assert is_blue[:120, 64:].sum() <= 5
        assert (labels.labels[lane == index] == (0 if share > 0.5 else 1)).all()
    assert (labels.boxes_xyxy[:, 3] <= 128 * lane + 120).all()
    assert labels.ignored[labels.boxes_xyxy[:, [0, 2]].mean(1) < 64].all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_boxes_lie_on_platelets_and_miss_none(makers, seed: int) -> None:
    image, labels = makers[0].make(128, 320, seed)
    is_green = (image[..., 1] > 70) & (image[..., 0] < 60)
    covered = np.zeros_like(is_green)
    for (left, top, right, bottom), ignored in zip(labels.boxes_xyxy, labels.ignored, strict=True):
        covered[int(top) : int(bottom) + 1, int(left) : int(right) + 1] = True
        if not ignored:
            assert is_green[int((top + bottom) / 2), int((left + right) / 2)]
    assert (is_green & ~covered).sum() <= 2


def test_distances_start_at_the_control(lanes) -> None:
    boxes = np.array([[64, 0, 64, 5], [100, 0, 110, 5], [10, 0, 20, 5]], np.float32)
    np.testing.assert_array_equal(lanes.distances(boxes), [0, 41, -49])


@given(ranges=st.lists(st.tuples(st.integers(0, 99), st.integers(1, 40)), max_size=5), width=st.integers(1, 150))
def test_gaps_are_the_columns_that_no_range_touches(lanes, ranges: list, width: int) -> None:
    columns = np.array([(first, min(first + size, width)) for first, size in ranges if first < width]).reshape(-1, 2)
    free = np.ones(width, bool)
    for first, stop in columns:
        free[first:stop] = False
    found = np.zeros(width, bool)
    for first, stop in lanes.gaps(columns, width):
        assert free[first:stop].all()
        found[first:stop] = True
    np.testing.assert_array_equal(found, free)


def test_no_photograph_is_in_both_parts(makers) -> None:
    brightest = [maker.make(512, 512, seed=0)[0].max(axis=(0, 1)).min() for maker in makers]
    assert brightest[0] > 240
    assert brightest[1] < 180


def test_a_seed_decides_the_tile_and_one_lane_in_four_has_a_white_cell(makers) -> None:
    image, _ = makers[0].make(256, 256, seed=1)
    again, other = (makers[0].make(256, 256, seed=seed)[0] for seed in (1, 2))
    np.testing.assert_array_equal(image, again)
    assert (image != other).any()
    classes = [makers[0].make(128, 192, seed)[1].labels[0] for seed in range(200)]
    assert 0.18 < np.mean(np.array(classes) == 0) < 0.32


def test_tiles_of_another_height_are_refused(makers) -> None:
    with pytest.raises(ValueError, match="expected n x 128 rows"):
        makers[0].make(200, 256, 0)


def boxes_at(*lefts: float) -> np.ndarray:
    return np.array([[left, 10, left + 10, 20] for left in lefts], np.float32)


def test_scores_tell_what_is_found_from_what_is_known(tool) -> None:
    """Four platelets near and four far; the class is right near the control and always "other" far from it."""
    scores, near, far = tool("distance_scores").DistanceScores(), (70, 85, 100, 115), (600, 620, 640, 660)
    labels = np.array([0, 0, 1, 1] * 2)
    truth = ObjectLabels(labels=labels, boxes_xyxy=boxes_at(*near, *far), ignored=np.zeros(8, bool))
    found = Detections(
        boxes_xyxy=torch.from_numpy(np.concatenate([boxes_at(*near, *far), boxes_at(70, 800)])),
        scores=torch.tensor([0.9, 0.8, 0.9, 0.8, 0.5, 0.5, 0.5, 0.5, 0.3, 0.2]),
        # A second detection of the first platelet as the other class, and one of nothing.
        labels=torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 1, 0]),
    )
    scores.update(found, truth)
    result = scores.to_dict()
    rows = {row["low"]: row for row in result["by_distance"]}
    assert (rows[0]["num_targets"], rows[0]["num_platelets"]) == (2, 4)
    assert (rows[0]["target_ap50"], rows[0]["platelet_ap50"], rows[0]["auc"]) == (1.0, 1.0, 1.0)
    assert rows[0]["auc_in_tiles"] == 1.0
    assert (rows[448]["target_ap50"], rows[448]["platelet_ap50"], rows[448]["auc"]) == (0.0, 1.0, 0.5)
    assert np.isnan(rows[64]["target_ap50"])
    assert result["platelet_ap50"] == 1.0
    # Far targets rank above the two near others, and level with the far ones.
    assert result["auc"] == pytest.approx(0.875)
    assert result["auc_of_share"] == 0.5


def test_knowing_the_share_of_targets_in_a_tile_is_not_knowing_the_lane(tool) -> None:
    """A network that says "target" of all platelets of a tile as often as targets are in it."""
    scores, lefts = tool("distance_scores").DistanceScores(), (70, 85, 100, 115)
    for labels in ([0, 0, 0, 1], [0, 1, 1, 1]):
        truth = ObjectLabels(labels=np.array(labels), boxes_xyxy=boxes_at(*lefts), ignored=np.zeros(4, bool))
        share = labels.count(0) / 4
        found = Detections(
            boxes_xyxy=torch.from_numpy(boxes_at(*lefts)),
            scores=torch.full((4,), share),
            labels=torch.zeros(4, dtype=torch.int64),
        )
        scores.update(found, truth)
    result = scores.to_dict()
    # Of 4 x 4 pairs, 9 lie in the right order of the tiles, 1 in the wrong one, 6 within a tile.
    assert result["auc"] == result["auc_of_share"] == pytest.approx((9 + 6 / 2) / 16)
    assert result["auc_in_tiles"] == 0.5


@pytest.mark.slow
def test_a_run_leaves_a_row_of_the_report_and_is_not_repeated(tool, bccd: Path, tmp_path: Path) -> None:
    commands = runpy.run_path(str(FOLDER / "control_lanes" / "__main__.py"), run_name="control_lanes")
    options = {"steps": (0, 1, 0, 0), "num_tests": 1, "test_px": (128, 128)}
    commands["train"](bccd, "registers", tmp_path / "runs", **options)
    path = tmp_path / "runs" / "registers_0.json"
    result = json.loads(path.read_text())
    assert result["loss"] > 0
    assert list(result["train_cpu_s_by_side"]) == ["256"]
    path.write_text(json.dumps({**result, "loss": -1.0}))
    commands["train"](bccd, "registers", tmp_path / "runs", **options)
    assert json.loads(path.read_text())["loss"] == -1.0
    commands["report"](tmp_path / "runs", tmp_path / "lanes.png")
    assert (tmp_path / "lanes.png").read_bytes().startswith(b"\x89PNG")
