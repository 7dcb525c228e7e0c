"""A contract of all readers: the same picture gives the same slide, whatever it is stored in."""

import pickle
import threading
from pathlib import Path

import numpy as np
import openslide
import pytest
import wsidicom
from bounded import with_bounds
from slide_containers import COLOURS, CONTAINERS, TILE_PX, levels_of, picture, write_pages

from perf_vit.sources import open_source
from perf_vit.types import Window

KINDS = list(CONTAINERS)
SVS = "SVS, JPEG"
SPARSE = [kind for kind, container in CONTAINERS.items() if container.drop_tile is not None and kind != SVS]
WITH_ALPHA = [kind for kind, container in CONTAINERS.items() if container.has_alpha]
ALL = Window(0, 0, 333, 245)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The picture in each container."""
    paths = {}
    for number, (kind, container) in enumerate(CONTAINERS.items()):
        folder = tmp_path_factory.mktemp(f"container-{number}")
        paths[kind] = container.write(folder, levels_of(picture()))
    return paths


def assert_equal(kind: str, pixels: np.ndarray, expected: np.ndarray) -> None:
    """Within the error of the compression; [C, H, W]."""
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= CONTAINERS[kind].largest_error


@pytest.mark.parametrize("kind", KINDS)
def test_size_levels_scale_type_and_names(files, kind) -> None:
    source = open_source(files[kind])
    assert (source.size, source.levels) == ((333, 245), ((333, 245), (166, 122)))
    assert source.slide_mpp == pytest.approx((0.5, 0.5))
    assert (source.dtype, source.band_names, source.mask_name) == (np.uint8, COLOURS, None)
    assert open_source(files[kind], level=1).downsample_xy == (2, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0, 1])
def test_pixels_of_a_level_are_those_of_the_picture(files, kind, level) -> None:
    expected = levels_of(picture())[level].transpose(2, 0, 1)
    for how in ({"level": level}, {"mpp": 0.5 * 2**level}):
        source = open_source(files[kind], **how)
        image = source.read(source.extent)
        assert_equal(kind, image.pixels, expected)
        assert image.valid.all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [{"level": 0}, {"level": 1}, {"mpp": 0.9}, {"mpp": 0.31}])
def test_windows_across_tiles_and_edges_are_crops_of_the_padded_slide(files, kind, how) -> None:
    source = open_source(files[kind], **how)
    whole = source.read(source.extent)
    padded = np.pad(whole.pixels, ((0, 0), (99, 99), (99, 99)), constant_values=255)
    valid = np.pad(np.ones(source.size, bool), 99)
    height, width = source.size
    corners = [(TILE_PX - 5, TILE_PX - 9), (-33, -20), (height - 30, width - 40), (-40, width - 10), (height + 5, 0)]
    for row, col in corners:
        image = source.read(Window(row, col, 71, 67))
        rows, cols = slice(row + 99, row + 99 + 71), slice(col + 99, col + 99 + 67)
        assert np.array_equal(image.pixels, padded[:, rows, cols])
        assert np.array_equal(image.valid, valid[rows, cols])


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("mpp", [0.31, 0.9, 1.7, 4.0])
def test_other_sizes_agree_with_the_first_container(files, kind, mpp) -> None:
    first, other = open_source(files[KINDS[0]], mpp=mpp), open_source(files[kind], mpp=mpp)
    assert (first.size, first.mpp) == (other.size, pytest.approx(other.mpp))
    assert_equal(kind, other.read(other.extent).pixels, first.read(first.extent).pixels)
    assert_equal(kind, other.read_reduced(50).pixels, first.read_reduced(50).pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_bands_are_chosen_by_number_and_name(files, kind) -> None:
    source = open_source(files[kind], bands=["blue", 1])
    assert (source.band_names, source.bands) == (("blue", "red"), (3, 1))
    assert_equal(kind, source.read(ALL).pixels, picture().transpose(2, 0, 1)[[2, 0]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_source_reads_the_same(files, kind) -> None:
    source = open_source(files[kind], mpp=0.9, tissue="otsu")
    other = pickle.loads(pickle.dumps(source))
    before, after = source.read(source.extent), other.read(other.extent)
    assert np.array_equal(before.pixels, after.pixels)
    assert np.array_equal(before.valid, after.valid)


def hole(level: int) -> np.ndarray:
    """Pixels of a level that lie in the tile of rows 64 to 127 and columns 128 to 191, [H, W]."""
    found = np.zeros(levels_of(picture())[level].shape[:2], bool)
    found[TILE_PX : 2 * TILE_PX, : TILE_PX if level else 0] = True
    found[TILE_PX : 2 * TILE_PX, 2 * TILE_PX : 3 * TILE_PX if not level else 0] = True
    return found


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("level", [0, 1])
def test_a_missing_tile_is_white_and_invalid_at_its_level_only(tmp_path, kind, level) -> None:
    container = CONTAINERS[kind]
    path = container.write(tmp_path, levels_of(picture()))
    container.drop_tile(path, level, 1, 0 if level else 2)
    source, expected = open_source(path, level=level), levels_of(picture())[level].transpose(2, 0, 1)
    image = source.read(source.extent)
    assert np.array_equal(image.valid, ~hole(level))
    assert (image.pixels[:, hole(level)] == 255).all()
    assert_equal(kind, image.pixels[:, image.valid], expected[:, image.valid])
    other = open_source(path, level=1 - level)
    assert other.read(other.extent).valid.all()
    # A window inside of the hole, and one that only touches it.
    row, col = np.argwhere(hole(level))[0].tolist()
    assert not source.read(Window(row + 3, col + 3, 9, 9)).valid.any()
    assert source.read(Window(row - 5, col, 6, 10)).valid.sum() == 50


def test_a_missing_tile_of_an_svs_is_invalid_where_no_other_level_has_it(tmp_path) -> None:
    # OpenSlide makes up for a coarse tile from level 0, and hides in coarse levels what level 0 lacks.
    path = CONTAINERS[SVS].write(tmp_path, levels_of(picture()))
    CONTAINERS[SVS].drop_tile(path, 1, 1, 0)
    assert open_source(path, level=1).read(Window(0, 0, 166, 122)).valid.all()
    CONTAINERS[SVS].drop_tile(path, 0, 1, 2)
    image = open_source(path).read(ALL)
    assert np.array_equal(image.valid, ~hole(0))
    assert (image.pixels[:, hole(0)] == 255).all()
    assert not open_source(path, level=1).read(Window(32, 64, 31, 31)).valid.any()


@pytest.mark.parametrize("kind", SPARSE)
def test_a_missing_tile_is_not_mixed_into_its_neighbours(tmp_path, kind) -> None:
    container = CONTAINERS[kind]
    whole = container.write(tmp_path, levels_of(picture()))
    before = open_source(whole, mpp=0.7).read(Window(0, 0, 238, 175))
    container.drop_tile(whole, 0, 1, 2)
    after = open_source(whole, mpp=0.7).read(Window(0, 0, 238, 175))
    inside = np.zeros((238, 175), bool)
    inside[45:92, 91:138] = True
    assert not after.valid[48:89, 94:134].any()
    assert after.valid[~inside].all()
    near = np.zeros_like(inside)
    near[44:93, 90:139] = True
    assert np.array_equal(after.pixels[:, ~near], before.pixels[:, ~near])


@pytest.mark.parametrize("kind", WITH_ALPHA)
@pytest.mark.filterwarnings("ignore:band 4 of")
def test_transparent_pixels_are_white_and_invalid(tmp_path, kind) -> None:
    alpha = np.full((333, 245, 1), 255, np.uint8)
    alpha[40:100, 50:130] = 0
    # Colours under them are those that writers leave there, black.
    colours = picture() * (alpha > 0)
    path = CONTAINERS[kind].write(tmp_path, levels_of(np.concatenate([colours, alpha], 2)))
    for level in (0, 1):
        source = open_source(path, level=level)
        image = source.read(source.extent)
        expected = levels_of(alpha)[level][..., 0] > 0
        assert (source.num_bands, source.band_names) == (3, COLOURS)
        assert np.array_equal(image.valid, expected)
        assert (image.pixels[:, ~expected] == 255).all()
        assert np.array_equal(image.pixels[:, expected], levels_of(picture())[level].transpose(2, 0, 1)[:, expected])


def test_pixels_outside_of_bounds_are_white_and_invalid(tmp_path, monkeypatch) -> None:
    canvas = np.zeros((433, 345, 3), np.uint8)
    canvas[60 : 60 + 333, 40 : 40 + 245] = picture()
    path = write_pages(tmp_path / "a.svs", levels_of(canvas), aperio=True)
    with_bounds(monkeypatch, x=40, y=60, width=245, height=333)
    source = open_source(path)
    image = source.read(source.extent)
    inside = np.zeros((433, 345), bool)
    inside[60 : 60 + 333, 40 : 40 + 245] = True
    assert np.array_equal(image.valid, inside)
    assert np.array_equal(image.pixels[:, inside], picture().transpose(2, 0, 1).reshape(3, -1))
    assert (image.pixels[:, ~inside] == 255).all()


def test_slides_and_threads_share_one_cache_of_decoded_tiles(tmp_path) -> None:
    paths = [write_pages(tmp_path / f"{name}.svs", levels_of(picture()), aperio=True) for name in "ab"]
    caches = []

    class Slide(openslide.OpenSlide):
        def set_cache(self, cache) -> None:
            caches.append(cache)
            super().set_cache(cache)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openslide, "OpenSlide", Slide)
        for path in paths:
            source = open_source(path)
            reader = threading.Thread(target=source.read, args=(ALL,))
            reader.start()
            reader.join()
    # Two slides, each opened by this thread and by one that reads.
    assert len(caches) >= 4
    assert len(set(map(id, caches))) == 1


def test_the_dicom_slide_is_one_to_another_library(files) -> None:
    with wsidicom.WsiDicom.open(files["DICOM"]) as slide:
        assert (slide.size.height, slide.size.width, slide.mpp.width) == (333, 245, pytest.approx(0.5))
        found = np.asarray(slide.read_region((0, 0), 0, (245, 333)))[..., :3]
    assert np.array_equal(found, picture())
