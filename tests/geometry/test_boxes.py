import numpy as np
import pytest
import shapely

from perf_vit.geometry.boxes import box_areas, oriented_box_corners, paired_intersections, paired_iou


def boxes(seed: int, num: int = 197) -> np.ndarray:
    corners = np.random.default_rng(seed).uniform(0, 10, (num, 2))
    return np.concatenate([corners, corners + np.random.default_rng(seed + 1).uniform(0, 8, (num, 2))], axis=1)


def test_areas_and_overlaps_are_those_of_shapely() -> None:
    first, second = boxes(0), boxes(2)
    a, b = shapely.box(*first.T), shapely.box(*second.T)
    shared = shapely.area(shapely.intersection(a, b))
    assert 0 < (shared == 0).sum() < 197
    assert np.allclose(box_areas(first), shapely.area(a))
    assert np.allclose(paired_intersections(first, second), shared)
    assert np.allclose(paired_iou(first, second), shared / shapely.area(shapely.union(a, b)))


def test_boxes_broadcast_to_all_pairs() -> None:
    first, second = boxes(0, 7), boxes(2, 5)
    pairs = paired_iou(first[:, None], second)
    assert pairs.shape == (7, 5)
    assert pairs[3, 4] == paired_iou(first[3], second[4])


def test_boxes_without_area_share_nothing() -> None:
    assert paired_iou(np.array([1.0, 1, 1, 1]), np.array([1.0, 1, 1, 1])) == 0
    assert box_areas(np.array([5.0, 5, 1, 1])) == 0


@pytest.mark.parametrize("angle", [-np.pi / 2, -0.3, 0, 1.2])
def test_corners_are_those_of_a_turned_box(angle) -> None:
    box = np.array([30, 20, 8, 3, angle])
    turned = shapely.affinity.rotate(shapely.box(26, 18.5, 34, 21.5), angle, use_radians=True)
    got = shapely.Polygon(oriented_box_corners(box))
    assert shapely.hausdorff_distance(shapely.normalize(got), shapely.normalize(turned)) < 1e-12
    assert oriented_box_corners(np.tile(box, (6, 1))).shape == (6, 4, 2)
    assert oriented_box_corners(np.zeros((0, 5))).shape == (0, 4, 2)
