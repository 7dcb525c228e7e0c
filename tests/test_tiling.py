import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf_vit.errors import OptionError, PerfVitError
from perf_vit.inference import SegmentationPredictOptions
from perf_vit.tiling import (
    BLENDS,
    grid_windows,
    hann_weights,
    random_window,
    random_window_holding,
    register_blend,
)
from perf_vit.types import Window

extents = st.builds(Window, st.integers(-5, 40), st.integers(-5, 40), st.integers(1, 90), st.integers(1, 90))


@given(extent=extents, size=st.integers(1, 40), share=st.floats(0, 0.99))
def test_grid_covers_every_pixel_and_stays_inside(extent: Window, size: int, share: float) -> None:
    overlap = min(int(size * share), size - 1)
    count = np.zeros(extent.shape, int)
    windows = grid_windows(extent, size, overlap)
    for window in windows:
        inside = window.intersect(extent)
        assert inside is not None
        count[inside.slices_in(extent)] += 1
        assert window.row_stop <= extent.row_stop or extent.height < size
        assert window.col_stop <= extent.col_stop or extent.width < size
    assert count.min() >= 1
    assert len(set(windows)) == len(windows)
    assert windows == sorted(windows, key=lambda w: (w.row, w.col))


def test_neighbours_share_the_overlap() -> None:
    cols = sorted({w.col for w in grid_windows(Window(0, 0, 50, 100), 32, 8)})
    assert cols == [0, 24, 48, 68]


def test_a_source_smaller_than_the_window_gets_one_window() -> None:
    assert grid_windows(Window(0, 0, 1, 7), 32, 8) == [Window(0, 0, 32, 32)]


@pytest.mark.parametrize("overlap", [-1, 32, 50])
def test_an_overlap_that_never_advances_is_refused(overlap: int) -> None:
    with pytest.raises(PerfVitError, match="overlap must lie between"):
        grid_windows(Window(0, 0, 50, 50), 32, overlap)


def test_a_window_without_size_is_refused() -> None:
    with pytest.raises(PerfVitError, match="window_size"):
        grid_windows(Window(0, 0, 50, 50), 0, 0)


@given(extent=extents, size=st.integers(1, 40), seed=st.integers(0, 99))
def test_random_windows_stay_inside(extent: Window, size: int, seed: int) -> None:
    window = random_window(extent, size, np.random.default_rng(seed))
    assert window.shape == (size, size)
    inside = window.intersect(extent)
    assert inside is not None
    assert inside.shape == (min(size, extent.height), min(size, extent.width))


def test_random_windows_reach_every_place() -> None:
    rng = np.random.default_rng(0)
    places = {(w.row, w.col) for w in (random_window(Window(2, 3, 5, 6), 4, rng) for _ in range(500))}
    assert places == {(r, c) for r in (2, 3) for c in (3, 4, 5)}


@given(extent=extents, size=st.integers(1, 40), row=st.floats(0, 1), col=st.floats(0, 1), seed=st.integers(0, 99))
def test_windows_that_hold_a_pixel_stay_inside(extent: Window, size: int, row: float, col: float, seed: int) -> None:
    pixel = extent.row + round(row * (extent.height - 1)), extent.col + round(col * (extent.width - 1))
    window = random_window_holding(extent, *pixel, size, np.random.default_rng(seed))
    assert window.shape == (size, size)
    inside = window.intersect(extent)
    assert inside is not None
    assert inside.shape == (min(size, extent.height), min(size, extent.width))
    assert inside.intersect(Window(*pixel, 1, 1)) is not None


def test_windows_that_hold_a_pixel_have_it_at_every_place() -> None:
    rng = np.random.default_rng(0)
    windows = [random_window_holding(Window(2, 3, 9, 20), 4, 10, 5, rng) for _ in range(500)]
    assert {(w.row, w.col) for w in windows} == {(r, c) for r in range(2, 5) for c in range(6, 11)}


@pytest.mark.parametrize("size", [1, 2, 7, 2048])
def test_weights_are_positive_symmetric_and_largest_in_the_middle(size: int) -> None:
    weights = hann_weights(size)
    assert weights.shape == (size, size)
    assert weights.dtype == np.float32
    assert weights.min() > 0
    np.testing.assert_allclose(weights, weights[::-1, ::-1], rtol=1e-4)
    assert weights[size // 2, size // 2] == weights.max()


@pytest.mark.parametrize("name", BLENDS)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_weights_are_positive_symmetric_and_at_most_one(name: str, size: int) -> None:
    weights = BLENDS[name](size)
    assert (weights.shape, weights.dtype) == ((size, size), np.float32)
    assert 0 < weights.min() <= weights.max() <= 1
    np.testing.assert_allclose(weights, weights[::-1, ::-1].T, rtol=1e-6)


def test_a_registered_blend_is_an_option_of_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BLENDS, "_objects", dict(BLENDS))
    with pytest.raises(OptionError, match="blend must be one of hann, gaussian, got flat"):
        SegmentationPredictOptions(blend="flat")
    register_blend("flat")(lambda size: np.ones((size, size), np.float32))
    assert SegmentationPredictOptions(blend="flat").blend == "flat"
