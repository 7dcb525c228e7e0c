import json
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slides import NAMES, noise, planes, write_tiff, write_zarr

from perf_vit.errors import DamagedDataError, InputError
from perf_vit.sources import open_source
from perf_vit.sources.slides.arrays import ArrayReader
from perf_vit.sources.slides.fluorescence import find_fluorescent
from perf_vit.types import Window


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("arrays")
    return {
        "tiff": write_tiff(folder / "a.ome.tif", planes(), size=(0.5, 0.5)),
        "zarr-0.4": write_zarr(folder / "a.ome.zarr", planes(), "0.4"),
        "zarr-0.5": write_zarr(folder / "b.zarr", planes(), "0.5"),
    }


class CountingSlices:
    """Counts the bands that are decoded."""

    def __init__(self, read) -> None:
        self._read = read
        self.num_bands = 0

    def __get__(self, reader, owner):
        def read(level: int, window: Window, bands: slice):
            self.num_bands += bands.stop - bands.start
            return self._read(reader, level, window, bands)

        return read


def write_channels(path: Path, pixels: np.ndarray, chunk: int) -> Path:
    """An OME-Zarr of one level, 8 micrometres per pixel, with several channels in a chunk."""
    names = tuple(f"c{number}" for number in range(1, len(pixels) + 1))
    write_zarr(path, [pixels], "0.5", mpp=8, names=names)
    zarr.open_group(path, mode="r+").create_array("0", data=pixels, chunks=(chunk, 32, 32), overwrite=True)
    return path


KINDS = ["tiff", "zarr-0.4", "zarr-0.5"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_levels_and_metadata_are_those_of_the_file(files, kind: str, level: int) -> None:
    source = open_source(files[kind], level=level)
    image = source.read(source.extent)
    assert np.array_equal(image.pixels, planes()[level])
    assert image.valid.all()
    assert source.band_names == NAMES
    assert (source.dtype, source.num_bands) == (np.uint16, 3)
    assert source.mpp == pytest.approx(0.5 * 2**level)
    assert source.downsample_xy == (2**level, 2**level)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    row=st.integers(-20, 300),
    col=st.integers(-20, 220),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    how=st.sampled_from([{"level": 0}, {"mpp": 0.9}, {"mpp": 1.37}, {"mpp": 0.31}]),
)
def test_any_window_equals_the_crop_of_a_padded_read(files, kind, row, col, height, width, how) -> None:
    source = open_source(files[kind], **how)
    whole, pad = source.read(source.extent), 330
    image = source.read(Window(row, col, height, width))
    rows, cols = slice(row + pad, row + pad + height), slice(col + pad, col + pad + width)
    assert np.array_equal(image.pixels, np.pad(whole.pixels, ((0, 0), (pad, pad), (pad, pad)))[:, rows, cols])
    assert np.array_equal(image.valid, np.pad(whole.valid, pad)[rows, cols])


