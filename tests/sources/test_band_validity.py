"""Which values hold data, band by band, whatever reads them: rasters, VRTs, mosaics, warped ones and slides."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import tifffile
import zarr

from perf_vit.errors import DataWarning
from perf_vit.sources import open_source
from perf_vit.types import GeoImage

WARPED = [{}, {"resolution": (2.0, 3.0)}, {"resolution": (2.0, 3.0), "resampling": "cubic"}, {"crs": "EPSG:32638"}]


def holes(dtype: str, value: float, *, base: float = 1000) -> np.ndarray:
    """Two bands: a hole of the first band, and one of both."""
    pixels = np.full((2, 60, 80), base, dtype)
    pixels[1] *= 2
    pixels[0, 10:30, 20:50] = value
    pixels[:, 40:50, 5:25] = value
    return pixels


def as_vrt(path: Path, *nodata: float) -> Path:
    """A VRT of a raster with a nodata value for each band."""
    rasterio.shutil.copy(path, path.with_suffix(".vrt"), driver="VRT")
    first, *rest = path.with_suffix(".vrt").read_text().split("</VRTRasterBand>")
    parts = [first, *rest]
    for index, value in enumerate(nodata):
        head, _, tail = parts[index].partition("<NoDataValue>")
        parts[index] = f"{head}<NoDataValue>{value}<{tail.split('<', 1)[1]}"
    path.with_suffix(".vrt").write_text("</VRTRasterBand>".join(parts))
    return path.with_suffix(".vrt")


def read(source) -> tuple[GeoImage, np.ndarray]:
    image = source.read(source.extent)
    return image, np.broadcast_to(image.mask, image.pixels.shape)


def check_holes(image: GeoImage, mask: np.ndarray, first: float = 1000) -> None:
    """A value is the band's own or invalid: nothing is averaged with a missing one."""
    for band, value in enumerate((first, 2 * first)):
        np.testing.assert_allclose(image.pixels[band][mask[band]], value, rtol=1e-6)
    assert np.array_equal(image.valid, mask.any(0))
    share = mask.mean((1, 2)) / mask[1].mean() * (1 - 200 / 4800)
    assert share[0] == pytest.approx(1 - 800 / 4800, abs=0.04)


@pytest.mark.parametrize("options", WARPED)
@pytest.mark.parametrize(
    ("dtype", "value", "declared"),
    [
        ("float32", -9999, -9999),
        ("float32", np.nan, None),
        ("float32", np.nan, np.nan),
        ("int16", -9999, -9999),
        ("uint16", 65535, 65535),
    ],
)
def test_a_missing_value_is_missing_in_its_band_and_averaged_with_nothing(
    make_scene, dtype, value, declared, options
) -> None:
    image, mask = read(open_source(make_scene(pixels=holes(dtype, value), nodata=declared), **options))
    check_holes(image, mask)


@pytest.mark.parametrize("options", WARPED)
@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e300])
def test_what_float32_cannot_hold_is_missing_and_never_averaged_into_data(make_scene, value, options) -> None:
    image, mask = read(open_source(make_scene(pixels=holes("float64", value), nodata=None), **options))
    assert not mask.all()
    assert np.isfinite(image.pixels[mask].astype(np.float32)).all()
    np.testing.assert_allclose(image.pixels[0][mask[0]], 1000, rtol=1e-6)


@pytest.mark.parametrize("options", WARPED)
def test_each_band_has_its_own_nodata_value(make_scene, options) -> None:
    pixels = holes("int16", -9999)
    pixels[1][pixels[1] == -9999] = -1
    # What is nodata of the other band is data.
    pixels[0, 0:5, 0:5], pixels[1, 0:5, 10:15] = -1, -9999
    image, mask = read(open_source(as_vrt(make_scene(pixels=pixels, nodata=-9999), -9999, -1), **options))
    if not options:
        assert np.array_equal(mask, np.stack([pixels[0] != -9999, pixels[1] != -1]))
    assert -1 in image.pixels[0][mask[0]]
    assert -9999 in image.pixels[1][mask[1]]
    assert image.pixels[0][mask[0]].min() == (-1 if "cubic" not in options.values() else image.pixels[0][mask[0]].min())


@pytest.mark.parametrize("options", WARPED)
@pytest.mark.parametrize(("dtype", "value"), [("uint16", 0), ("float32", 0), ("uint8", 255), ("uint8", 7)])
def test_values_that_data_may_have_too_are_missing_only_in_all_bands(make_scene, dtype, value, options) -> None:
    source = open_source(make_scene(pixels=holes(dtype, value, base=100), nodata=value), **options)
    image, mask = read(source)
    assert image.band_valid is None
    # The hole of one band is dark, or bright, and data.
    assert np.count_nonzero(image.pixels[0][mask[0]] == value) > 400
    if "cubic" not in options.values():
        low, high = sorted((value, 100))
        assert image.pixels[0][mask[0]].min() >= low
        assert image.pixels[0][mask[0]].max() <= high
        assert set(np.unique(image.pixels[1][mask[1]])) == {200}


@pytest.mark.parametrize("options", WARPED)
def test_a_mask_of_the_dataset_hides_all_bands_with_nodata_of_one(make_scene, options) -> None:
    path = make_scene(pixels=np.full((2, 60, 80), 5, np.float32), nodata=None)
    hidden = np.full((60, 80), 255, np.uint8)
    hidden[20:40, 30:60] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as dataset:
        dataset.write_mask(hidden)
    image, _ = read(open_source(path, **options))
    assert image.band_valid is None
    assert 0.5 < image.valid.mean() < 0.9
    if not options:
        assert np.array_equal(image.valid, hidden > 0)


