"""Photos are read as viewers show them, whatever way up the camera stored them."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image, ImageOps
from rasterio.errors import NotGeoreferencedWarning

from perf_vit.sources import describe_source, open_source
from perf_vit.types import Window

HEIGHT, WIDTH = 45, 63


def _photo(path: Path, orientation: int, *, big_tiff: bool = False) -> Path:
    pixels = np.random.default_rng(orientation).integers(0, 255, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x112] = orientation
    options = {"quality": 100, "subsampling": 0} if path.suffix == ".jpg" else {}
    options |= {"lossless": True} if path.suffix == ".webp" else {}
    options |= {"big_tiff": True} if big_tiff else {}
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return path


def _shown(path: Path, orientation: int) -> np.ndarray:
    """[C, H, W], the stored pixels as Pillow turns them; its decoder rounds JPEGs another way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path) as dataset:
            image = Image.fromarray(dataset.read().transpose(1, 2, 0))
    image.getexif()[0x112] = orientation
    return np.asarray(ImageOps.exif_transpose(image)).transpose(2, 0, 1)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_window_equals_what_viewers_show(tmp_path, suffix, orientation) -> None:
    path = _photo(tmp_path / f"a.{suffix}", orientation)
    source, shown = open_source(path), _shown(path, orientation)
    assert source.size == shown.shape[1:] == ((WIDTH, HEIGHT) if orientation >= 5 else (HEIGHT, WIDTH))
    assert source.orientation == orientation
    assert np.array_equal(source.read(source.extent).pixels, shown)
    for window in (Window(-5, -7, 20, 30), Window(10, 3, 1, 17), Window(30, 30, 100, 100), Window(5, 20, 13, 8)):
        image = source.read(window)
        padded = np.pad(shown, ((0, 0), (200, 200), (200, 200)))
        rows, cols = slice(window.row + 200, window.row_stop + 200), slice(window.col + 200, window.col_stop + 200)
        assert np.array_equal(image.pixels, padded[:, rows, cols])
        assert image.valid.sum() == window.intersect(source.extent).height * window.intersect(source.extent).width
    assert np.array_equal(source.read_reduced(21).pixels, shown[:, 1::3, 1::3])


def test_a_tag_after_the_pixels_of_a_png_and_in_a_big_tiff_counts(tmp_path) -> None:
    path = _photo(tmp_path / "a.png", 6)
    content = path.read_bytes()
    at = content.index(b"eXIf") - 4
    chunk = content[at : at + 12 + int.from_bytes(content[at : at + 4], "big")]
    rest = content.replace(chunk, b"")
    path.write_bytes(rest[:-12] + chunk + rest[-12:])
    assert open_source(path).size == (WIDTH, HEIGHT)
    big = _photo(tmp_path / "b.tif", 8, big_tiff=True)
    assert np.array_equal(open_source(big).read(Window(0, 0, WIDTH, HEIGHT)).pixels, _shown(big, 8))


@pytest.mark.parametrize("place", [{"crs": "EPSG:32637", "transform": rasterio.Affine(2, 0, 4e5, 0, -2, 45e5)},
                                   {"transform": rasterio.Affine(2, 0, 4e5, 0, -2, 45e5)}])  # fmt: skip
def test_a_georeferenced_tiff_keeps_its_pixels(tmp_path, place) -> None:
    path = _photo(tmp_path / "a.tif", 6)
    stored = _shown(_photo(tmp_path / "b.tif", 6), 1)
    with rasterio.open(path, "r+") as dataset:
        for name, value in place.items():
            setattr(dataset, name, value)
    source = open_source(path)
    assert source.orientation == 1
    assert source.size == (HEIGHT, WIDTH)
    assert np.array_equal(source.read(source.extent).pixels, stored)


@pytest.mark.parametrize("tag", [b"", b"Exif\x00\x00", b"MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12", b"\xff" * 40])
def test_a_damaged_tag_turns_nothing(tmp_path, tag) -> None:
    path = tmp_path / "a.png"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(path, exif=tag or None)
        assert open_source(path).size == (HEIGHT, WIDTH)


def test_what_is_known_of_a_photo_says_that_it_is_turned(tmp_path) -> None:
    info = describe_source(open_source(_photo(tmp_path / "a.jpg", 6)))
    assert (info.orientation, info.height, info.width) == (6, WIDTH, HEIGHT)
    assert info.levels[0] == (WIDTH, HEIGHT)
    assert describe_source(open_source(_photo(tmp_path / "b.jpg", 1))).orientation == 1
