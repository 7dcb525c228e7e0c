"""Strips of a raster come in any order, from several writers."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perf_vit.errors import OutputError
from perf_vit.writers import RasterLayout, StripStore

HEIGHT = 40
LAYOUT = RasterLayout(height=HEIGHT, width=3, num_bands=1, dtype=np.dtype("uint8"))


def _strip(num_rows: int) -> np.ndarray:
    return np.ones((1, num_rows, 3), np.uint8)


@settings(max_examples=30, deadline=None)
@given(
    strips=st.lists(st.tuples(st.integers(0, HEIGHT - 9), st.integers(1, 9)), max_size=8),
    bounds=st.tuples(st.integers(0, HEIGHT), st.integers(0, HEIGHT)).map(sorted),
)
def test_gaps_are_the_rows_that_no_strip_holds(tmp_path_factory, strips, bounds) -> None:
    store = StripStore(tmp_path_factory.mktemp("strips"), LAYOUT, Path("map.tif"))
    for row, num_rows in strips:
        store.write(row, _strip(num_rows))
    there = {row + i for row, num_rows in strips for i in range(num_rows)}
    gaps = store.gaps(*bounds)
    assert [row for start, stop in gaps for row in range(start, stop)] == sorted(set(range(*bounds)) - there)
    assert all(start < stop for start, stop in gaps)
    assert all(before[1] < after[0] for before, after in pairwise(gaps))


def test_several_writers_may_write_the_same_strip_at_once(tmp_path) -> None:
    store = StripStore(tmp_path, LAYOUT, Path("map.tif"))
    with ThreadPoolExecutor(8) as pool:
        for written in [pool.submit(store.write, i % 4 * 10, _strip(10)) for i in range(64)]:
            written.result()
    assert store.gaps(0, HEIGHT) == []
    assert len(list(tmp_path.iterdir())) == 4


def test_a_raster_with_missing_rows_is_refused(tmp_path) -> None:
    store = StripStore(tmp_path, LAYOUT, Path("map.tif"))
    store.write(0, _strip(10))
    store.write(30, _strip(10))
    with pytest.raises(OutputError, match=r"expected 40 rows for map.tif, got 20"):
        store.mosaic(LAYOUT)
