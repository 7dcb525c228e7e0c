import pickle
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from slides import levels_of, noise, write_pyramid

import perf_vit.errors
from perf_vit.errors import DataWarning, InputError, MissingPackageError
from perf_vit.sources import RasterSource, open_source
from perf_vit.sources.slides import SlideSource
from perf_vit.sources.slides.pyramid import true_downsample
from perf_vit.types import Window

BOTH = {"max_examples": 40, "deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Path:
    """Even levels 1, 2, 4, 0.5 micrometres."""
    folder = tmp_path_factory.mktemp("slide")
    return write_pyramid(folder / "slide.svs", levels_of(520, 392, 3), aperio_mpp=0.5)


@pytest.fixture(scope="module")
def odd_slide(tmp_path_factory) -> Path:
    """Levels whose sizes don't divide."""
    folder = tmp_path_factory.mktemp("odd")
    return write_pyramid(folder / "odd.svs", levels_of(1163, 701, 3), aperio_mpp=0.25)


def triangle_reference(level: np.ndarray, step: float, size: tuple[int, int]) -> np.ndarray:
    """Dense weights in float64, [H, W, C] to [h, w, C]."""

    def weights(length: int, count: int) -> np.ndarray:
        center = np.clip((np.arange(count)[:, None] + 0.5) * step, 0.5, length - 0.5)
        weight = np.maximum(0, 1 - np.abs(np.arange(length) + 0.5 - center) / max(step, 1))
        return weight / weight.sum(1, keepdims=True)

    down = np.tensordot(weights(level.shape[0], size[0]), level * 1.0, 1)
    return np.tensordot(weights(level.shape[1], size[1]), down, (1, 1)).transpose(1, 0, 2)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_level_equals_openslide(slide: Path, level: int) -> None:
    source = open_source(slide, level=level)
    with openslide.OpenSlide(slide) as expected:
        picture = np.asarray(expected.read_region((0, 0), level, expected.level_dimensions[level]))
        crop = np.asarray(expected.read_region((20 << level, 36 << level), level, (70, 60)))
    image = source.read(source.extent)
    assert np.array_equal(image.pixels, picture[..., :3].transpose(2, 0, 1))
    assert np.array_equal(image.pixels, levels_of(520, 392, 3)[level].transpose(2, 0, 1))
    assert np.array_equal(source.read(Window(36, 20, 60, 70)).pixels, crop[..., :3].transpose(2, 0, 1))
    assert image.valid.all()
    assert (source.mpp, image.mpp) == (0.5 * 2**level, 0.5 * 2**level)
    assert source.downsample_xy == (2**level, 2**level)


def test_a_slide_is_a_source_without_a_place_on_earth(slide: Path) -> None:
    source = open_source(slide)
    assert isinstance(source, SlideSource)
    assert (source.size, source.num_bands, source.dtype) == ((520, 392), 3, np.uint8)
    assert source.band_names == ("red", "green", "blue")
    assert (source.crs, source.nodata, source.colormap) == (None, None, None)
    assert source.transform.is_identity
    assert source.read(Window(5, 7, 2, 2)).transform @ (0, 0) == (7, 5)


@settings(**BOTH)
@given(
    row=st.integers(-40, 300),
    col=st.integers(-40, 220),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    how=st.sampled_from([{"level": 0}, {"level": 1}, {"mpp": 0.9}, {"mpp": 1.37}, {"mpp": 6.0}, {"mpp": 0.21}]),
)
def test_any_window_equals_the_crop_of_a_padded_read(odd_slide: Path, row, col, height, width, how) -> None:
    source = open_source(odd_slide, **how)
    whole = source.read(source.extent)
    pad = 400
    pixels = np.pad(whole.pixels, ((0, 0), (pad, pad), (pad, pad)), constant_values=255)
    valid = np.pad(whole.valid, pad)
    image = source.read(Window(row, col, height, width))
    rows, cols = slice(row + pad, row + pad + height), slice(col + pad, col + pad + width)
    assert np.array_equal(image.pixels, pixels[:, rows, cols])
    assert np.array_equal(image.valid, valid[rows, cols])
    assert whole.valid.all()


@pytest.mark.parametrize(("mpp", "level", "size"), [(0.7, 0, (371, 280)), (1.6, 1, (163, 123)), (7.0, 2, (37, 28))])
def test_other_sizes_are_filtered_from_the_coarsest_level_that_is_fine_enough(slide: Path, mpp, level, size) -> None:
    source = open_source(slide, mpp=mpp)
    assert source.size == size
    assert source.mpp == pytest.approx(mpp)
    expected = triangle_reference(levels_of(520, 392, 3)[level], mpp / (0.5 * 2**level), size)
    difference = np.abs(source.read(source.extent).pixels - expected.transpose(2, 0, 1))
    # Half a step of rounding.
    assert difference.max() <= 0.501


def test_finer_than_the_slide_is_enlarged_between_pixels(slide: Path) -> None:
    source = open_source(slide, mpp=0.2)
    expected = triangle_reference(levels_of(520, 392, 1)[0], 0.4, source.size)
    assert source.size == (1300, 980)
    assert np.abs(source.read(source.extent).pixels - expected.transpose(2, 0, 1)).max() <= 0.501


@pytest.mark.parametrize(("mpp", "level"), [(0.503, 0), (0.996, 1), (2.0, 2)])
def test_a_level_of_nearly_the_size_is_read_as_it_is(slide: Path, mpp: float, level: int) -> None:
    source, expected = open_source(slide, mpp=mpp), open_source(slide, level=level)
    assert source.mpp == expected.mpp
    assert np.array_equal(source.read(source.extent).pixels, expected.read(expected.extent).pixels)


def test_a_read_larger_than_memory_allows_at_once_has_no_seam(slide: Path, monkeypatch) -> None:
    source = open_source(slide, mpp=0.83)
    expected = source.read(source.extent).pixels
    monkeypatch.setattr("perf_vit.sources.slides.pyramid._MAX_PIXELS", 900)
    assert np.array_equal(source.read(source.extent).pixels, expected)


def test_a_constant_slide_stays_constant_up_to_its_edges(tmp_path: Path) -> None:
    levels = [np.full((h, w, 3), 77, np.uint8) for h, w in [(301, 203), (150, 101), (75, 50)]]
    path = write_pyramid(tmp_path / "flat.svs", levels, aperio_mpp=0.5)
    for mpp in (0.3, 0.61, 1.7, 33):
        image = open_source(path, mpp=mpp).read(open_source(path, mpp=mpp).extent)
        assert (image.pixels == 77).all()
        assert image.valid.all()


def test_missing_pixel_size_says_how_to_give_one(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "unknown.tif", levels_of(200, 160, 2))
    assert open_source(path).mpp is None
    assert open_source(path, level=1).size == (100, 80)
    with pytest.raises(InputError, match=r"unknown\.tif .* mpp=2; .* slide_mpp=0\.25"):
        open_source(path, mpp=2)
    source = open_source(path, mpp=2, slide_mpp=0.5)
    assert (source.size, source.mpp) == ((50, 40), 2)


def test_pixels_that_are_not_square_become_square(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "oblong.tif", [noise(300, 200)], mpp_xy=(0.5, 0.25))
    level, even = open_source(path, slide_mpp=(0.5, 0.25)), open_source(path, mpp=1.0)
    assert level.mpp == pytest.approx(0.5**1.5)
    assert even.size == (75, 100)
    assert even.downsample_xy == pytest.approx((2, 4))
    assert even.mpp == pytest.approx(1.0)


def test_unseen_pixels_are_white_and_invalid_and_not_mixed_into_others(slide: Path, monkeypatch) -> None:
    read_region = openslide.OpenSlide.read_region

    def half_seen(self, location, level, size):
        picture = read_region(self, location, level, size)
        pixels = np.array(picture)
        x = location[0] + np.arange(size[0]) * self.level_downsamples[level]
        pixels[:, x < 100] = 0
        return Image.fromarray(pixels)

    dark = open_source(slide, mpp=0.77)
    before = dark.read(dark.extent)
    monkeypatch.setattr(openslide.OpenSlide, "read_region", half_seen)
    image = open_source(slide).read(Window(0, 90, 30, 20))
    assert (image.pixels[:, ~image.valid] == 255).all()
    assert np.array_equal(image.valid, np.broadcast_to(np.arange(90, 110) >= 100, (30, 20)))
    after = dark.read(dark.extent)
    edge = int(100 * 0.5 / 0.77)
    assert not after.valid[:, : edge - 1].any()
    assert after.valid[:, edge + 1 :].all()
    assert np.array_equal(after.pixels[:, :, edge + 3 :], before.pixels[:, :, edge + 3 :])


def test_reduced_reads_come_from_the_pyramid(slide: Path) -> None:
    source = open_source(slide)
    image = source.read_reduced(130)
    assert image.pixels.shape == (3, 130, 98)
    assert np.array_equal(image.pixels, levels_of(520, 392, 3)[2].transpose(2, 0, 1))
    assert image.mpp == pytest.approx(2.0)
    assert image.transform @ (1, 1) == (4, 4)
    part = source.read_reduced(40, Window(100, 200, 80, 80))
    assert np.array_equal(part.pixels, levels_of(520, 392, 3)[1][50:90, 100:140].transpose(2, 0, 1))
    assert part.transform @ (0, 0) == (200, 100)
    assert np.array_equal(source.read_reduced(999, Window(1, 2, 3, 4)).pixels, source.read(Window(1, 2, 3, 4)).pixels)
    with pytest.raises(InputError, match="must meet"):
        source.read_reduced(10, Window(520, 0, 5, 5))


def test_labels_and_macro_pictures_are_never_read(slide: Path, monkeypatch) -> None:
    def forbidden(self):
        raise AssertionError("read an associated image")

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(forbidden))
    monkeypatch.setattr("openslide.lowlevel.read_associated_image", forbidden)
    source = open_source(slide, mpp=2.0, tissue="otsu")
    assert source.read_reduced(50).pixels.any()
    assert source.read(source.extent).pixels.any()


