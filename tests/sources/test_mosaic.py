import gc
import json
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import rasterio.shutil
import shapely
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp, Resampling
from rasterio.vrt import WarpedVRT
from rasterio.warp import reproject, transform

from perf_vit.errors import InputError
from perf_vit.sources import MosaicSource, open_source
from perf_vit.sources.mosaic import _MAX_OPEN
from perf_vit.types import Window

EAST = Affine(10, 0, 907_000.25, 0, -12.5, 4_512_000.5)
"""In EPSG:32636, where EPSG:32637 has x = 399,580 or so."""


def _grid_of_tiles(make_scene, rows: int = 2, cols: int = 3, **options) -> tuple[list[Path], np.ndarray]:
    """Tiles that share a grid and cover it wholly, and all their pixels."""
    rng = np.random.default_rng(1)
    whole = rng.integers(1, 60_000, (2, 40 * rows, 50 * cols)).astype(np.uint16)
    paths = []
    for row in range(rows):
        for col in range(cols):
            part = whole[:, 40 * row : 40 * row + 40, 50 * col : 50 * col + 50]
            place = Affine(2.5, 0, 401_000.125 + 125 * col, 0, -3.25, 4_510_000.5 - 130 * row)
            paths.append(make_scene(pixels=part, transform=place, **options))
    return paths, whole


def _nearest_by_hand(path: Path, source: MosaicSource) -> np.ndarray:
    """Each pixel's centre is transformed by PROJ, one by one, and looked up."""
    with rasterio.open(path) as dataset:
        pixels, place, crs = dataset.read(), dataset.transform, dataset.crs
    rows, cols = np.mgrid[: source.height, : source.width]
    xs, ys = source.transform @ (cols.ravel() + 0.5, rows.ravel() + 0.5)
    cols, rows = ~place @ tuple(np.array(transform(source.crs, crs, xs, ys)))
    rows, cols = np.floor(rows).astype(int), np.floor(cols).astype(int)
    inside = (rows >= 0) & (cols >= 0) & (rows < pixels.shape[1]) & (cols < pixels.shape[2])
    found = np.zeros((len(pixels), source.height * source.width), pixels.dtype)
    found[:, inside] = pixels[:, rows[inside], cols[inside]]
    return found.reshape(len(pixels), *source.size)


def test_tiles_of_one_grid_are_read_bit_by_bit(make_scene) -> None:
    paths, whole = _grid_of_tiles(make_scene)
    source = open_source(paths)
    image = source.read(source.extent)
    assert isinstance(source, MosaicSource)
    assert np.array_equal(image.pixels, whole)
    assert image.valid.all()
    assert source.transform == open_source(paths[0]).transform


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.integers(-40, 90), col=st.integers(-40, 160), height=st.integers(1, 60), width=st.integers(1, 60))
def test_any_window_equals_the_crop_of_the_whole(make_scene, row: int, col: int, height: int, width: int) -> None:
    paths, whole = _grid_of_tiles(make_scene)
    image = open_source(paths).read(Window(row, col, height, width))
    padded = np.pad(whole, ((0, 0), (100, 100), (100, 100)))
    expected = padded[:, row + 100 : row + 100 + height, col + 100 : col + 100 + width]
    assert np.array_equal(image.pixels, expected)
    assert np.array_equal(image.valid, expected[0] > 0)


@pytest.mark.parametrize("resolution", [None, 7.3, (25, 31)])
def test_nearest_pixels_are_those_at_the_transformed_centres(make_scene, resolution) -> None:
    path = make_scene(crs="EPSG:32636", transform=EAST)
    source = open_source(path, crs="EPSG:32637", resolution=resolution, resampling="nearest")
    assert np.array_equal(source.read(source.extent).pixels, _nearest_by_hand(path, source))


@pytest.mark.parametrize("resampling", ["nearest", "bilinear", "cubic"])
def test_a_warped_raster_is_what_gdal_makes_of_it_without_approximation(make_scene, resampling: str) -> None:
    # Square pixels: for others, GDAL's own estimate of how many pixels to average is rough.
    path = make_scene(crs="EPSG:32636", transform=Affine(10, 0, EAST.c, 0, -10, EAST.f))
    source = open_source(path, crs="EPSG:32637", resampling=resampling)
    image = source.read(source.extent)
    with (
        rasterio.open(path) as dataset,
        WarpedVRT(dataset, crs="EPSG:32637", resampling=Resampling[resampling], tolerance=0) as warped,
    ):
        assert (warped.transform, warped.shape) == (source.transform, source.size)
        difference = np.abs(warped.read().astype(int) - image.pixels)
    assert difference.max() <= (0 if resampling == "nearest" else 1)
    assert 0.5 < image.valid.mean() < 1


