from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perf_vit.data import class_pixels, count_class_pixels, make_ship_scene
from perf_vit.data.class_pixels import count_labelled_pixels, find_labelled_pixels
from perf_vit.data.segmentation_tiles import LabelledSource
from perf_vit.labels import open_labels
from perf_vit.sources import open_raster
from perf_vit.transforms import Normalizer
from perf_vit.types import IGNORE_INDEX, Window


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
    counts, labelled = count_labelled_pixels([source], 2, window_px=20, max_windows=7)
    assert len(reads) == 7
    assert min(reads) == 0
    assert max(reads) == 180
    assert 0 < counts[1] == labelled <= 7 * 400


class Scene:
    """Labels [(K,) h, w] of a scene without a file, whose columns are valid up to the given one."""

    def __init__(self, labels: np.ndarray, num_valid_cols: int | None = None) -> None:
        self.labels, self.num_images = labels, 0
        self.num_valid_cols = labels.shape[-1] if num_valid_cols is None else num_valid_cols

    def part(self, first_col: int = 0) -> LabelledSource:
        *_, height, width = self.labels.shape
        source = SimpleNamespace(read=self._image, path="scene.tif")
        return LabelledSource(source, SimpleNamespace(read=self._read), Window(0, first_col, height, width - first_col))

    def _read(self, window: Window) -> np.ndarray:
        return self.labels[..., window.row : window.row_stop, window.col : window.col_stop]

    def _image(self, window: Window) -> SimpleNamespace:
        self.num_images += 1
        cols = np.arange(window.col, window.col_stop)
        return SimpleNamespace(valid=np.broadcast_to(cols < self.num_valid_cols, window.shape))


@pytest.mark.parametrize("multilabel", [False, True])
def test_a_class_in_one_of_many_windows_is_counted(multilabel: bool) -> None:
    """Of 600 labelled windows 20 are read, and the one with the rare class."""
    values = np.full((10, 10_000), IGNORE_INDEX, np.uint8)
    values[:, :8000:2] = 0
    values[4:6, 4321] = 1
    values[:, 9500] = 2
    labels = np.where(values == IGNORE_INDEX, values, values == np.arange(4)[:, None, None]) if multilabel else values
    scene, told = Scene(labels.astype(np.uint8), num_valid_cols=9000), []
    counts = count_class_pixels(
        [scene.part(2000)], 4, window_px=10, max_windows=20, on_window=lambda *given: told.append(given)
    )
    assert counts == [pytest.approx(6000 * 5, rel=0.02), 2, 0, 0]
    assert scene.num_images <= 22
    assert told[-1] == (800, 800)


def test_a_small_annotation_beside_a_large_one_is_drawn_as_often_as_a_window_of_it() -> None:
    labels = np.zeros((512, 512 * 40), np.uint8)
    labels[:, 512 * 8 :] = IGNORE_INDEX
    labels[7:9, 512 * 30] = 1
    pixels = find_labelled_pixels([Scene(labels).part()])
    rare = pixels[pixels[:, 2] == 512 * 30]
    assert set(rare[:, 1].tolist()) == {7, 8}
    assert len(rare) / len(pixels) == 1 / 9
    assert (labels[pixels[:, 1], pixels[:, 2]] != IGNORE_INDEX).all()


def test_of_more_places_than_pixels_can_be_kept_each_keeps_some(monkeypatch) -> None:
    monkeypatch.setattr(class_pixels, "_MAX_PLACES_PX", 40)
    labels = np.zeros((2, 512 * 19), np.uint8)
    pixels = find_labelled_pixels([Scene(labels).part()])
    assert len(pixels) == 40
    assert set((pixels[:, 2] // 512).tolist()) == set(range(19))