def test_channels_are_chosen_by_number_or_name(slide: Path) -> None:
    whole = open_source(slide).read(Window(0, 0, 9, 9)).pixels
    source = open_source(slide, bands=["blue", 1])
    assert source.band_names == ("blue", "red")
    assert np.array_equal(source.read(Window(0, 0, 9, 9)).pixels, whole[[2, 0]])


def test_colours_are_converted_with_the_profile_when_asked(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # A scanner whose red is sRGB's blue.
    swapped = profile.replace(b"rXYZ", b"????", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"????", b"bXYZ", 1)
    path = write_pyramid(tmp_path / "profile.tif", levels_of(128, 128, 1), mpp_xy=(0.5, 0.5), icc=swapped)
    plain, converted = open_source(path, slide_mpp=0.5), open_source(path, slide_mpp=0.5, icc="srgb")
    before, after = plain.read(plain.extent).pixels, converted.read(converted.extent).pixels
    assert np.abs(before[::-1].astype(int) - after).max() <= 3
    with pytest.raises(InputError, match="icc must be"):
        open_source(path, slide_mpp=0.5, icc="p3")


def test_a_profile_that_cannot_be_used_is_named_and_colours_stay(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(perf_vit.errors, "_warned", set())
    good = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for name, profile in {"junk": b"not a profile" * 20, "truncated": good[:200], "lab": lab}.items():
        path = write_pyramid(tmp_path / f"{name}.svs", levels_of(128, 128, 1), aperio_mpp=0.5, icc=profile)
        with pytest.warns(DataWarning, match=rf"{name}\.svs is read without conversion to sRGB, because its ICC"):
            source = open_source(path, icc="srgb")
        assert np.array_equal(source.read(source.extent).pixels, levels_of(128, 128, 1)[0].transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", [".tif", ".svs"])
@pytest.mark.parametrize("dtype", ["uint16", "float32", "uint8"])
@pytest.mark.parametrize("num_bands", [1, 2, 3, 5])
def test_pixels_other_than_colours_keep_their_values(tmp_path: Path, suffix: str, dtype: str, num_bands: int) -> None:
    path, pixels = tmp_path / f"a{suffix}", noise(200, 130, num_bands, dtype)
    photometric = "rgb" if num_bands == 3 else "minisblack"
    stated = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    if suffix == ".svs":
        stated = {"description": "Aperio Image Library\r\n|AppMag = 20|MPP = 0.5"}
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for level in (pixels, pixels[::2, ::2]):
            options = {"tile": (64, 64), "photometric": photometric, "metadata": None, "planarconfig": "contig"}
            writer.write(level.squeeze(), subfiletype=int(level is not pixels), **options, **stated)
            stated = {name: value for name, value in stated.items() if name == "description"}
    # The second picture of an SVS is its thumbnail.
    for mpp, level in ((0.5, pixels), (1.0, pixels[::2, ::2]))[: 1 if suffix == ".svs" else 2]:
        source = open_source(path, mpp=mpp)
        image = source.read(source.extent)
        assert (source.dtype, source.slide_mpp, source.num_bands) == (np.dtype(dtype), (0.5, 0.5), num_bands)
        assert np.array_equal(image.pixels, level.transpose(2, 0, 1))
        assert image.valid.all()
    colours = ("red", "green", "blue") if num_bands == 3 else tuple(f"band_{n}" for n in range(1, num_bands + 1))
    assert source.band_names == colours


def _checksum(source: SlideSource) -> int:
    return int(source.read(Window(10, 10, 100, 100)).pixels.astype(np.int64).sum())


def test_slides_survive_pickling_threads_and_forks(slide: Path) -> None:
    source = open_source(slide, mpp=0.9, tissue="otsu")
    expected = _checksum(source)
    assert _checksum(pickle.loads(pickle.dumps(source))) == expected
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(_checksum, [source] * 16)) == {expected}
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as processes:
        assert set(processes.map(_checksum, [source] * 4)) == {expected}


def test_a_closed_slide_opens_again(slide: Path) -> None:
    with open_source(slide) as source:
        expected = _checksum(source)
    assert _checksum(source) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 3}, "level of .* must be 0 to 2"),
        ({"level": -1}, "level of .* must be 0 to 2"),
        ({"mpp": 1.0, "level": 1}, "mpp or level"),
        ({"mpp": 0.0}, "mpp must be above 0"),
        ({"bands": ["green", "infrared"]}, "red, green, blue; got 'infrared'"),
        ({"nodata": 0}, "nodata is for rasters"),
    ],
)
def test_wrong_options_are_one_clear_line(slide: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_source(slide, **options)


def test_a_broken_slide_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "broken.svs"
    path.write_bytes(b"no slide")
    with pytest.raises(InputError, match=r"can't open .*broken\.svs as a slide"):
        open_source(path)
    with pytest.raises(InputError, match="no such file"):
        open_source(tmp_path / "none.svs")


def test_a_damaged_tile_is_an_input_error_and_others_are_still_read(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "damaged.svs", levels_of(256, 256, 1), aperio_mpp=0.5)
    content = bytearray(path.read_bytes())
    start = len(content) - 6000
    content[start:-1] = bytes(len(content) - 1 - start)
    path.write_bytes(bytes(content))
    source = open_source(path)
    with pytest.raises(InputError, match=r"level 0 of .*damaged\.svs"):
        source.read(source.extent)
    assert source.read(Window(0, 0, 64, 64)).pixels.any()


def test_without_openslide_a_slide_says_what_to_install(slide: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(MissingPackageError, match=r'needs openslide, .*pip install "perf-vit\[slides\]"'):
        open_source(slide)


@pytest.mark.parametrize("options", [{"mpp": 1.0}, {"level": 0}, {"tissue": "otsu"}, {"slide_mpp": 0.5}])
def test_slide_options_on_a_georeferenced_raster_are_refused(make_scene, options: dict) -> None:
    path = make_scene(dtype="uint8", height=600, width=600, tiled=True, blockxsize=64, blockysize=64)
    assert isinstance(open_source(path), RasterSource)
    with pytest.raises(InputError, match=f"{next(iter(options))} can't be used with .* a raster"):
        open_source(path, **options)


def test_a_plain_tiff_is_a_slide_if_it_is_a_pyramid_of_colours_or_read_as_one(make_scene, tmp_path: Path) -> None:
    nowhere = {"crs": None, "transform": None, "nodata": None, "dtype": "uint8"}
    tiles = {"tiled": True, "blockxsize": 64, "blockysize": 64, "height": 150, "width": 140}
    pyramid = write_pyramid(tmp_path / "pyramid.tif", levels_of(200, 160, 2))
    with warnings.catch_warnings(action="ignore"):
        single, strips = make_scene(**nowhere, **tiles), make_scene(**nowhere)
    assert isinstance(open_source(pyramid), SlideSource)
    assert isinstance(open_source(pyramid, nodata=0), RasterSource)
    assert isinstance(open_source(single), RasterSource)
    assert isinstance(open_source(single, mpp=1.0, slide_mpp=0.5), SlideSource)
    assert isinstance(open_source(strips), RasterSource)
    with pytest.raises(InputError, match="mpp can't be used"):
        open_source(strips, mpp=1.0)


@pytest.mark.parametrize(
    ("full", "reduced", "expected"),
    [(1001, 250, 4), (1001, 251, 4), (60_000, 235, 256), (1000, 400, 2.5), (9, 3, 3), (5, 5, 1)],
)
def test_downsamples_are_whole_where_sizes_were_rounded(full: int, reduced: int, expected: float) -> None:
    assert true_downsample(full, reduced) == expected