@pytest.mark.parametrize("kind", KINDS)
def test_channels_are_chosen_by_number_or_name(files, kind: str) -> None:
    source = open_source(files[kind], bands=["panCK", 1])
    assert source.band_names == ("panCK", "DAPI")
    assert source.bands == (3, 1)
    assert np.array_equal(source.read(source.extent).pixels, planes()[0][[2, 0]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_of_two_channels_is_refused(tmp_path, kind: str) -> None:
    names = ("DAPI", "CD3", "DAPI")
    path = tmp_path / ("a.ome.tif" if kind == "tiff" else "a.ome.zarr")
    write = write_tiff if kind == "tiff" else write_zarr
    write(path, planes(), *(() if kind == "tiff" else (kind[-3:],)), names=names)
    with pytest.raises(InputError, match=r"'DAPI' is the name of bands 1 and 3 of .*; give the number of one of them"):
        open_source(path, bands=["CD3", "DAPI"])
    source = open_source(path, bands=["CD3", 3])
    assert source.band_names == ("CD3", "DAPI")
    assert np.array_equal(source.read(source.extent).pixels, planes()[0][1:])
    assert open_source(path).band_names == names


def test_other_sizes_agree_between_formats(files) -> None:
    reads = [open_source(files[kind], mpp=1.2) for kind in KINDS]
    first, *others = [source.read(source.extent).pixels for source in reads]
    assert first.shape == (3, 172, 128)
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize(("unit", "size"), [("µm", 0.65), ("nm", 650), ("mm", 0.00065), ("pixel", None)])
def test_units_of_an_ome_tiff_are_converted(tmp_path: Path, unit: str, size: float | None) -> None:
    given = size or 0.65
    path = write_tiff(tmp_path / "u.ome.tiff", [planes()[2]], unit=unit, size=(given, given))
    mpp = open_source(path).mpp
    assert mpp is None if size is None else mpp == pytest.approx(0.65)


def test_a_zarr_without_unit_has_no_pixel_size(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "n.ome.zarr", planes(), "0.4", unit=None)
    assert open_source(path).mpp is None
    with pytest.raises(InputError, match="slide_mpp"):
        open_source(path, mpp=1.0)


def test_colours_of_an_ome_tiff_are_those_of_a_slide(tmp_path: Path) -> None:
    pixels = noise(150, 130)
    source = open_source(write_tiff(tmp_path / "c.ome.tif", [pixels], "YXS", size=(0.5, 0.25)))
    image = source.read(Window(-1, 0, 151, 130))
    assert source.band_names == ("red", "green", "blue")
    assert np.array_equal(image.pixels[:, 1:], pixels.transpose(2, 0, 1))
    assert (image.pixels[:, 0] == 255).all()
    assert source.slide_mpp == (0.5, 0.25)
    assert open_source(source.path, tissue="otsu").read(source.extent).pixels.any()


def test_one_plane_of_floats_may_hold_gaps(tmp_path: Path) -> None:
    pixels = noise(100, 90, 1, "float32")[..., 0]
    pixels[10:20, 10:20] = np.nan
    source = open_source(write_tiff(tmp_path / "f.ome.tif", [pixels], "YX", size=(0.5, 0.5)))
    image = source.read(source.extent)
    assert np.array_equal(image.pixels[0], pixels, equal_nan=True)
    assert np.array_equal(image.valid, np.isfinite(pixels))
    reduced = open_source(source.path, mpp=1.0).read(Window(0, 0, 50, 45))
    assert not reduced.valid[6:9, 6:9].any()
    assert np.isfinite(reduced.pixels).all()


def test_stacks_in_depth_or_time_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "z.ome.tif"
    tifffile.imwrite(
        path, np.zeros((4, 64, 64), np.uint8), ome=True, photometric="minisblack", metadata={"axes": "ZYX"}
    )
    with pytest.raises(InputError, match=r"rows Y, columns X and channels C .* got axes Z 4, Y 64, X 64"):
        open_source(path)
    single, series = np.zeros((1, 2, 1, 64, 64), np.uint8), np.zeros((2, 2, 1, 64, 64), np.uint8)
    flat = open_source(write_zarr(tmp_path / "t.ome.zarr", [single], "0.5", axes="tczyx"))
    assert (flat.num_bands, flat.size) == (2, (64, 64))
    with pytest.raises(InputError, match="got axes T 2"):
        open_source(write_zarr(tmp_path / "t2.ome.zarr", [series], "0.5", axes="tczyx"))


def test_a_window_reads_only_the_tiles_it_needs(files, monkeypatch) -> None:
    source = open_source(files["tiff"])
    places = []
    read = tifffile.FileHandle.read

    def counted(self, size=-1, *args):
        places.append(size)
        return read(self, size, *args)

    monkeypatch.setattr(tifffile.FileHandle, "read", counted)
    source.read(Window(64, 64, 64, 64))
    # One tile of each of three channels, of 105 tiles on this level.
    assert len(places) <= 3
    assert sum(places) < 4 * 64 * 64 * 2


@pytest.mark.parametrize(("chunk", "bands", "num_bands"), [(1, [7, 2, 3], 3), (4, [7, 2, 3], 8), (9, [2], 9)])
def test_bands_are_read_without_the_chunks_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, bands: list[int], num_bands: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 60000, (9, 70, 65), np.uint16)
    path = write_channels(tmp_path / "a.zarr", pixels, chunk)
    monkeypatch.setattr(ArrayReader, "_read_slice", counting := CountingSlices(ArrayReader._read_slice))
    with open_source(path, bands=bands) as source:
        assert np.array_equal(source.read(source.extent).pixels, pixels[[band - 1 for band in bands]])
    assert counting.num_bands == num_bands


@pytest.mark.parametrize("chunk", [1, 4, 9])
def test_tissue_reads_each_channel_once_and_is_that_of_single_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.normal(200, 4, (9, 150, 140))
    for band in range(9):
        pixels[band, 10 + 10 * band : 40 + 10 * band, 30:70] += 900
    path = write_channels(tmp_path / "a.zarr", pixels.astype(np.uint16), chunk)
    with open_source(path) as source:
        image = source.read(source.extent)
    expected = find_fluorescent((band, np.ones(band.shape, bool)) for band in image.pixels)
    monkeypatch.setattr(ArrayReader, "_read_slice", counting := CountingSlices(ArrayReader._read_slice))
    with open_source(path, tissue="auto") as source:
        assert counting.num_bands == 9
        assert np.array_equal(source.read(source.extent).valid, expected)
    assert 0.1 < expected.mean() < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_survive_pickling_threads_and_forks(files, kind: str) -> None:
    source = open_source(files[kind], mpp=0.9)
    expected = _checksum(source)
    assert _checksum(pickle.loads(pickle.dumps(source))) == expected
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(_checksum, [source] * 8)) == {expected}
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as processes:
        assert set(processes.map(_checksum, [source] * 4, timeout=60)) == {expected}


