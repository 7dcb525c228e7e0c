import pickle
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rasterio.enums import ColorInterp

from perf_vit.errors import DataWarning, InputError
from perf_vit.sources import describe_source, open_source
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


def test_nan_is_invalid_in_its_band_alone(make_scene) -> None:
    pixels = np.ones((2, 4, 5), np.float32)
    pixels[1, 2, 3] = np.nan
    pixels[:, 0, 0] = np.nan, np.inf
    for nodata in (None, float("nan"), -9999.0):
        image = open_source(make_scene(pixels=pixels, nodata=nodata)).read(Window(0, 0, 4, 5))
        assert np.array_equal(image.band_valid, np.isfinite(pixels))
        assert np.array_equal(image.valid, np.isfinite(pixels).any(0))


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


@pytest.mark.parametrize("options", [{}, {"resolution": (2.0, 3.0)}, {"crs": "EPSG:32638"}])
@pytest.mark.parametrize("mosaic", [False, True])
def test_a_band_tagged_alpha_masks_nothing_once_it_is_read_as_data(make_scene, options, mosaic) -> None:
    pixels = np.full((4, 60, 80), 200, np.uint8)
    pixels[3] = np.random.default_rng(0).integers(0, 255, (60, 80))
    pixels[3, :20] = 0
    # Near infrared: GDAL tags the fourth band of whatever it writes.
    path = make_scene(pixels=pixels, nodata=None)
    with rasterio.open(path) as dataset:
        assert dataset.colorinterp[3] == ColorInterp.alpha
    given = [path] if mosaic else path
    for bands in ([1, 2, 3, 4], [4, 1], [4]):
        source = open_source(given, bands=bands, **options)
        image = source.read(source.extent)
        assert source.mask_name is None
        plain = open_source(make_scene(pixels=pixels[[0, 1, 2]], nodata=None), **options)
        assert np.array_equal(image.valid, plain.read(plain.extent).valid)
        assert np.count_nonzero(image.pixels[bands.index(4)][image.valid] == 0) > 1000


