"""A registered reader's files are found and opened wherever slides are."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from perf_vit.errors import InputError
from perf_vit.inference.inputs import find_inputs
from perf_vit.sources import (
    READERS,
    Level,
    PyramidReader,
    SlideSource,
    find_images,
    find_reader,
    open_source,
    register_source,
)
from perf_vit.types import Window


class NumpyReader(PyramidReader):
    """Arrays [C, H, W]."""

    def __init__(self, path: str) -> None:
        self._pixels = np.load(path)
        _, height, width = self._pixels.shape
        self.levels = (Level(height, width),)
        self.dtype = self._pixels.dtype
        self.band_names = tuple(f"band_{number}" for number in range(1, len(self._pixels) + 1))

    def read(self, level, window):
        rows, cols = slice(window.row, window.row_stop), slice(window.col, window.col_stop)
        return self._pixels[:, rows, cols], np.ones((1, *window.shape), bool)


@pytest.fixture
def arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(READERS, "_objects", dict(READERS))
    register_source(".npy", ".raw.npy")(NumpyReader)
    rng = np.random.default_rng(0)
    for name in ("a.npy", "b.NPY"):
        with (tmp_path / name).open("wb") as file:
            np.save(file, rng.integers(0, 1000, (2, 37, 53), np.uint16))
    return tmp_path


def test_files_are_opened_by_their_suffix(arrays) -> None:
    pixels = np.load(arrays / "a.npy")
    with open_source(arrays / "a.npy", bands=[2]) as source:
        assert isinstance(source, SlideSource)
        assert (source.size, source.band_names, source.mpp) == ((37, 53), ("band_2",), None)
        image = pickle.loads(pickle.dumps(source)).read(Window(-1, 50, 5, 6))
    expected = np.zeros((5, 6), np.uint16)
    expected[1:, :3] = pixels[1, :4, 50:]
    np.testing.assert_array_equal(image.pixels[0], expected)
    assert image.valid.sum() == 12


def test_folders_and_globs_find_them(arrays) -> None:
    both = [arrays / "a.npy", arrays / "b.NPY"]
    assert find_images([arrays]) == both
    assert find_images([arrays / "*.npy"]) == both[:1]
    assert [(Path(each.path), each.output.name) for each in find_inputs([arrays], arrays / "maps")] == [
        (both[0], "a.ome.tif"),
        (both[1], "b.ome.tif"),
    ]


def test_options_of_rasters_are_refused(arrays) -> None:
    with pytest.raises(InputError, match=r"nodata is for rasters, and .*a\.npy is a slide; leave it out"):
        open_source(arrays / "a.npy", nodata=0)
    with pytest.raises(InputError, match="icc is for slides that OpenSlide reads"):
        open_source(arrays / "a.npy", icc="srgb")


def test_the_longest_suffix_decides(arrays) -> None:
    assert find_reader("x/y.RAW.npy") is NumpyReader
    assert find_reader("a.ome.tif") is not None
    assert find_reader("a.tif") is None
    assert find_reader("npy") is None


@pytest.mark.parametrize("suffix", ["npz", ".NPZ"])
def test_suffixes_are_in_lower_case_with_a_dot(suffix: str) -> None:
    with pytest.raises(ValueError, match="must be in lower case and start with a dot"):
        register_source(suffix)