def test_bilinear_is_close_to_reproject_on_a_chosen_grid(make_scene) -> None:
    ramp = (np.add.outer(np.arange(70), 2 * np.arange(90))[None] * 100 + 1000).astype(np.float32)
    path = make_scene(pixels=ramp, crs="EPSG:32636", transform=EAST, nodata=None)
    source = open_source(path, crs="EPSG:32637", resolution=8)
    image = source.read(source.extent)
    expected = np.full((1, *source.size), np.nan, np.float32)
    with rasterio.open(path) as dataset:
        place = {"dst_transform": source.transform, "dst_crs": source.crs, "dst_nodata": np.nan}
        reproject(rasterio.band(dataset, 1), expected, resampling=Resampling.bilinear, **place)
    both = image.valid & np.isfinite(expected[0])
    assert both.mean() > 0.7
    # An eighth of a pixel, reproject's tolerance, is 12.5 down and 25 across.
    assert np.abs(expected - image.pixels)[:, both].max() < 40


@pytest.mark.parametrize("resampling", ["nearest", "bilinear", "average"])
@pytest.mark.parametrize("resolution", [None, 5, 33])
def test_windows_of_a_warped_mosaic_have_no_seams(make_scene, resampling: str, resolution) -> None:
    first = make_scene(seed=1, transform=Affine(10, 0, 399_900, 0, -10, 4_501_600))
    shifted = make_scene(seed=2, transform=Affine(10, 0, 400_605, 0, -10, 4_501_605))
    other = make_scene(seed=3, crs="EPSG:32636", transform=EAST)
    source = open_source([first, shifted, other], resolution=resolution, resampling=resampling)
    whole = source.read(source.extent)
    for row in range(0, source.height, 47):
        for col in range(0, source.width, 61):
            window = Window(row, col, 47, 61)
            inside = window.intersect(source.extent)
            part = source.read(window)
            rows, cols = inside.slices_in(source.extent)
            here = inside.slices_in(window)
            assert np.array_equal(part.valid[here], whole.valid[rows, cols])
            assert np.array_equal(part.pixels[:, *here], whole.pixels[:, rows, cols])


def test_the_first_file_that_is_valid_at_a_pixel_gives_it(make_scene) -> None:
    first, second = np.full((1, 4, 6), 5, np.uint8), np.full((1, 4, 6), 9, np.uint8)
    first[:, 1, 2] = second[:, 3, 3] = first[:, 3, 3] = 0
    source = open_source([make_scene(pixels=first), make_scene(pixels=second)])
    image = source.read(source.extent)
    assert image.pixels[0, 0, 0] == 5
    assert image.pixels[0, 1, 2] == 9
    assert not image.valid[3, 3]
    assert image.valid.sum() == 23


def test_bounds_and_resolution_choose_the_grid(make_scene) -> None:
    paths, whole = _grid_of_tiles(make_scene)
    left, top = 401_000.125, 4_510_000.5
    source = open_source(paths, bounds=(left + 26, top - 129, left + 201, top - 10))
    assert np.array_equal(source.read(source.extent).pixels, whole[:, 3:40, 10:81])
    coarse = open_source(paths, bounds=(401_010, 4_509_800, 401_110, 4_509_900), resolution=(10, 20))
    assert coarse.transform == Affine(10, 0, 401_010, 0, -20, 4_509_900)
    assert coarse.size == (5, 10)


def test_the_finest_file_sets_the_resolution(make_scene) -> None:
    coarse = make_scene(transform=Affine(10, 0, 4e5, 0, -10, 4.5e6))
    fine = make_scene(transform=Affine(5, 0, 4e5, 0, -5, 4.5e6))
    source = open_source([coarse, fine])
    assert (source.transform.a, source.transform.e, source.size) == (5, -5, (140, 180))


