import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perf_vit.data import count_class_pixels, make_ship_scene
from perf_vit.data.segmentation_tiles import LabelledSource
from perf_vit.labels import open_labels
from perf_vit.sources import open_raster
from perf_vit.transforms import Normalizer
from perf_vit.types import Window


@pytest.fixture(scope="module")
def ships(tmp_path_factory):
    scene = make_ship_scene(tmp_path_factory.mktemp("ships"), seed=3, size_px=200, num_targets=12)
    source = open_raster(scene.image)
    return source, open_labels(scene.labels, source, classes=["sea", "ship", "wreck"], attribute="class")


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 140), st.integers(1, 140), st.integers(1, 97))
def test_each_labelled_pixel_of_a_region_counts_once(ships, row, col, height, width, window_px) -> None:
    region = LabelledSource(*ships, Window(row, col, height, width))
    labels = region.read(region.region, Normalizer((0.0,) * 4, (1.0,) * 4))[1]
    expected = [int((labels == index).sum()) for index in range(3)]
    # The largest window holds a hundredth of the region at least, or the test would take minutes.
    window_px = max(window_px, height // 10, width // 10)
    assert count_class_pixels([region], 3, window_px=window_px) == expected
    assert count_class_pixels([region, region], 3, window_px=window_px) == [2 * count for count in expected]


def test_of_many_windows_some_are_read_over_all_of_the_region(ships) -> None:
    reads = []

    class Watched:
        def read(self, window: Window) -> np.ndarray:
            reads.append(window.row)
            return np.ones(window.shape, np.uint8)

    source = LabelledSource(ships[0], Watched(), Window(0, 0, 200, 200))
    counts = count_class_pixels([source], 2, window_px=20, max_windows=7)
    assert len(reads) == 7
    assert min(reads) == 0
    assert max(reads) == 180
    assert 0 < counts[1] <= 7 * 400