def test_a_mask_of_each_band_hides_that_band(make_scene) -> None:
    path = make_scene(pixels=np.full((2, 60, 80), 5, np.int16), nodata=None)
    # GDAL keeps a mask a band in a file beside the raster, where it isn't flagged as one of the dataset.
    with rasterio.open(f"{path}.msk", "w", driver="GTiff", count=2, height=60, width=80, dtype="uint8") as dataset:
        masks = np.full((2, 60, 80), 255, np.uint8)
        masks[0, :10], masks[1, 50:] = 0, 0
        dataset.write(masks)
        dataset.update_tags(INTERNAL_MASK_FLAGS_1=0, INTERNAL_MASK_FLAGS_2=0)
    with rasterio.open(path) as dataset:
        assert np.array_equal(dataset.read_masks(), masks)
    image, mask = read(open_source(path))
    assert np.array_equal(mask, masks > 0)
    assert image.valid.all()


def test_a_pixel_of_a_mosaic_comes_from_one_file_with_its_mask(make_scene) -> None:
    upper = make_scene(pixels=holes("float32", -9999), nodata=-9999)
    lower = make_scene(pixels=np.full((2, 60, 80), 7, np.float32), nodata=None)
    image, mask = read(open_source([upper, lower]))
    # The hole of one band stays: a pixel is not put together of two files.
    assert not mask[0, 10:30, 20:50].any()
    assert (image.pixels[1, 10:30, 20:50] == 2000).all()
    assert (image.pixels[:, 40:50, 5:25] == 7).all()
    assert image.valid.all()


def test_reduced_and_windowed_reads_keep_the_mask_of_each_band(make_scene) -> None:
    source = open_source(make_scene(pixels=holes("float32", np.nan), nodata=None))
    image, mask = read(source)
    reduced = source.read_reduced(40)
    assert np.array_equal(reduced.mask, mask[:, ::2, ::2]) or np.array_equal(reduced.mask, mask[:, 1::2, 1::2])
    assert image.band_valid is not None


def test_scaled_values_are_nan_where_their_band_is_missing(make_scene) -> None:
    path = make_scene(pixels=holes("int16", -9999), nodata=-9999)
    with rasterio.open(path, "r+") as dataset:
        dataset.scales, dataset.offsets = (0.5, 0.5), (1, 1)
    image, mask = read(open_source(path, apply_scale=True))
    assert np.array_equal(np.isfinite(image.pixels), mask)
    assert (image.pixels[1, 10:30, 20:50] == 1001).all()


@pytest.mark.parametrize("mpp", [0.5, 0.8, 1.7])
def test_nan_in_a_channel_of_a_slide_stays_there_and_out_of_its_neighbours(tmp_path, mpp: float) -> None:
    group = zarr.open_group(tmp_path / "s.ome.zarr", mode="w", zarr_format=2)
    pixels = holes("float32", np.nan)
    group.create_array("0", data=pixels, chunks=(1, 32, 32))
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space", "unit": "micrometer"} for n in "yx")]
    scale = [{"type": "scale", "scale": [1.0, 0.5, 0.5]}]
    group.attrs["multiscales"] = [
        {"version": "0.4", "axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}
    ]
    image, mask = read(open_source(tmp_path / "s.ome.zarr", mpp=mpp))
    check_holes(image, mask)


def write_rgba(path, tag: str | None):
    """An OME-TIFF of four samples a pixel, of which the last is 0 in its upper third."""
    pixels = np.full((60, 80, 4), 90, np.uint8)
    pixels[:20, :, 3] = 0
    tifffile.imwrite(path, pixels, photometric="rgb", extrasamples=[tag], metadata={"axes": "YXS"})
    return path


@pytest.mark.parametrize("mpp", [0.5, 0.8])
@pytest.mark.parametrize("tag", ["UNASSALPHA", "ASSOCALPHA"])
def test_alpha_of_a_slide_is_a_mask_until_it_is_read_as_data(tmp_path, tag, mpp) -> None:
    path = write_rgba(tmp_path / "a.ome.tif", tag)
    with pytest.warns(DataWarning, match=r"band 4 of .*a\.ome\.tif is tagged as alpha"):
        source = open_source(path, mpp=mpp, slide_mpp=0.5)
    image, _ = read(source)
    assert (source.num_bands, source.mask_name) == (3, "band 4 (alpha)")
    assert image.valid.mean() == pytest.approx(2 / 3, abs=0.02)
    source = open_source(path, bands=[1, 2, 3, 4], mpp=mpp, slide_mpp=0.5)
    image, _ = read(source)
    assert source.mask_name is None
    assert image.valid.all()
    assert np.count_nonzero(image.pixels[3] == 0) > 0.3 * image.valid.size


def test_a_fourth_sample_of_unknown_meaning_is_data(tmp_path, recwarn) -> None:
    source = open_source(write_rgba(tmp_path / "a.ome.tif", "UNSPECIFIED"), slide_mpp=0.5)
    assert source.band_names == ("red", "green", "blue", "band_4")
    assert read(source)[0].valid.all()
    assert not [each for each in recwarn if each.category is DataWarning]
