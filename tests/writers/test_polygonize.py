import numpy as np
import pytest
import rasterio.features
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from perf_vit.errors import InputError
from perf_vit.writers import polygonize_classes


def class_map(seed: int, height: int, width: int, blob: float) -> np.ndarray:
    """Classes 0 to 2 and nodata, in blobs: areas with holes, and pixels that meet at corners only."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal((4, height, width)), (0, blob, blob))
    return np.array([0, 1, 2, 255], np.uint8)[noise.argmax(0)]


def whole(labels: np.ndarray) -> list[tuple[int, shapely.Polygon]]:
    shapes = rasterio.features.shapes(labels, mask=(labels != 0) & (labels != 255), connectivity=4)
    return [(int(value), shapely.geometry.shape(shape)) for shape, value in shapes]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10_000),
    height=st.integers(1, 45),
    width=st.integers(1, 45),
    block=st.integers(1, 20),
    blob=st.sampled_from([0, 0.7, 2]),
)
def test_blocks_leave_no_trace_in_the_polygons(make_scene, seed, height, width, block, blob) -> None:
    labels = class_map(seed, height, width, blob)
    path = make_scene(pixels=labels[None], nodata=255)
    polygons, classes = polygonize_classes(path, skip=[0], block_px=block)
    expected = whole(labels)
    assert len(polygons) == len(expected)
    assert all(shapely.is_valid(polygons))
    by_place = {(value, *p.bounds, p.area): [] for value, p in expected}
    for value, p in expected:
        by_place[value, *p.bounds, p.area].append(p)
    for value, p in zip(classes.tolist(), polygons, strict=True):
        assert any(shapely.equals(p, other) for other in by_place[value, *p.bounds, p.area])
    for value in (1, 2):
        assert sum(p.area for p in polygons[classes == value]) == (labels == value).sum()


def test_small_areas_can_be_left_out_after_joining(make_scene) -> None:
    labels = np.zeros((1, 20, 20), np.uint8)
    labels[0, 7:9, 3:15] = 1
    labels[0, 15, 15] = 1
    polygons, classes = polygonize_classes(make_scene(pixels=labels, nodata=255), skip=[0], block_px=8, min_area_px=10)
    assert [p.bounds for p in polygons] == [(3, 7, 15, 9)]
    assert shapely.get_num_coordinates(polygons).tolist() == [5]
    assert classes.tolist() == [1]


def test_simplified_outlines_have_fewer_corners_and_stay_close(make_scene) -> None:
    rows, cols = np.mgrid[:60, :60]
    disc = ((rows - 30) ** 2 + (cols - 30) ** 2 <= 25**2).astype(np.uint8)
    path = make_scene(pixels=disc[None], nodata=255)
    (exact,), (simple,) = (polygonize_classes(path, skip=[0], simplify_px=px)[0] for px in (0, 1.5))
    assert shapely.get_num_coordinates(simple) < shapely.get_num_coordinates(exact) / 3
    assert 0 < shapely.hausdorff_distance(exact, simple) <= 1.5


def test_classes_to_skip_can_be_chosen(make_scene) -> None:
    labels = np.array([[[0, 1], [2, 255]]], np.uint8)
    path = make_scene(pixels=labels, nodata=255)
    assert polygonize_classes(path)[1].tolist() == [0, 1, 2]
    assert polygonize_classes(path, skip=(1, 2))[1].tolist() == [0]
    assert len(polygonize_classes(path, skip=(0, 1, 2))[0]) == 0


def test_a_raster_that_is_no_map_of_classes_is_refused(make_scene) -> None:
    with pytest.raises(InputError, match=r"expected a class map with one uint8 band, .* has 3 of uint16"):
        polygonize_classes(make_scene())
