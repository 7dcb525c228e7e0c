import gc
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine

from perf_vit.errors import InputError
from perf_vit.sources import open_source
from perf_vit.types import Window

COLORS = {0: (0, 0, 0, 0), 1: (200, 10, 10, 255), 2: (10, 120, 10, 255)}


def _named(make_scene, names=("red", "nir", "swir_1")):
    path = make_scene(num_bands=len(names))
    with rasterio.open(path, "r+") as dataset:
        for band, name in enumerate(names, 1):
            dataset.set_band_description(band, name)
    return path


def _palette(make_scene, colors=None):
    pixels = np.random.default_rng(0).integers(0, 3, (1, 70, 90)).astype(np.uint8)
    path = make_scene(pixels=pixels, nodata=None, photometric="palette")
    with rasterio.open(path, "r+") as dataset:
        dataset.write_colormap(1, colors or COLORS)
    return path, pixels


def test_bands_are_chosen_by_name(make_scene) -> None:
    path = _named(make_scene)
    chosen, whole = open_source(path, bands=["swir_1", 1]), open_source(path)
    assert chosen.band_names == ("swir_1", "red")
    assert np.array_equal(chosen.read(chosen.extent).pixels, whole.read(whole.extent).pixels[[2, 0]])
    with pytest.raises(InputError, match=r"no band 'SWIR1'; did you mean 'swir_1'; its bands are red, nir, swir_1"):
        open_source(path, bands=["SWIR1"])
    with pytest.raises(InputError, match=r"bands 1, 3 of .* are all called 'a'; give a number"):
        open_source(_named(make_scene, ("a", "b", "a")), bands=["a"])


def test_bands_of_a_mosaic_are_found_by_name_in_each_file(make_scene) -> None:
    a, b = _named(make_scene, ("red", "nir")), _named(make_scene, ("nir", "swir", "red"))
    source = open_source([a, b], bands=["nir"])
    assert np.array_equal(source.read(source.extent).pixels[0], open_source(a).read(source.extent).pixels[1])
    moved = open_source(b, bands=["nir"], crs="EPSG:32637", resolution=(2.5, 3.25))
    assert np.array_equal(moved.read(moved.extent).pixels[0], open_source(b).read(moved.extent).pixels[0])


def test_a_palette_is_kept_or_expanded(make_scene) -> None:
    path, pixels = _palette(make_scene)
    kept, expanded = open_source(path), open_source(path, palette="expand")
    assert np.array_equal(kept.read(kept.extent).pixels, pixels)
    assert kept.colormap[1] == COLORS[1]
    image = expanded.read(Window(-1, 0, 71, 90))
    assert (expanded.band_names, expanded.colormap) == (("red", "green", "blue"), None)
    table = np.array([COLORS[value] for value in range(3)], np.uint8)
    assert np.array_equal(image.pixels[:, 1:], np.moveaxis(table[pixels[0]][..., :3], -1, 0))
    # TIFF keeps no alpha of a palette.
    assert image.valid[1:].all()
    assert not image.valid[0].any()


def test_transparent_colours_are_invalid_when_expanded(make_scene, tmp_path) -> None:
    path, pixels = _palette(make_scene)
    rasterio.shutil.copy(path, tmp_path / "p.vrt", driver="VRT")
    text = (tmp_path / "p.vrt").read_text()
    assert 'c1="0" c2="0" c3="0" c4="255"' in text
    (tmp_path / "p.vrt").write_text(text.replace('c1="0" c2="0" c3="0" c4="255"', 'c1="0" c2="0" c3="0" c4="0"'))
    image = open_source(tmp_path / "p.vrt", palette="expand").read(Window(0, 0, 70, 90))
    assert np.array_equal(image.valid, pixels[0] > 0)


def test_palettes_are_warped_by_nearest_neighbour_and_must_agree(make_scene) -> None:
    path, _ = _palette(make_scene)
    source = open_source(path, crs="EPSG:32636")
    assert set(np.unique(source.read(source.extent).pixels)) <= {0, 1, 2}
    other, _ = _palette(make_scene, {0: (1, 2, 3, 255)})
    with pytest.raises(InputError, match=r"need the same palette, but .*scene_0.tif and .*scene_1.tif"):
        open_source([path, other])
    assert open_source([path, other], palette="expand").num_bands == 3
    with pytest.raises(InputError, match='palette must be "keep" or "expand"'):
        open_source(path, palette="rgb")