def test_folder_pattern_vrt_and_tile_index_hold_the_same(make_scene, tmp_path) -> None:
    paths, whole = _grid_of_tiles(make_scene)
    boxes = [shapely.box(*open_source(path).bounds) for path in paths]
    index = gpd.GeoDataFrame({"location": [str(path) for path in paths]}, geometry=boxes, crs="EPSG:32637")
    (tmp_path / "index").mkdir()
    index.to_file(tmp_path / "index" / "tiles.gti.gpkg")
    for name in (tmp_path, f"{tmp_path}/scene_*.tif", tmp_path / "index" / "tiles.gti.gpkg"):
        source = open_source(name)
        assert np.array_equal(source.read(source.extent).pixels, whole), name
    assert np.array_equal(open_source(f"GTI:{tmp_path}/index/tiles.gti.gpkg").read(Window(0, 0, 80, 150)).pixels, whole)


def test_stac_items_give_their_asset(make_scene, tmp_path) -> None:
    paths, whole = _grid_of_tiles(make_scene)
    items = [
        {"type": "Feature", "id": path.stem, "assets": {
            "pixels": {"href": path.name, "roles": ["data"]},
            "preview": {"href": "none.png", "type": "image/png", "roles": ["thumbnail"]},
        }}
        for path in paths
    ]  # fmt: skip
    (tmp_path / "list.json").write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    for options in ({}, {"asset": "pixels"}):
        source = open_source(tmp_path / "list.json", **options)
        assert np.array_equal(source.read(source.extent).pixels, whole)
    with pytest.raises(InputError, match="no asset 'pixel'; did you mean 'pixels'"):
        open_source(tmp_path / "list.json", asset="pixel")
    items[1]["assets"]["more"] = {"href": "b.tif", "roles": ["data"]}
    (tmp_path / "list.json").write_text(json.dumps(items))
    with pytest.raises(InputError, match=r"scene_1 .* several data assets \(pixels, more\); choose one with asset="):
        open_source(tmp_path / "list.json")
    (tmp_path / "list.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="must hold STAC items"):
        open_source(tmp_path / "list.json")


def test_a_mosaic_keeps_few_files_open_and_dead_threads_none(make_scene) -> None:
    paths, whole = _grid_of_tiles(make_scene, rows=8, cols=6)
    source = open_source(paths)

    def open_files() -> int:
        return sum(".tif" in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_link(fd))

    gc.collect()
    before = open_files()
    counts = []

    def read() -> None:
        assert np.array_equal(source.read(source.extent).pixels, whole)
        counts.append(open_files() - before)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    gc.collect()
    assert 0 < counts[0] <= _MAX_OPEN
    assert open_files() == before


def _is_link(fd: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{fd}")


def test_a_window_opens_only_the_files_that_it_meets(make_scene) -> None:
    paths, whole = _grid_of_tiles(make_scene)
    whole[:, 5, 5] = 0
    with rasterio.open(paths[0], "r+") as dataset:
        dataset.write(whole[:, :40, :50])
    source = open_source(paths)
    for path in paths[1:]:
        path.unlink()
    # Not even for the missing pixel.
    image = source.read(Window(0, 0, 40, 50))
    assert np.array_equal(image.pixels, whole[:, :40, :50])
    assert not image.valid[5, 5]
    with pytest.raises(InputError, match=r"scene_1.tif: no such file"):
        source.read(Window(0, 0, 40, 51))


def test_eight_threads_and_a_pickled_copy_read_what_one_thread_reads(make_scene) -> None:
    paths, _ = _grid_of_tiles(make_scene)
    other = make_scene(num_bands=2, crs="EPSG:32636", transform=EAST @ Affine.translation(150, -700))
    source = open_source([*paths, other])
    windows = [Window(r, c, 33, 41) for r in range(0, source.height, 97) for c in range(0, source.width, 83)][:60]
    expected = [source.read(window).pixels for window in windows]
    with ThreadPoolExecutor(8) as pool:
        for copy in (source, pickle.loads(pickle.dumps(source))):
            assert all(map(np.array_equal, pool.map(lambda w, s=copy: s.read(w).pixels, windows), expected))


def test_reduced_reads_of_a_mosaic_keep_their_place(make_scene) -> None:
    column = np.broadcast_to(np.arange(1, 201, dtype=np.uint16), (1, 100, 200)).copy()
    place = Affine(2, 0, 4e5, 0, -2, 4.5e6)
    halves = [
        make_scene(pixels=column[..., :100], transform=place),
        make_scene(pixels=column[..., 100:], transform=place @ Affine.translation(100, 0)),
    ]
    image = open_source(halves).read_reduced(40)
    assert image.pixels.shape == (1, 20, 40)
    assert image.transform @ (40, 20) == place @ (200, 100)
    assert np.array_equal(image.pixels[0, 0], np.arange(3, 201, 5))


def test_gcps_alone_place_a_raster(make_scene) -> None:
    place = Affine(10, 0, 4e5, 0, -10, 4.5e6)
    points = [GroundControlPoint(r, c, *(place @ (c, r))) for r in (0, 70) for c in (0, 90)]
    path = make_scene(crs="EPSG:32637", transform=Affine.identity(), gcps=points)
    plain = make_scene(transform=place)
    source = open_source(path)
    np.testing.assert_allclose(source.bounds, open_source(plain).bounds, atol=1e-3)
    assert np.array_equal(
        open_source(path, resampling="nearest").read(source.extent).pixels,
        open_source(plain).read(source.extent).pixels,
    )
    there = open_source(path, crs="EPSG:32636", resolution=17, resampling="nearest")
    expected = open_source(plain, crs="EPSG:32636", resolution=17, resampling="nearest").read(there.extent).pixels
    assert (there.read(there.extent).pixels == expected).mean() > 0.98


def test_a_rotated_raster_keeps_its_pixels_until_it_is_warped(make_scene) -> None:
    place = Affine(10, 0, 4e5, 0, -10, 4.5e6) @ Affine.rotation(30)
    path = make_scene(transform=place)
    assert open_source(path).transform == place
    source = open_source(path, crs="EPSG:32637", resampling="nearest")
    assert source.transform.b == 0
    assert np.array_equal(source.read(source.extent).pixels, _nearest_by_hand(path, source))


def test_masks_alpha_and_nodata_of_each_band_hold_when_warped(make_scene, tmp_path) -> None:
    options = {"crs": "EPSG:32637", "resolution": (2.5, 3.25), "bounds": (401_010, 4_509_800, 401_200, 4_509_980)}
    mask = np.full((70, 90), 255, np.uint8)
    mask[20:40, 30:60] = 0
    masked = make_scene(dtype="uint8", nodata=None)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(masked, "r+") as dataset:
        dataset.write_mask(mask)
    pixels = np.full((4, 70, 90), 200, np.uint8)
    pixels[3] = mask
    alpha = make_scene(pixels=pixels, nodata=None, photometric="RGB", alpha="YES")
    with rasterio.open(alpha) as dataset:
        assert dataset.colorinterp[3] == ColorInterp.alpha
    pixels = np.where(mask == 0, np.array([7, 9], np.uint8)[:, None, None], np.uint8(50))
    by_band = make_scene(pixels=pixels, nodata=7)
    rasterio.shutil.copy(by_band, tmp_path / "b.vrt", driver="VRT")
    text = (tmp_path / "b.vrt").read_text()
    (tmp_path / "b.vrt").write_text("<NoDataValue>9<".join(text.rsplit("<NoDataValue>7<", 1)))
    holes = []
    for path in (masked, alpha, tmp_path / "b.vrt"):
        source = open_source(path, resampling="nearest", **options)
        holes.append(~source.read(source.extent).valid)
        assert source.num_bands == (2 if path.suffix == ".vrt" else 3)
    assert 550 < holes[0].sum() < 650
    assert np.array_equal(holes[0], holes[1])
    assert np.array_equal(holes[0], holes[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, r"scene_0.tif holds uint16 and .*scene_1.tif holds float32"),
        ({"num_bands": 2}, r"scene_0.tif has 3 and .*scene_1.tif has 2"),
        ({"crs": None}, r"scene_1.tif has no CRS"),
        ({"transform": Affine.identity()}, r"scene_1.tif has a CRS \(EPSG:32637\) but no transform"),
    ],
)
def test_files_that_do_not_fit_are_named(make_scene, options, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_source([make_scene(), make_scene(**options)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 0}, "resolution must be positive"),
        ({"bounds": (1, 0, 0, 1)}, "left < right"),
        ({"bounds": (0, 0, 100, 100)}, "meet no file"),
        ({"crs": "EPSG:nonsense"}, "crs must be a code"),
        ({"crs": "EPSG:32636", "resampling": "gauss"}, "resampling must be one of nearest"),
        ({"asset": "a"}, "asset is for a JSON file"),
    ],
)
def test_options_that_do_not_fit_are_refused(make_scene, options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_source(make_scene(), **options)


def test_a_pattern_without_files_and_an_empty_list(tmp_path) -> None:
    with pytest.raises(InputError, match="no file matches"):
        open_source(tmp_path / "*.tif")
    with pytest.raises(InputError, match="empty list"):
        open_source([])
