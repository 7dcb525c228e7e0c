from pathlib import Path

import numpy as np
import pytest
from slides import write_pyramid, write_tiff
from tissue_pictures import BRIGHTFIELD, TissuePicture, fluorescence_picture, stained_picture

from perf_vit.errors import InputError
from perf_vit.plotting import tissue_picture
from perf_vit.sources import open_source
from perf_vit.sources.slides.brightfield import find_stained, find_tissue
from perf_vit.sources.slides.fluorescence import find_fluorescent

# Half of this haematoxylin is a difference of 3 grey levels.
VERY_PALE = "pale counterstain"


def held_out(*seeds: int) -> pytest.MarkDecorator:
    """The first of several seeds in the fast suite, the others in the slow one."""
    first, *others = seeds
    return pytest.mark.parametrize("seed", [first, *(pytest.param(each, marks=pytest.mark.slow) for each in others)])


def overlap(mask: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union; 1 for two empty masks."""
    return float((mask & truth).sum() / max(1, (mask | truth).sum())) if mask.any() or truth.any() else 1.0


def check(mask: np.ndarray, made: TissuePicture, least: float = 0.9, most: float = 0.01) -> None:
    assert overlap(mask, made.tissue) >= least
    assert (mask & made.glass).sum() <= most * max(1, made.glass.sum())


@held_out(20, 21, 22)
@pytest.mark.parametrize("kind", sorted(set(BRIGHTFIELD) - {VERY_PALE}))
def test_tissue_of_stained_slides(kind: str, seed: int) -> None:
    made = stained_picture(kind, seed, (600, 840))
    check(find_stained(made.pixels, made.valid), made)


@held_out(18, 20, 29, 31, 33)
def test_red_ink_over_dark_tissue_is_left_out(seed: int) -> None:
    made = stained_picture("red ink", seed, (600, 840))
    mask = find_stained(made.pixels, made.valid)
    check(mask, made)
    under_ink = ~made.tissue & ~made.glass
    assert (mask & under_ink).sum() < 0.01 * under_ink.sum()


@held_out(20, 21, 22)
def test_counterstain_that_is_hardly_seen_is_mostly_found(seed: int) -> None:
    made = stained_picture(VERY_PALE, seed, (600, 840))
    check(find_stained(made.pixels, made.valid), made, least=0.7)


@held_out(20, 21)
@pytest.mark.parametrize("cover", ["some", "all", "none"])
@pytest.mark.parametrize(("num_channels", "dtype"), [(1, "uint8"), (1, "uint16"), (2, "uint16"), (5, "uint8")])
def test_tissue_of_fluorescence(num_channels: int, dtype: str, cover: str, seed: int) -> None:
    made = fluorescence_picture(seed, num_channels=num_channels, dtype=dtype, cover=cover)
    check(find_fluorescent((band, made.valid) for band in made.pixels), made)


def test_otsu_does_not_take_ink_for_tissue() -> None:
    made = stained_picture("pale beside blue ink", 20, (600, 840))
    check(find_tissue(made.pixels, made.valid), made, least=0.8, most=0.05)


def test_missing_tiles_of_zeros_are_no_background_of_fluorescence() -> None:
    made = fluorescence_picture(23, num_channels=2, dtype="uint16")
    pixels = made.pixels.copy()
    pixels[:, :140] = pixels[:, :, 500:] = 0
    held = np.ones_like(made.valid)
    held[:140] = held[:, 500:] = False
    mask = find_fluorescent((band, made.valid) for band in pixels)
    assert overlap(mask, made.tissue & held) >= 0.9


def levels_of(pixels: np.ndarray) -> list[np.ndarray]:
    return [pixels, pixels[::4, ::4].copy()]


def test_the_method_follows_the_pixels(tmp_path: Path) -> None:
    stained = stained_picture("he", 24)
    path = write_pyramid(tmp_path / "stained.svs", levels_of(stained.pixels.transpose(1, 2, 0).copy()), aperio_mpp=8.0)
    source = open_source(path, tissue="auto")
    check(source.read(source.extent).valid, stained)
    dark = fluorescence_picture(24, num_channels=3, dtype="uint8")
    path = write_pyramid(tmp_path / "dark.svs", levels_of(dark.pixels.transpose(1, 2, 0).copy()), aperio_mpp=8.0)
    source = open_source(path, tissue="auto")
    check(source.read(source.extent).valid, dark)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_channels_of_an_ome_tiff_are_fluorescence(tmp_path: Path, dtype: str) -> None:
    made = fluorescence_picture(25, num_channels=3, dtype=dtype)
    path = write_tiff(tmp_path / "fluo.ome.tif", [made.pixels], size=(8.0, 8.0))
    source = open_source(path, tissue="auto")
    check(source.read(source.extent).valid, made)
    if dtype == "uint16":
        with pytest.raises(InputError, match='use tissue="auto"'):
            open_source(path, tissue="otsu")


def test_a_small_or_empty_picture_has_a_mask() -> None:
    for shape in ((1, 1), (3, 2), (9, 40)):
        white = np.full((3, *shape), 240, np.uint8)
        assert not find_stained(white, np.zeros(shape, bool)).any()
        assert find_stained(white, np.ones(shape, bool)).shape == shape
        zeros = np.zeros(shape, np.uint16)
        assert not find_fluorescent([(zeros, np.zeros(shape, bool))]).any()
        assert find_fluorescent([(zeros, np.ones(shape, bool))]).shape == shape


def test_a_picture_shows_the_outline_and_keeps_the_rest(tmp_path: Path) -> None:
    made = stained_picture("he", 26)
    path = write_pyramid(tmp_path / "a.svs", levels_of(made.pixels.transpose(1, 2, 0).copy()), aperio_mpp=8.0)
    source = open_source(path, tissue="auto")
    image, picture = source.read(source.extent), tissue_picture(source)
    changed = (picture != image.pixels.transpose(1, 2, 0)).any(-1)
    assert 0.002 < changed.mean() < 0.1
    assert not (changed & ~image.valid).any()
    assert np.array_equal(np.asarray(source.plot()), picture)