@pytest.mark.parametrize("options", [{}, {"crs": "EPSG:32637", "resolution": (2.5, 3.25)}])
def test_scales_apply_to_values_and_nodata_to_raw_ones(make_scene, options) -> None:
    # 0 is nodata; 10 becomes 0 and is none.
    pixels = np.full((2, 4, 5), 10, np.uint16)
    pixels[:, 1, 2] = 0
    pixels[1] *= 2
    path = make_scene(pixels=pixels, nodata=0)
    with rasterio.open(path, "r+") as dataset:
        dataset.scales, dataset.offsets = (0.5, 0.01), (-5, 1)
    raw = open_source(path, **options)
    assert raw.dtype == np.uint16
    source = open_source(path, apply_scale=True, **options)
    image = source.read(Window(0, 0, 4, 6))
    assert image.pixels.dtype == source.dtype == np.float32
    np.testing.assert_allclose(image.pixels[:, 0, 0], (0, 1.2), rtol=1e-6)
    assert not image.valid[1, 2]
    assert image.valid.sum() == 19
    assert np.isnan(image.pixels[:, ~image.valid]).all()


def test_a_crs_without_transform_is_refused_only_where_a_place_is_needed(make_scene) -> None:
    path = make_scene(transform=Affine.identity())
    assert open_source(path).read(Window(0, 0, 70, 90)).valid.any()
    with pytest.raises(InputError, match=r"has a CRS .* but no transform"):
        open_source(path, resolution=3)
    with pytest.raises(InputError, match="no CRS"):
        open_source(make_scene(crs=None), crs="EPSG:32637")


@pytest.mark.parametrize("driver", ["JP2OpenJPEG", "VRT", "netCDF", "Zarr"])
def test_other_formats_are_read(make_scene, tmp_path, driver: str) -> None:
    with rasterio.Env() as env:
        if driver not in env.drivers():
            pytest.skip(f"this GDAL has no {driver}")
    path = make_scene(dtype="uint8", num_bands=1)
    options = {"QUALITY": "100", "REVERSIBLE": "YES"} if driver == "JP2OpenJPEG" else {}
    other = tmp_path / {"JP2OpenJPEG": "a.jp2", "VRT": "a.vrt", "netCDF": "a.nc", "Zarr": "a.zarr"}[driver]
    rasterio.shutil.copy(path, other, driver=driver, **options)
    source, expected = open_source(other), open_source(path)
    assert np.array_equal(source.read(source.extent).pixels, expected.read(expected.extent).pixels)
    assert source.crs == expected.crs


def test_a_format_without_driver_says_what_is_missing(tmp_path) -> None:
    (tmp_path / "a.ecw").write_bytes(b"ecw" * 100)
    with pytest.raises(InputError, match="this GDAL has no ECW driver: convert the file"):
        open_source(tmp_path / "a.ecw")


def test_eight_threads_read_what_one_reads_and_leave_no_file_open(make_scene) -> None:
    path = make_scene(height=300, width=300, tiled=True, blockxsize=64, blockysize=64)
    source = open_source(path)
    windows = [Window(r, c, 70, 70) for r in range(0, 280, 40) for c in range(0, 280, 40)]
    expected = [source.read(window).pixels for window in windows]
    source.close()
    barrier = threading.Barrier(8)

    def read(first: int) -> tuple[bool, int]:
        barrier.wait()
        same = [np.array_equal(source.read(w).pixels, e) for w, e in list(zip(windows, expected, strict=True))[first:]]
        barrier.wait()
        count = _times_open(path)
        barrier.wait()
        return all(same), count

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(read, range(8))) == {(True, 8)}
    gc.collect()
    assert _times_open(path) == 0


def _times_open(path) -> int:
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return sum(os.path.realpath(link) == str(path) for link in links)


def test_items_may_be_local_urls(make_scene, tmp_path) -> None:
    path = make_scene()
    item = {"type": "Feature", "id": "a", "assets": {"b": {"href": path.as_uri(), "type": "image/tiff; application=x"}}}
    (tmp_path / "a.json").write_text(json.dumps(item))
    source = open_source(tmp_path / "a.json")
    assert np.array_equal(source.read(source.extent).pixels, open_source(path).read(source.extent).pixels)
