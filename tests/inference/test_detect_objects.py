import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from object_scenes import Perfect, Places, as_float, oriented_in, random_boxes, search

from perf_vit.errors import InputError
from perf_vit.geometry import Objects
from perf_vit.inference import ObjectStitcher
from perf_vit.tiling import grid_windows
from perf_vit.types import Detections, Window

SCENES = {
    "seed": st.integers(0, 10_000),
    "height": st.integers(20, 130),
    "width": st.integers(20, 130),
    "window": st.integers(24, 50),
    "shared": st.floats(0.2, 0.9),
    "batch_size": st.integers(1, 5),
}


def scene(seed, height, width, window, shared):
    rng = np.random.default_rng(seed)
    overlap = max(5, int(window * shared))
    boxes = random_boxes(rng, 40, height, width, largest=overlap - 0.01)
    labels, scores = rng.integers(0, 2, len(boxes)), rng.uniform(0.5, 1, len(boxes)).astype(np.float32)
    return rng, overlap, boxes, labels, scores


def in_order(objects: Objects, scores: np.ndarray) -> np.ndarray:
    """Which of the true objects, by score, each one found is."""
    return np.array([int(np.flatnonzero(scores == score)[0]) for score in objects.scores], int)


@settings(max_examples=60, deadline=None)
@given(**SCENES)
def test_boxes_smaller_than_the_overlap_come_back_once(seed, height, width, window, shared, batch_size) -> None:
    _, overlap, boxes, labels, scores = scene(seed, height, width, window, shared)
    model = Perfect("boxes", boxes, labels, scores)
    found = search(model, Places(height, width), window_size=window, overlap=overlap, batch_size=batch_size)
    order = in_order(found, scores)
    assert sorted(order) == list(range(len(boxes)))
    assert np.allclose(found.geometry, boxes[order], atol=1e-5)
    assert np.array_equal(found.labels, labels[order])


@settings(max_examples=15, deadline=None)
@given(**SCENES)
def test_oriented_boxes_smaller_than_the_overlap_come_back_once(
    seed, height, width, window, shared, batch_size
) -> None:
    rng, overlap, boxes, labels, scores = scene(seed, height, width, window, shared)
    boxes = oriented_in(boxes, rng)
    model = Perfect("oriented_boxes", boxes, labels, scores)
    found = search(model, Places(height, width), window_size=window, overlap=overlap, batch_size=batch_size)
    order = in_order(found, scores)
    assert sorted(order) == list(range(len(boxes)))
    assert np.allclose(found.geometry, boxes[order], atol=1e-5)
    assert np.array_equal(found.labels, labels[order])


@settings(max_examples=15, deadline=None)
@given(**SCENES)
def test_masks_smaller_than_the_overlap_come_back_once_and_whole(
    seed, height, width, window, shared, batch_size
) -> None:
    _, overlap, boxes, labels, scores = scene(seed, height, width, window, shared)
    model = Perfect("masks", boxes, labels, scores)
    whole = model._masks(np.zeros(2, int), max(height, width))
    found = search(model, Places(height, width), window_size=window, overlap=overlap, batch_size=batch_size)
    order = in_order(found, scores)
    assert sorted(order) == list(whole[1])
    areas = dict(zip(whole[1].tolist(), whole[0].sum(dim=(1, 2)).tolist(), strict=True))
    assert [polygon.area for polygon in found.geometry] == [areas[index] for index in order]
    assert all(shapely.is_valid(found.geometry))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), batch_size=st.integers(2, 9))
def test_neither_batches_nor_the_order_of_windows_change_the_result(seed, batch_size) -> None:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 100, (60, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(2, 40, (60, 2))], 1)
    model = Perfect("boxes", boxes, rng.integers(0, 2, 60), rng.choice(np.float32([0.5, 0.6, 0.7]), 60))
    options = {"window_size": 40, "overlap": 10, "iou_threshold": 0.3}
    one = search(model, Places(110, 130), **options, batch_size=1)
    many = search(model, Places(110, 130), **options, batch_size=batch_size)

    stitcher = ObjectStitcher(Window(0, 0, 110, 130), 40, 10, 0.3)
    windows = grid_windows(Window(0, 0, 110, 130), 40, 10)
    for index in rng.permutation(len(windows)):
        seen = model._see(windows[index].row, windows[index].col, 40)
        place = np.array([windows[index].col, windows[index].row] * 2)
        objects = Objects("boxes", seen.boxes_xyxy.numpy() + place, seen.scores, seen.labels)
        stitcher.add(windows[index], objects, np.ones((40, 40), bool))
    shuffled = stitcher.finish()

    for other in (many, shuffled):
        assert np.array_equal(one.geometry, other.geometry)
        assert np.array_equal(one.scores, other.scores)
        assert np.array_equal(one.labels, other.labels)


