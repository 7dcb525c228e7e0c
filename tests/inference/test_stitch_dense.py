import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perf_vit.inference.dense import RowStitcher
from perf_vit.tiling import grid_windows, hann_weights
from perf_vit.types import Window


def _stitch(extent: Window, size: int, overlap: int, scores_of, max_rows: int | None = None) -> np.ndarray:
    windows = grid_windows(extent, size, overlap)
    stitcher = RowStitcher(extent, size, len(scores_of(windows[0])))
    strips = []
    for index, window in enumerate(windows):
        stitcher.add(window, scores_of(window), np.ones(window.shape, bool), hann_weights(size))
        following = windows[index + 1].row if index + 1 < len(windows) else extent.row_stop
        if following != window.row:
            strips += [strip.scores.copy() for strip in stitcher.advance(following, max_rows)]
    return np.concatenate(strips, axis=1)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    size=st.integers(1, 32),
    share=st.floats(0, 0.5),
    seed=st.integers(0, 9),
    max_rows=st.none() | st.integers(1, 9),
)
def test_windows_that_agree_come_back_bit_for_bit(height, width, size, share, seed, max_rows) -> None:
    scene = np.random.default_rng(seed).standard_normal((2, height, width)).astype(np.float32) * 1e6
    padded = np.pad(scene, ((0, 0), (0, size), (0, size)))
    extent = Window(0, 0, height, width)

    def crop(window: Window) -> np.ndarray:
        return padded[:, window.row : window.row_stop, window.col : window.col_stop]

    assert np.array_equal(_stitch(extent, size, int(size * share), crop, max_rows), scene)


def test_windows_that_disagree_are_averaged_by_their_weights() -> None:
    extent, size, overlap = Window(0, 0, 8, 12), 8, 4
    result = _stitch(extent, size, overlap, lambda w: np.full((1, 8, 8), float(w.col), np.float32))
    weights = hann_weights(size)
    total = np.zeros((8, 12))
    summed = np.zeros((8, 12))
    for window in grid_windows(extent, size, overlap):
        total[:, window.col : window.col_stop] += weights
        summed[:, window.col : window.col_stop] += weights * float(window.col)
    np.testing.assert_allclose(result[0], summed / total, rtol=1e-5)
    # the transition is gradual: no step as large as the difference between the two windows
    assert np.abs(np.diff(result[0, 0])).max() < 3


def test_windows_out_of_order_are_refused() -> None:
    stitcher = RowStitcher(Window(0, 0, 16, 8), 8, 1)
    with pytest.raises(AssertionError, match="row by row"):
        stitcher.add(Window(8, 0, 8, 8), np.zeros((1, 8, 8), np.float32), np.ones((8, 8), bool), hann_weights(8))