def test_what_is_taken_as_a_mask_is_told_once(make_scene, tmp_path) -> None:
    pixels = np.full((4, 6, 5), 200, np.uint8)
    paths = [make_scene(pixels=pixels, nodata=None) for _ in range(3)]
    with pytest.warns(DataWarning, match=r"band 4 of .*scene_0\.tif is tagged as alpha.*bands=\[1, 2, 3, 4\]"):
        open_source(paths[0], bands=[1, 2, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        open_source(paths[1])
        open_source(paths)
    assert describe_source(open_source(paths[0])).mask == "band 4 (alpha)"
    assert describe_source(open_source(paths[0], bands=[1, 2, 3, 4])).mask is None


@pytest.mark.parametrize(
    ("description", "num_bands"), [("nir", 4), ("Near infrared", 4), ("alpha", 3), ("Alpha band", 3), ("Band 4", 3)]
)
def test_a_band_whose_description_is_no_opacity_is_data(make_scene, description, num_bands, recwarn) -> None:
    path = make_scene(pixels=np.full((4, 6, 5), 200, np.uint8), nodata=None)
    with rasterio.open(path, "r+") as dataset:
        dataset.set_band_description(4, description)
    assert open_source(path).num_bands == num_bands
    assert len([each for each in recwarn if each.category is DataWarning]) == (num_bands == 3)


def test_alpha_of_a_format_that_has_nothing_else_needs_no_warning(tmp_path, recwarn) -> None:
    picture = np.full((6, 5, 4), 200, np.uint8)
    picture[:2, :, 3] = 0
    Image.fromarray(picture).save(tmp_path / "a.png")
    source = open_source(tmp_path / "a.png")
    assert not source.read(source.extent).valid[:2].any()
    assert source.mask_name == "band 4 (alpha)"
    assert not [each for each in recwarn if each.category is DataWarning]


def test_an_internal_mask_is_honoured(make_scene) -> None:
    path = make_scene(dtype="uint8", nodata=None)
    mask = np.full((70, 90), 255, np.uint8)
    mask[10:20, 30:40] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as dataset:
        dataset.write_mask(mask)
    source = open_source(path)
    assert np.array_equal(source.read(source.extent).valid, mask > 0)
    assert source.mask_name == "mask band"


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
    # Before the threads: one that ends holds a lock of PROJ for a moment, which a fork would keep.
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        assert list(pool.map(_total, [source] * len(windows), windows)) == expected
    with ThreadPoolExecutor(4) as pool:
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


def test_nan_nodata_hides_its_band(make_scene) -> None:
    source = open_source(make_scene(dtype="float32", nodata=float("nan")))
    image = source.read(Window(-1, -1, 10, 10))
    assert np.isnan(source.nodata)
    assert np.array_equal(image.valid, np.isfinite(image.pixels).any(0))
    assert image.valid.any()


def test_declared_nodata_that_the_pixels_cannot_hold_hides_nothing(make_scene) -> None:
    path = make_scene(dtype="uint8", nodata=1)
    rasterio.shutil.copy(path, path.with_suffix(".vrt"), driver="VRT")
    text = path.with_suffix(".vrt").read_text()
    path.with_suffix(".vrt").write_text(text.replace("<NoDataValue>1<", "<NoDataValue>0.5<"))
    with rasterio.open(path.with_suffix(".vrt")) as dataset:
        assert dataset.nodata == 0.5
    source = open_source(path.with_suffix(".vrt"))
    assert source.nodata is None
    assert source.read(source.extent).valid.all()


@pytest.mark.parametrize("nodata", [-1, 0.5, 256, float("nan")])
def test_given_nodata_that_the_pixels_cannot_hold_is_refused(make_scene, nodata: float) -> None:
    with pytest.raises(InputError, match="must be a value of its uint8 pixels"):
        open_source(make_scene(dtype="uint8"), nodata=nodata)


def test_complex_pixels_are_refused(make_scene) -> None:
    with pytest.raises(InputError, match="complex"):
        open_source(make_scene(pixels=np.ones((1, 4, 5), np.complex64), nodata=None))


def test_a_container_of_rasters_names_one_to_open(make_scene, tmp_path) -> None:
    layout = {"driver": "GPKG", "height": 40, "width": 40, "count": 3, "dtype": "uint8", "crs": "EPSG:32637"}
    for name, append in (("a", "NO"), ("b", "YES")):
        options = {"RASTER_TABLE": name, "APPEND_SUBDATASET": append, "transform": Affine(3, 0, 4e5, 0, -3, 4.5e6)}
        with rasterio.open(tmp_path / "two.gpkg", "w", **layout, **options) as dataset:
            dataset.write(np.ones((3, 40, 40), np.uint8))
    with pytest.raises(InputError, match=r"no bands; open one of its 2 subdatasets, such as GPKG:.*two.gpkg:a"):
        open_source(tmp_path / "two.gpkg")


def test_failures_say_nothing_on_stderr(make_scene, tmp_path, capfd) -> None:
    path = make_scene(height=300, width=300)
    path.write_bytes(path.read_bytes()[:90_000])
    source = open_source(path)
    with pytest.raises(InputError, match="truncated or damaged"):
        source.read(source.extent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        open_source(tmp_path / "empty")
    assert capfd.readouterr().err == ""


def test_a_reduced_read_outside_the_raster_is_refused(make_scene) -> None:
    with pytest.raises(InputError, match="70 rows x 90 columns"):
        open_source(make_scene()).read_reduced(10, Window(70, 0, 5, 5))


def test_bytes_that_are_no_text_in_a_vrt_are_one_line(tmp_path, capfd) -> None:
    vrt = tmp_path / "broken.vrt"
    vrt.write_bytes(b'<VRTDataset rasterXSize="9" rasterYSize="9"><VRTRasterBand band="1"><Sou\xd1\xff</VRTDataset>')
    with pytest.raises(InputError, match=r"can't read .*broken\.vrt as a VRT: .*utf-8"):
        open_source(vrt)
    assert capfd.readouterr().err == ""


def test_thousands_of_bands_are_described_at_once(tmp_path) -> None:
    pixels = np.zeros((8_000, 2, 2), np.uint8)
    with rasterio.open(
        tmp_path / "many.tif", "w", driver="GTiff", count=len(pixels), height=2, width=2, dtype="uint8",
        crs="EPSG:32637", transform=Affine(1, 0, 5e5, 0, -1, 4e6),
    ) as dataset:  # fmt: skip
        dataset.write(pixels)
    started = time.process_time()
    assert open_source(tmp_path / "many.tif").num_bands == 8_000
    # Half a second; where each band asks for the properties of all bands, minutes.
    assert time.process_time() - started < 10
