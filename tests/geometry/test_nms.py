from collections.abc import Callable

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from perf_vit.geometry.boxes import oriented_box_corners
from perf_vit.geometry.nms import Overlaps, greedy_nms
from perf_vit.geometry.objects import object_polygons


def crowd(kind: str, seed: int, num: int, spread: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    sides, angles = rng.uniform(2, 6, (num, 2)), rng.uniform(-np.pi / 2, np.pi / 2, (num, 1))
    oriented = np.concatenate([rng.uniform(0, spread, (num, 2)), sides, angles], axis=1)
    if kind == "oriented_boxes":
        return oriented
    corners = oriented_box_corners(oriented)
    if kind == "boxes":
        return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    corners[:, 0] += rng.uniform(-3, 3, (num, 2))
    return shapely.make_valid(shapely.polygons(corners), method="structure", keep_collapsed=False)


def naive(polygons: np.ndarray, threshold: float) -> list[int]:
    by = []
    for index, polygon in enumerate(polygons):
        better = [other for other in range(index) if by[other] < 0]
        overlaps = [
            shapely.intersection(polygons[other], polygon).area / shapely.union(polygons[other], polygon).area
            for other in better
        ]
        by.append(next((o for o, iou in zip(better, overlaps, strict=True) if iou > threshold), -1))
    return by


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["boxes", "oriented_boxes", "polygons"]),
    seed=st.integers(0, 10_000),
    num=st.integers(1, 60),
    spread=st.sampled_from([2, 10, 40]),
    threshold=st.floats(0.1, 0.8),
    pairs=st.integers(1, 400),
)
def test_blocks_of_a_crowd_suppress_as_one_by_one(kind, seed, num, spread, threshold, pairs) -> None:
    geometry = crowd(kind, seed, num, spread)
    overlaps = Overlaps(kind, geometry)

    def same(shared, first, second):
        return shared > threshold * (overlaps.areas[first] + overlaps.areas[second] - shared)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("perf_vit.geometry.nms._QUERY_PAIRS", pairs)
        patch.setattr("perf_vit.geometry.nms._PAIRS", 7)
        got = greedy_nms(overlaps, same)
    assert got.tolist() == naive(object_polygons(kind, geometry), threshold)


def greedy_by_loops(boxes: np.ndarray, suppresses: Callable[[float, int, int], bool]) -> list[int]:
    """Compare each box with all better ones that remain, best first."""
    by: list[int] = []
    for worse, (left, top, right, bottom) in enumerate(boxes.tolist()):
        better = [other for other in range(worse) if by[other] < 0]
        shared = [
            max(0, min(right, boxes[other, 2]) - max(left, boxes[other, 0]))
            * max(0, min(bottom, boxes[other, 3]) - max(top, boxes[other, 1]))
            for other in better
        ]
        by.append(next((o for o, area in zip(better, shared, strict=True) if suppresses(area, o, worse)), -1))
    return by


@st.composite
def awkward_boxes(draw) -> np.ndarray:
    # Small whole numbers: many boxes are alike, touch, or have no width or height.
    place, side = st.integers(-3, 3), st.integers(0, 3)
    corners = draw(st.lists(st.tuples(place, place, side, side), max_size=40))
    scale, shift = draw(st.sampled_from([(1, 0), (1e-320, 0), (1e-9, 1e6), (1e12, 0)]))
    boxes = np.array([[x, y, x + width, y + height] for x, y, width, height in corners], float).reshape(-1, 4)
    far = draw(st.lists(st.sampled_from([0.0, 1e3, 1e7]), min_size=len(boxes), max_size=len(boxes)))
    return (boxes + np.array(far)[:, None]) * scale + shift


@settings(max_examples=200, deadline=None)
@given(
    boxes=awkward_boxes(), of_smaller=st.booleans(), num_classes=st.integers(1, 3), pairs=st.sampled_from([1, 9, 1_000])
)
def test_boxes_alike_touching_and_without_area_suppress_as_one_by_one(boxes, of_smaller, num_classes, pairs) -> None:
    overlaps, labels = Overlaps("boxes", boxes), np.arange(len(boxes)) % num_classes
    areas = overlaps.areas

    def rule(shared, first, second):
        union = areas[first] + areas[second] - shared
        whole = np.minimum(areas[first], areas[second]) if of_smaller else union
        return (labels[first] == labels[second]) & (shared > 0.3 * whole)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("perf_vit.geometry.nms._QUERY_PAIRS", pairs)
        assert greedy_nms(overlaps, rule).tolist() == greedy_by_loops(boxes, rule)


@pytest.mark.parametrize("pairs", [1, 20_000])
def test_queries_return_no_more_pairs_than_allowed(pairs, monkeypatch) -> None:
    monkeypatch.setattr("perf_vit.geometry.nms._QUERY_PAIRS", pairs)
    # A hundred boxes far apart, then a heap that is ten times as large.
    boxes = np.concatenate([crowd("boxes", 0, 100, 10_000), crowd("boxes", 1, 1_000, 5)])
    overlaps = Overlaps("boxes", boxes)
    allowed, start = max(pairs, 4 * len(boxes)), 0
    while start < len(boxes):
        asked = np.arange(start, len(boxes))
        asked = asked[: overlaps.num_askable(asked)]
        assert len(overlaps.neighbours(asked)[0]) <= allowed
        start += len(asked)


def test_only_what_stands_suppresses() -> None:
    # Each box overlaps the next by half of its width, an IoU of a third.
    boxes = np.array([[4.0 * i, 0, 4 * i + 8, 5] for i in range(6)])
    overlaps = Overlaps("boxes", boxes)

    def same(shared, first, second):
        return shared > 0.3 * (overlaps.areas[first] + overlaps.areas[second] - shared)

    assert greedy_nms(overlaps, same).tolist() == [-1, 0, -1, 2, -1, 4]


def test_a_crowd_costs_no_more_than_its_size() -> None:
    boxes = np.array([[0.001 * i, 0, 0.001 * i + 8, 5] for i in range(2_000)])
    overlaps = Overlaps("boxes", boxes)
    seen = []

    def same(shared, first, second):
        seen.append(len(first))
        return shared > 0.1 * (overlaps.areas[first] + overlaps.areas[second] - shared)

    assert (greedy_nms(overlaps, same) < 0).sum() == 1
    assert sum(seen) < 2_000 + 128**2


@pytest.mark.parametrize(
    ("kind", "geometry"),
    [
        ("polygons", np.array([shapely.box(0, 0, 4, 4), shapely.Polygon(), shapely.box(0, 0, 4, 5)])),
        ("boxes", np.array([[0, 0, 4, 4], [np.nan] * 4, [0, 0, 4, 5]])),
    ],
)
def test_an_object_without_an_extent_meets_no_other(kind: str, geometry: np.ndarray) -> None:
    overlaps = Overlaps(kind, geometry)
    assert greedy_nms(overlaps, lambda shared, first, second: shared > 0).tolist() == [-1, -1, 0]
