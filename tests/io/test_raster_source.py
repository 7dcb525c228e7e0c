import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.enums import ColorInterp

from perf_vit.errors import InputError
from perf_vit.io import open_source
from perf_vit.types import Window


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
@pytest.mark.parametrize("num_bands", [1, 3, 13])
def test_a_whole_read_equals_rasterio(make_scene, dtype: str, num_bands: int) -> None:
    path = make_scene(dtype=dtype, num_bands=num_bands)
    source = open_source(path)
    image = source.read(source.extent)
    with rasterio.open(path) as dataset:
        assert np.array_equal(image.pixels, dataset.read())
        assert np.array_equal(image.valid, dataset.dataset_mask() > 0)
        assert (source.crs, source.transform, source.nodata) == (dataset.crs, dataset.transform, 0)
    assert image.pixels.dtype == np.dtype(dtype)
    assert (source.size, source.num_bands) == ((70, 90), num_bands)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.integers(-40, 90), col=st.integers(-40, 110), height=st.integers(1, 60), width=st.integers(1, 60))
def test_any_window_equals_the_crop_of_a_padded_read(make_scene, row: int, col: int, height: int, width: int) -> None:
    source = open_source(make_scene(dtype="uint16", nodata=7))
    whole = source.read(source.extent)
    pad = 120
    pixels = np.pad(whole.pixels, ((0, 0), (pad, pad), (pad, pad)), constant_values=7)
    valid = np.pad(whole.valid, pad)
    image = source.read(Window(row, col, height, width))
    rows, cols = slice(row + pad, row + pad + height), slice(col + pad, col + pad + width)
    assert np.array_equal(image.pixels, pixels[:, rows, cols])
    assert np.array_equal(image.valid, valid[rows, cols])
    assert image.transform @ (0, 0) == source.transform @ (col, row)


def test_bands_are_read_in_the_order_given(make_scene) -> None:
    path = make_scene(num_bands=4)
    all_bands, chosen = open_source(path), open_source(path, bands=[4, 1])
    assert np.array_equal(chosen.read(chosen.extent).pixels, all_bands.read(all_bands.extent).pixels[[3, 0]])


def test_a_pixel_is_nodata_only_where_every_band_is(make_scene) -> None:
    pixels = np.full((3, 4, 5), 9, np.uint8)
    pixels[0, 0, 0] = 0
    pixels[:, 1, 1] = 0
    source = open_source(make_scene(pixels=pixels))
    valid = source.read(source.extent).valid
    assert valid[0, 0]
    assert not valid[1, 1]
    assert valid.sum() == 19


def test_undeclared_nodata_can_be_given(make_scene) -> None:
    pixels = np.full((2, 4, 5), 9, np.uint8)
    pixels[:, 1, 1] = 0
    path = make_scene(pixels=pixels, nodata=None)
    assert open_source(path).read(Window(0, 0, 4, 5)).valid.all()
    assert open_source(path, nodata=0).read(Window(0, 0, 4, 5)).valid.sum() == 19


def test_nan_in_any_band_is_invalid(make_scene) -> None:
    pixels = np.ones((2, 4, 5), np.float32)
    pixels[1, 2, 3] = np.nan
    for nodata in (None, float("nan"), -9999.0):
        valid = open_source(make_scene(pixels=pixels, nodata=nodata)).read(Window(0, 0, 4, 5)).valid
        assert not valid[2, 3]
        assert valid.sum() == 19


def test_alpha_becomes_the_mask_and_is_no_band(make_scene) -> None:
    pixels = np.full((4, 6, 5), 200, np.uint8)
    pixels[3, :2] = 0
    path = make_scene(pixels=pixels, nodata=None, photometric="RGB", alpha="YES")
    with rasterio.open(path) as dataset:
        assert dataset.colorinterp[3] == ColorInterp.alpha
    source = open_source(path)
    image = source.read(source.extent)
    assert source.num_bands == 3
    assert not image.valid[:2].any()
    assert image.valid[2:].all()
    assert open_source(path, bands=[1, 4]).num_bands == 2


def test_an_internal_mask_is_honoured(make_scene) -> None:
    path = make_scene(dtype="uint8", nodata=None)
    mask = np.full((70, 90), 255, np.uint8)
    mask[10:20, 30:40] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as dataset:
        dataset.write_mask(mask)
    source = open_source(path)
    assert np.array_equal(source.read(source.extent).valid, mask > 0)


def test_a_raster_one_pixel_high(make_scene) -> None:
    source = open_source(make_scene(height=1, width=200, nodata=None))
    image = source.read(Window(0, 100, 32, 32))
    assert image.valid[0].all()
    assert image.valid.sum() == 32


def test_reduced_reads_keep_their_place(make_scene) -> None:
    source = open_source(make_scene(height=500, width=300, nodata=None))
    image = source.read_reduced(100)
    assert image.pixels.shape == (3, 100, 60)
    right_bottom = image.transform @ (60, 100)
    np.testing.assert_allclose(right_bottom, source.transform @ (300, 500))
    small = source.read_reduced(1000, Window(10, 20, 30, 40))
    assert np.array_equal(small.pixels, source.read(Window(10, 20, 30, 40)).pixels)


def _total(source, window: Window) -> int:
    return int(source.read(window).pixels.astype(np.int64).sum())


def test_threads_and_processes_read_what_one_thread_reads(make_scene) -> None:
    source = open_source(make_scene(height=300, width=300, tiled=True, blockxsize=64, blockysize=64))
    windows = [Window(r, c, 70, 70) for r in range(0, 280, 40) for c in range(0, 280, 40)]
    expected = [_total(source, w) for w in windows]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(_total, [source] * len(windows), windows)) == expected
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        assert list(pool.map(_total, [source] * len(windows), windows)) == expected


def test_a_pickled_source_reads_the_same(make_scene) -> None:
    source = open_source(make_scene(), bands=[2, 1], nodata=3)
    copy = pickle.loads(pickle.dumps(source))
    a, b = source.read(source.extent), copy.read(copy.extent)
    assert np.array_equal(a.pixels, b.pixels)
    assert np.array_equal(a.valid, b.valid)


def test_missing_file(tmp_path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_source(tmp_path / "none.tif")


def test_a_file_that_is_no_raster(tmp_path) -> None:
    (tmp_path / "text.tif").write_text("hello")
    with pytest.raises(InputError, match=r"can't open .* as a raster"):
        open_source(tmp_path / "text.tif")


@pytest.mark.parametrize("bands", [[0], [4], [1, 9], []])
def test_a_band_that_is_not_there(make_scene, bands: list[int]) -> None:
    with pytest.raises(InputError, match="numbers from 1 to 3"):
        open_source(make_scene(), bands=bands)


def test_a_damaged_block_names_file_and_place(make_scene) -> None:
    path = make_scene(height=300, width=300, compress="deflate", tiled=True, blockxsize=64, blockysize=64)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"can't read rows 0 to 300, columns 0 to 300 of .*scene_0.tif: .*damaged"):
        source = open_source(path)
        source.read(source.extent)


def test_a_raster_without_georeference_opens_quietly(make_scene, recwarn) -> None:
    source = open_source(make_scene(crs=None, transform=Affine.identity()))
    assert source.crs is None
    assert "no CRS" in repr(source)
    assert [w for w in recwarn if "georeferenc" in str(w.message).lower() and "perf_vit" in w.filename] == []


def test_closing_is_not_final(make_scene) -> None:
    with open_source(make_scene()) as source:
        before = source.read(source.extent).pixels
    assert np.array_equal(source.read(source.extent).pixels, before)