def stitch(*placed: tuple[Window, list[list[float]]], scores=None, overlap: int = 10) -> Objects:
    """Boxes of windows of 40 pixels in a scene of two of them side by side."""
    stitcher = ObjectStitcher(Window(0, 0, 40, 80 - overlap), 40, overlap, 0.5)
    for index, (window, boxes) in enumerate(placed):
        score = np.full(len(boxes), 0.9 if scores is None else scores[index], np.float32)
        objects = Objects("boxes", np.array(boxes, float).reshape(-1, 4), score, np.zeros(len(boxes), np.int32))
        stitcher.add(window, objects, np.ones(window.shape, bool))
    return stitcher.finish()


LEFT, RIGHT = Window(0, 0, 40, 40), Window(0, 30, 40, 40)


def test_an_object_larger_than_the_overlap_replaces_its_cut_part() -> None:
    found = stitch((LEFT, [[12, 5, 40, 25]]), (RIGHT, [[31.5, 5, 56, 25]]), scores=[0.99, 0.6])
    assert len(found) == 2
    found = stitch((LEFT, [[8, 5, 39, 25]]), (RIGHT, [[30, 5, 39, 25]]), scores=[0.6, 0.99])
    assert found.geometry.tolist() == [[8, 5, 39, 25]]
    found = stitch((LEFT, [[27, 5, 40, 25]]), (RIGHT, [[31, 5, 55, 25]]), scores=[0.99, 0.6])
    assert found.geometry.tolist() == [[31, 5, 55, 25]]


def test_centres_that_two_windows_each_leave_to_the_other_are_not_lost() -> None:
    found = stitch((LEFT, [[31.4, 5, 38.8, 15]]), (RIGHT, [[31.2, 5, 38.6, 15]]))
    assert len(found) == 1


def test_what_only_another_window_than_the_owner_sees_is_left_out() -> None:
    assert len(stitch((LEFT, [[33, 5, 38.9, 15]]), (RIGHT, []))) == 0


def test_centres_that_two_windows_both_claim_count_once() -> None:
    found = stitch((LEFT, [[31, 5, 38.8, 15]]), (RIGHT, [[31.2, 5, 39, 15]]), scores=[0.6, 0.8])
    assert found.geometry.tolist() == [[31.2, 5, 39, 15]]


def test_objects_of_other_classes_do_not_suppress_each_other() -> None:
    def model(tiles):
        boxes = torch.tensor([[1.0, 1, 9, 9], [1, 1, 9, 8], [1, 1, 9, 9]])
        return [Detections(boxes_xyxy=boxes, scores=torch.tensor([0.9, 0.8, 0.7]), labels=torch.tensor([0, 0, 1]))]

    found = search(model, Places(16, 16), window_size=16, overlap=4)
    assert found.labels.tolist() == [0, 1]