def _checksum(source) -> int:
    return int(source.read(Window(10, 10, 90, 90)).pixels.astype(np.int64).sum())


def test_what_is_no_image_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "a.ome.tif").write_bytes(b"nothing")
    (tmp_path / "b.ome.zarr").mkdir()
    with pytest.raises(InputError, match=r"can't read .*a\.ome\.tif as an OME-TIFF"):
        open_source(tmp_path / "a.ome.tif")
    with pytest.raises(InputError, match=r"can't read .*b\.ome\.zarr as an OME-Zarr"):
        open_source(tmp_path / "b.ome.zarr")
    with pytest.raises(InputError, match="no such file"):
        open_source(tmp_path / "c.ome.tif")


def test_otsu_and_profiles_are_refused_without_colours(files) -> None:
    with pytest.raises(InputError, match="needs red, green and blue"):
        open_source(files["tiff"], tissue="otsu")
    with pytest.raises(InputError, match="icc is for slides"):
        open_source(files["tiff"], icc="srgb")


def _chunk(path: Path, level: int, version: str, channel: int) -> Path:
    """The chunk of rows and columns 64 to 128."""
    return path / str(level) / (f"{channel}.1.1" if version == "0.4" else f"c/{channel}/1/1")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_chunk_that_is_not_stored_is_not_valid(tmp_path, version) -> None:
    levels = planes()
    path = write_zarr(tmp_path / "a.ome.zarr", levels, version)
    _chunk(path, 0, version, channel=1).unlink()
    image = open_source(path).read(Window(50, 60, 100, 90))
    expected = np.ones((3, 100, 90), bool)
    expected[1, 14:78, 4:68] = False
    assert np.array_equal(np.broadcast_to(image.mask, expected.shape), expected)
    assert np.array_equal(image.pixels[expected], levels[0][:, 50:150, 60:150][expected])
    for channel in (0, 2):
        _chunk(path, 0, version, channel).unlink()
    assert np.array_equal(open_source(path).read(Window(50, 60, 100, 90)).valid, expected[1])


def test_a_shard_that_is_not_stored_is_not_valid(tmp_path) -> None:
    path = write_zarr(tmp_path / "a.ome.zarr", planes(), "0.5")
    group = zarr.open_group(path, mode="a")
    pixels = group["0"][...]
    array = group.create_array("0", shape=pixels.shape, chunks=(1, 32, 32), shards=(3, 128, 128), dtype=pixels.dtype,
                               overwrite=True)  # fmt: skip
    array[...] = pixels
    (path / "0" / "c" / "0" / "1" / "0").unlink()
    valid = open_source(path).read(Window(100, 100, 100, 100)).valid
    expected = np.ones((100, 100), bool)
    expected[28:, :28] = False
    assert np.array_equal(valid, expected)


def test_a_lost_chunk_of_an_array_without_fill_value_is_damage(tmp_path) -> None:
    path = write_zarr(tmp_path / "a.ome.zarr", planes(), "0.4")
    header = path / "0" / ".zarray"
    header.write_text(json.dumps({**json.loads(header.read_text()), "fill_value": None}))
    _chunk(path, 0, "0.4", channel=1).unlink()
    source = open_source(path)
    with pytest.raises(DamagedDataError, match=r"can't read rows 50 to 150.*the chunk .*1\.1\.1 is missing"):
        source.read(Window(50, 60, 100, 90))
    assert source.read(Window(0, 0, 60, 60)).valid.all()
