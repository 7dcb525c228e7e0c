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
    block=st.integers(1, 70),
)
def test_blocks_of_a_crowd_suppress_as_one_by_one(kind, seed, num, spread, threshold, block) -> None:
    geometry = crowd(kind, seed, num, spread)
    overlaps = Overlaps(kind, geometry)

    def same(shared, first, second):
        return shared > threshold * (overlaps.areas[first] + overlaps.areas[second] - shared)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("perf_vit.geometry.nms._BLOCK", block)
        patch.setattr("perf_vit.geometry.nms._LOOKUP", 3)
        patch.setattr("perf_vit.geometry.nms._PAIRS", 7)
        got = greedy_nms(overlaps, same)
    assert got.tolist() == naive(object_polygons(kind, geometry), threshold)


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