def test_windows_without_a_valid_pixel_skip_the_model_and_invalid_centres_are_left_out() -> None:
    valid = np.zeros((64, 64), bool)
    valid[:12, :20] = True
    boxes = np.array([[2, 2, 8, 8], [2, 8, 8, 18], [50, 50, 60, 60.0]])
    model = Perfect("boxes", boxes, np.zeros(3, int), np.array([0.9, 0.8, 0.7], np.float32))
    seen = []
    found = search(
        model,
        Places(64, 64, valid),
        window_size=20,
        overlap=0,
        batch_size=2,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert model.num_tiles == 1
    assert found.geometry.tolist() == [[2, 2, 8, 8]]
    assert seen[-1] == (16, 16)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_part_of_a_scene_gives_the_objects_centred_in_it_at_the_scenes_pixels() -> None:
    boxes = np.array([[30, 40, 36, 48], [90, 90, 96, 96], [12, 20, 17, 24.0]])
    model = Perfect("boxes", boxes, np.zeros(3, int), np.array([0.9, 0.8, 0.7], np.float32))
    extent = Window(22, 13, 50, 61)
    found = search(model, Places(100, 100), window_size=32, overlap=8, extent=extent)
    assert found.geometry.tolist() == [[30, 40, 36, 48], [13, 22, 17, 24]]


def test_scores_below_the_threshold_are_left_out() -> None:
    boxes = np.array([[2, 2, 8, 8], [12, 12, 18, 18.0]])
    model = Perfect("boxes", boxes, np.zeros(2, int), np.array([0.3, 0.29], np.float32))
    assert len(search(model, Places(20, 20), window_size=20, overlap=0, score_threshold=np.float32(0.3))) == 1


def test_a_scene_without_objects_gives_none() -> None:
    model = Perfect("boxes", np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, np.float32))
    found = search(model, Places(50, 50), window_size=20, overlap=5)
    assert (len(found), found.geometry.shape) == (0, (0, 4))
    nothing = search(model, Places(50, 50, np.zeros((50, 50), bool)), window_size=20, overlap=5)
    assert (len(nothing), model.num_tiles) == (0, 9)


def test_broken_polygons_are_repaired_with_all_their_area() -> None:
    bow = shapely.Polygon([(2, 2), (8, 8), (8, 2), (2, 8)])
    found = search(
        lambda tiles: [Detections(polygons=[bow], scores=[0.9], labels=[1])], Places(16, 16), window_size=16, overlap=0
    )
    assert shapely.is_valid(found.geometry[0])
    assert found.geometry[0].area == pytest.approx(18)


def test_masks_in_parts_and_with_holes_keep_their_pixels() -> None:
    mask = np.zeros((1, 16, 16), bool)
    mask[0, 2:9, 2:9] = True
    mask[0, 4:6, 4:7] = False
    mask[0, 9:12, 9:12] = True
    found = search(
        lambda tiles: [Detections(masks=mask, scores=[0.9], labels=[1])], Places(16, 16), window_size=16, overlap=0
    )
    assert shapely.is_valid(found.geometry[0])
    assert found.geometry[0].area == mask.sum()
    assert found.bounds().tolist() == [[2, 2, 12, 12]]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], "expected 1 Detections from the model"),
        ([{"boxes": 1}], "expected 1 Detections from the model"),
        ([Detections(scores=[0.9], labels=[0])], "got none"),
        ([Detections(scores=[0.9], labels=[0], boxes_xyxy=[[0, 0, 1, 1]], polygons=[])], "got boxes_xyxy, polygons"),
        ([Detections(scores=[0.9], labels=[0, 1], boxes_xyxy=[[0, 0, 1, 1]])], "of the same n, got"),
        ([Detections(scores=[0.9], labels=[0], boxes_xyxy=[[0, 0, 1]])], "of the same n, got"),
        ([Detections(scores=[0.9], labels=[0], masks=np.ones((1, 8, 8), bool))], "of the same n, got"),
        ([Detections(scores=[0.9], labels=[0], boxes_xyxy=[[0, 0, np.nan, 1]])], "are not finite numbers"),
    ],
)
def test_answers_that_are_no_detections_are_refused(answer, message) -> None:
    with pytest.raises(InputError, match=message):
        search(lambda tiles: answer, Places(16, 16), window_size=16, overlap=0)


def test_another_geometry_in_a_later_window_is_refused() -> None:
    kinds = iter([{"boxes_xyxy": [[0, 0, 1, 1]]}, {"oriented_boxes": [[2, 2, 2, 1, 0]]}])
    with pytest.raises(InputError, match="expected boxes from the model in every window, got oriented_boxes"):
        search(
            lambda tiles: [Detections(scores=[0.9], labels=[0], **next(kinds))],
            Places(16, 32),
            window_size=16,
            overlap=0,
        )


def test_bfloat16_answers_are_taken() -> None:
    def model(tiles):
        scores = torch.tensor([0.75], dtype=torch.bfloat16)
        return [Detections(scores=scores, labels=torch.tensor([0]), boxes_xyxy=torch.tensor([[1.0, 1, 5, 5]]))]

    assert as_float(Places(4, 4).read(Window(0, 0, 4, 4))).dtype == np.float32
    found = search(model, Places(16, 16), window_size=16, overlap=0, dtype=torch.bfloat16)
    assert found.scores.tolist() == [0.75]
