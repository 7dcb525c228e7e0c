"""Strips of a raster come in any order, from several writers."""

import errno
import os
import tempfile
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perf_vit.errors import OutputError
from perf_vit.writers import RasterLayout, StripStore, write_cog
from perf_vit.writers.layout import BLOCK_PX
from perf_vit.writers.pyramid import Pyramid
from perf_vit.writers.scratch import _allocate

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
        write_cog(store, LAYOUT, tmp_path / "map.tmp", Path("map.tif"))


def _made(store: StripStore, layout: RasterLayout) -> bytes:
    made = store.folder / "map.tmp"
    write_cog(store, layout, made, Path("map.tif"))
    return made.read_bytes()


def test_the_map_is_the_same_however_its_rows_came(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (2, 1301, 700)).astype(np.uint8)
    layout = RasterLayout(height=1301, width=700, num_bands=2, dtype=pixels.dtype, nodata=9)
    starts = list(range(0, 1301, 90))
    orders = {"down": starts, "up": starts[::-1], "at once": [0]}
    made = {}
    for early in (False, True):
        for name, rows in orders.items():
            folder = tmp_path / f"{name} {early}"
            folder.mkdir()
            store = StripStore(folder, layout, Path("map.tif"), encode_early=early)
            step = 1301 if name == "at once" else 90
            for row in rows:
                store.write(row, pixels[:, row : row + step])
            made[name, early] = _made(store, layout)
            store.close()
            assert not [path for path in folder.iterdir() if not path.name.startswith(("rows_", "map.tmp"))]
    assert len(set(made.values())) == 1


def test_a_strip_that_changed_on_disk_is_found(tmp_path) -> None:
    store = StripStore(tmp_path, LAYOUT, Path("map.tif"))
    store.write(0, _strip(HEIGHT))
    (good,) = tmp_path.iterdir()
    store.write(0, 2 * _strip(HEIGHT))
    (other,) = set(tmp_path.iterdir()) - {good}
    other.replace(good)
    with pytest.raises(OutputError, match="rows from 0 on differ on disk"):
        write_cog(store, LAYOUT, tmp_path / "map.tmp", Path("map.tif"))


def test_an_error_of_early_blocks_is_reported(tmp_path, monkeypatch) -> None:
    layout = RasterLayout(height=600, width=20, num_bands=1, dtype=np.dtype("uint8"))
    store = StripStore(tmp_path, layout, Path("map.tif"), encode_early=True)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("perf_vit.writers.pyramid.encode_blocks", fail)
    for row in (0, 512):
        store.write(row, np.ones((1, min(512, 600 - row), 20), np.uint8))
    with pytest.raises(OutputError, match="no space left"):
        write_cog(store, layout, tmp_path / "map.tmp", Path("map.tif"))
    store.close()


class Encoder:
    """Encodes blocks slowly, and counts the bytes of the parts that are being encoded."""

    def __init__(self) -> None:
        self.most, self.num_bytes, self.lock = 0, 0, threading.Lock()

    def __call__(self, pixels: np.ndarray, layout: RasterLayout) -> list[bytes]:
        with self.lock:
            self.num_bytes += pixels.nbytes
            self.most = max(self.most, self.num_bytes)
        time.sleep(0.01)
        with self.lock:
            self.num_bytes -= pixels.nbytes
        return [bytes(8)] * -(-pixels.shape[2] // BLOCK_PX)


@pytest.mark.parametrize("num_parts", [1, 3])
def test_parts_that_wait_for_compression_are_bounded_in_bytes(tmp_path, monkeypatch, num_parts: int) -> None:
    encoder, part_bytes = Encoder(), 2 * BLOCK_PX**2
    monkeypatch.setattr("perf_vit.writers.blocks._BYTES_AT_ONCE", part_bytes)
    monkeypatch.setattr("perf_vit.writers.pyramid._WAITING_BYTES", num_parts * part_bytes)
    monkeypatch.setattr("perf_vit.writers.pyramid.num_processors", lambda: 8)
    monkeypatch.setattr("perf_vit.writers.pyramid.encode_blocks", encoder)
    layout = RasterLayout(height=512, width=10 * 512, num_bands=2, dtype=np.dtype("uint8"))
    with closing(Pyramid(layout, tmp_path)) as pyramid:
        pyramid.add(np.ones((2, 512, 10 * 512), np.uint8))
        pyramid.finish()
    assert part_bytes <= encoder.most <= num_parts * part_bytes
    assert [len(level.sizes) for level in pyramid.levels] == [10, 5, 3, 2, 1]


def test_rows_of_many_bands_are_read_band_by_band(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 100, 300)).astype(np.uint8)
    layout = RasterLayout(height=100, width=300, num_bands=40, dtype=pixels.dtype)
    store = StripStore(tmp_path, layout, Path("map.tif"))
    store.write(0, pixels)
    tracemalloc.start()
    try:
        rows = store._read(0, 100)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(rows, pixels)
    assert peak < 1.3 * pixels.nbytes


def test_memory_for_blocks_of_many_bands_does_not_grow_with_the_width(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("perf_vit.writers.pyramid.encode_blocks", Encoder())
    monkeypatch.setattr("perf_vit.writers.pyramid._WAITING_BYTES", 1 << 20)
    monkeypatch.setattr("perf_vit.writers.scratch.LARGE_BYTES", 1 << 20)
    layout = RasterLayout(height=1030, width=1500, num_bands=16, dtype=np.dtype("uint16"))
    store = StripStore(tmp_path, layout, Path("map.tif"))
    for row in range(0, 1030, 103):
        store.write(row, np.zeros((16, 103, 1500), np.uint16))
    tracemalloc.start()
    try:
        store.pyramid().close()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # One block of all bands, and one band of a row of blocks as numbers of 32 bits, a few times.
    row_bytes = 16 * 512 * 1500 * 2
    assert peak < 0.9 * row_bytes


@pytest.mark.parametrize("overviews", ["nearest", "average"])
def test_rows_that_are_kept_on_disk_give_the_same_map(tmp_path, monkeypatch, overviews: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 20, (3, 1025, 601)).astype(np.uint8)
    layout = RasterLayout(height=1025, width=601, num_bands=3, dtype=pixels.dtype, nodata=9, overviews=overviews)
    made = []
    for name, most in (("memory", 1 << 28), ("disk", 1)):
        (tmp_path / name).mkdir()
        store = StripStore(tmp_path / name, layout, Path("map.tif"))
        store.write(0, pixels)
        monkeypatch.setattr("perf_vit.writers.scratch.LARGE_BYTES", most)
        made.append(_made(store, layout))
    assert made[0] == made[1]
    assert {path.name[:5] for path in (tmp_path / "disk").iterdir()} == {"rows_", "map.t"}


@pytest.mark.parametrize("error", [None, errno.EOPNOTSUPP])
def test_room_for_an_array_is_taken_before_it_is_written(tmp_path, monkeypatch, error: int | None) -> None:
    def refuse(*_: object) -> None:
        raise OSError(error, "not supported")

    if error is not None:
        monkeypatch.setattr("perf_vit.writers.scratch.os.posix_fallocate", refuse, raising=False)
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        _allocate(file, 5_000_000)
        status = os.fstat(file.fileno())
    assert status.st_size == 5_000_000
    # Not a sparse file.
    assert status.st_blocks * 512 >= 5_000_000


def test_rows_for_which_the_disk_has_no_room_are_a_clear_error(tmp_path, monkeypatch) -> None:
    store = StripStore(tmp_path, LAYOUT, Path("map.tif"))
    store.write(0, _strip(HEIGHT))
    monkeypatch.setattr("perf_vit.writers.scratch.LARGE_BYTES", 1)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("perf_vit.writers.scratch._allocate", fail)
    with pytest.raises(OutputError, match=r"can't write map.tif: No space left on device"):
        write_cog(store, LAYOUT, tmp_path / "map.tmp", Path("map.tif"))
