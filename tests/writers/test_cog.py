import struct
import subprocess
import sys
from contextlib import closing

import numpy as np
import pyproj
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rio_cogeo.cogeo import cog_validate

from perf_vit.errors import OutputError
from perf_vit.sources import open_source
from perf_vit.sources.files import is_own
from perf_vit.writers import CogWriter, RasterLayout
from perf_vit.writers.blocks import encode_blocks
from perf_vit.writers.cog_file import write_cog_file
from perf_vit.writers.layout import BLOCK_PX
from perf_vit.writers.pyramid import Level, Pyramid

UTM = CRS.from_epsg(32637)
PLACE = Affine(2.5, 0, 401_000.125, 0, -3.25, 4_510_000.5)


def _writer(path, pixels, **options):
    count, height, width = pixels.shape
    layout = {"height": height, "width": width, "num_bands": count, "dtype": pixels.dtype}
    return CogWriter(path, RasterLayout(**{**layout, "crs": UTM, "transform": PLACE, **options}))


def _write(path, pixels, step=100, **options) -> None:
    with _writer(path, pixels, **options) as writer:
        for row in range(0, pixels.shape[1], step):
            writer.write(row, pixels[:, row : row + step])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize(("num_bands", "height", "width"), [(1, 700, 1301), (7, 33, 20), (3, 1, 600)])
def test_strips_become_a_valid_cog_with_the_same_pixels(tmp_path, dtype, num_bands, height, width) -> None:
    pixels = (np.random.default_rng(0).random((num_bands, height, width)) * 200).astype(dtype)
    path = tmp_path / "out.tif"
    names = [f"name {i}" for i in range(num_bands)]
    _write(path, pixels, nodata=0, band_names=names, tags={"MODEL": "x"})
    assert cog_validate(path, strict=True) == (True, [], [])
    with rasterio.open(path) as dataset:
        assert np.array_equal(dataset.read(), pixels)
        assert dataset.crs == UTM
        assert dataset.transform.almost_equals(PLACE, precision=1e-9)
        assert dataset.nodata == 0
        assert dataset.descriptions == tuple(names)
        assert dataset.tags()["MODEL"] == "x"
        assert bool(dataset.overviews(1)) == (max(height, width) > 512)
    assert list(tmp_path.iterdir()) == [path]


def test_a_class_map_keeps_its_colours_and_overviews_hold_classes_only(tmp_path) -> None:
    pixels = np.random.default_rng(0).choice([0, 200], (1, 1200, 1200)).astype(np.uint8)
    colors = {0: (1, 2, 3, 255), 200: (40, 50, 60, 255), 255: (0, 0, 0, 0)}
    _write(tmp_path / "map.tif", pixels, colormap=colors, nodata=255)
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert {value: dataset.colormap(1)[value] for value in (0, 200)} == {v: colors[v] for v in (0, 200)}
    with rasterio.open(tmp_path / "map.tif", overview_level=0) as overview:
        assert set(np.unique(overview.read(1))) == {0, 200}


def test_overviews_of_measurements_are_averages(tmp_path) -> None:
    pixels = np.zeros((1, 1024, 1024), np.float32)
    pixels[:, ::2] = 10
    _write(tmp_path / "p.tif", pixels)
    with rasterio.open(tmp_path / "p.tif", overview_level=0) as overview:
        assert np.allclose(overview.read(1), 5)


def test_an_error_in_the_block_leaves_nothing_and_keeps_what_was_there(tmp_path) -> None:
    pixels = np.ones((1, 50, 50), np.uint8)
    path = tmp_path / "out.tif"
    path.write_bytes(b"before")
    with pytest.raises(KeyError), _writer(path, pixels) as writer:
        writer.write(0, pixels)
        raise KeyError
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_are_made_and_unmade_with_the_file(tmp_path) -> None:
    pixels = np.ones((1, 50, 50), np.uint8)
    with pytest.raises(KeyError), _writer(tmp_path / "a" / "b" / "out.tif", pixels):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    _write(tmp_path / "a" / "b" / "out.tif", pixels)
    assert (tmp_path / "a" / "b" / "out.tif").is_file()


def test_the_file_appears_only_when_it_is_complete(tmp_path) -> None:
    pixels = np.ones((1, 50, 50), np.uint8)
    with _writer(tmp_path / "out.tif", pixels) as writer:
        writer.write(0, pixels)
        assert not (tmp_path / "out.tif").exists()
    assert (tmp_path / "out.tif").exists()


def test_a_place_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="can't write"), _writer(tmp_path / "file" / "o.tif", np.ones((1, 5, 5))):
        pytest.fail("the block must not be entered")


def test_a_raster_without_georeference_stays_without(tmp_path) -> None:
    pixels = np.arange(60, dtype=np.int16).reshape(1, 6, 10)
    _write(tmp_path / "plain.tif", pixels, crs=None, transform=Affine.identity())
    source = open_source(tmp_path / "plain.tif")
    assert source.crs is None
    assert source.transform == Affine.identity()
    assert np.array_equal(source.read(source.extent).pixels, pixels)


def test_overviews_of_a_map_without_colours_can_be_asked_for(tmp_path) -> None:
    pixels = np.random.default_rng(0).choice([0, 200], (1, 600, 600)).astype(np.uint8)
    _write(tmp_path / "map.tif", pixels, overviews="nearest")
    with rasterio.open(tmp_path / "map.tif", overview_level=0) as overview:
        assert set(np.unique(overview.read(1))) == {0, 200}


def test_a_file_too_large_for_offsets_of_32_bits_is_a_bigtiff(tmp_path, monkeypatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (3, 600, 1301)).astype(np.uint16)
    _write(tmp_path / "small.tif", pixels, nodata=0)
    monkeypatch.setattr("perf_vit.writers.cog_file._MOST_BYTES", 1000)
    _write(tmp_path / "big.tif", pixels, nodata=0)
    assert (tmp_path / "big.tif").read_bytes()[:4] == b"II\x2b\0"
    assert cog_validate(tmp_path / "big.tif", strict=True) == (True, [], [])
    with rasterio.open(tmp_path / "big.tif") as big, rasterio.open(tmp_path / "small.tif") as small:
        assert np.array_equal(big.read(), pixels)
        assert (big.crs, big.transform, big.nodata) == (small.crs, small.transform, small.nodata)


def test_blocks_beyond_4_gib_are_found_in_a_bigtiff(tmp_path, monkeypatch) -> None:
    """Sizes of blocks are made up: the file is written without them, and gets its last block at its true place."""
    pixels = np.random.default_rng(0).integers(0, 200, (2, 512, 1500)).astype(np.uint8)
    layout = RasterLayout(height=512, width=1500, num_bands=2, dtype=pixels.dtype, crs=UTM, transform=PLACE)
    path = tmp_path / "big.tif"
    blocks = encode_blocks(pixels, layout)
    with closing(Pyramid(layout, tmp_path)) as pyramid:
        for level in pyramid.levels:
            level.sizes = [len(blocks[-1])] * -(-level.width // BLOCK_PX)
        raster = pyramid.levels[0]
        raster.sizes = [3 << 30, 3 << 30, len(blocks[-1])]
        monkeypatch.setattr("perf_vit.writers.cog_file._verify", lambda *_: None)
        write_cog_file(path, layout, pyramid, path)
        start = path.stat().st_size + sum(level.num_bytes for level in pyramid.levels[1:])
    offset = start + 2 * (3 << 30) + 2 * 8 + 4
    with path.open("rb+") as file:
        file.seek(offset)
        file.write(blocks[-1])
    with path.open("rb") as file:
        assert file.read(4) == b"II\x2b\0"
    with rasterio.open(path) as dataset:
        assert dataset.get_tag_item("BLOCK_OFFSET_2_0", "TIFF", bidx=1) == str(offset)
        assert dataset.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1) == str(start + 4)
        assert np.array_equal(dataset.read(window=((0, 512), (1024, 1500))), pixels[:, :, 1024:])


@pytest.mark.parametrize(("spare", "magic"), [(0, 42), (-1, 43)])
def test_the_largest_file_with_offsets_of_32_bits(tmp_path, monkeypatch, spare: int, magic: int) -> None:
    layout = RasterLayout(height=20, width=900, num_bands=1, dtype=np.dtype("uint8"))
    monkeypatch.setattr("perf_vit.writers.cog_file._verify", lambda *_: None)
    with closing(Pyramid(layout, tmp_path)) as pyramid:
        for level in pyramid.levels:
            level.sizes = [100] * -(-level.width // BLOCK_PX)
        monkeypatch.setattr("perf_vit.writers.cog_file._MOST_BYTES", 0)
        write_cog_file(tmp_path / "header", layout, pyramid, tmp_path)
        monkeypatch.undo()
        monkeypatch.setattr("perf_vit.writers.cog_file._verify", lambda *_: None)
        header = (tmp_path / "header").stat().st_size
        rest = sum(level.num_bytes for level in pyramid.levels) - 100
        pyramid.levels[0].sizes[0] = (1 << 32) - 1 - header - rest - spare
        write_cog_file(tmp_path / "made", layout, pyramid, tmp_path)
    assert struct.unpack("<2sH", (tmp_path / "made").read_bytes()[:4]) == (b"II", magic)


@pytest.mark.parametrize("most_bytes", [1 << 32, 0])
def test_tags_precede_the_places_of_many_blocks(tmp_path, monkeypatch, most_bytes: int) -> None:
    """A map of 2,400 blocks is known as one of perf_vit by its beginning; sizes of blocks are made up."""
    tags = {"PERF_VIT_VERSION": "1"}
    layout = RasterLayout(height=40 * 512, width=60 * 512, num_bands=1, dtype=np.dtype("uint8"), tags=tags)
    path = tmp_path / "large.tif"
    monkeypatch.setattr("perf_vit.writers.cog_file._verify", lambda *_: None)
    monkeypatch.setattr("perf_vit.writers.cog_file._MOST_BYTES", most_bytes)
    with closing(Pyramid(layout, tmp_path)) as pyramid:
        for level in pyramid.levels:
            level.sizes = [100] * (-(-level.width // BLOCK_PX) * -(-level.height // BLOCK_PX))
        write_cog_file(path, layout, pyramid, path)
    assert b"PERF_VIT_VERSION" in path.read_bytes()[:4096]
    assert is_own(path)
    with rasterio.open(path) as dataset:
        assert dataset.tags()["PERF_VIT_VERSION"] == "1"
        assert dataset.get_tag_item("BLOCK_SIZE_59_39", "TIFF", bidx=1) == "100"
        assert dataset.overviews(1) == [2, 4, 8, 16, 32, 64]


def test_blocks_that_differ_on_disk_are_found(tmp_path, monkeypatch) -> None:
    read = Level.append

    def append(self: Level, block: bytes) -> None:
        read(self, block)
        self.checksum += 1

    monkeypatch.setattr(Level, "append", append)
    with pytest.raises(OutputError, match="blocks differ on disk"):
        _write(tmp_path / "out.tif", np.ones((1, 50, 50), np.uint8))
    assert list(tmp_path.iterdir()) == []


def _write_part(path, pixels, block) -> None:
    with _writer(path, pixels) as writer:
        writer.write(0, block)


@pytest.mark.parametrize(
    ("block", "match"),
    [
        (np.ones((1, 40, 50), np.uint8), "expected 50 rows .*, got 40"),
        (np.ones((1, 51, 50), np.uint8), "inside 50 rows"),
        (np.ones((2, 50, 50), np.uint8), r"got \[2, 50, 50\]"),
        (np.ones((1, 50, 50), np.int16), "of int16 at row 0"),
    ],
)
def test_strips_that_do_not_fit_leave_nothing(tmp_path, block, match: str) -> None:
    with pytest.raises(OutputError, match=match):
        _write_part(tmp_path / "out.tif", np.ones((1, 50, 50), np.uint8), block)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_the_file(tmp_path) -> None:
    with pytest.raises(OutputError, match="it is a folder"):
        _write(tmp_path, np.ones((1, 5, 5), np.uint8))


def test_a_crs_that_geotiff_has_no_keys_for_is_told(tmp_path, recwarn) -> None:
    pole = {"proj": "ob_tran", "o_proj": "longlat", "o_lat_p": 39.25, "o_lon_p": 0, "lon_0": 18, "datum": "WGS84"}
    layout = {"height": 4, "width": 4, "num_bands": 1, "dtype": "uint8", "transform": Affine(0.1, 0, 5, 0, -0.1, 5)}
    for crs, told in (("EPSG:32637", []), (pyproj.CRS.from_dict(pole).to_wkt(), ["GeoTIFF can't hold the CRS of"])):
        with CogWriter(tmp_path / "map.tif", RasterLayout(crs=CRS.from_user_input(crs), **layout)) as writer:
            writer.write(0, np.zeros((1, 4, 4), np.uint8))
        found = [str(one.message) for one in recwarn if "GeoTIFF" in str(one.message)]
        assert [one[:29] for one in found] == told


_FILL = """
import resource, sys
import numpy as np
from perf_vit.errors import OutputError
from perf_vit.writers import CogWriter, RasterLayout

path, size = sys.argv[1], int(sys.argv[2])
pixels = np.random.default_rng(0).integers(0, 255, (1, 700, 700)).astype(np.uint8)
for share in (0.05, 0.5, 0.8, 0.95, 0.999):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), resource.RLIM_INFINITY))
    try:
        with CogWriter(path, RasterLayout(height=700, width=700, num_bands=1, dtype="uint8")) as writer:
            writer.write(0, pixels)
    except OutputError:
        continue
    sys.exit(f"no error at {share} of the file's size")
"""


@pytest.mark.slow
def test_a_full_disk_is_an_error_even_if_it_fills_up_at_the_last_byte(tmp_path) -> None:
    path = tmp_path / "out.tif"
    pixels = np.random.default_rng(0).integers(0, 255, (1, 700, 700)).astype(np.uint8)
    _write(path, pixels, crs=None, transform=None)
    before = path.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", _FILL, path, str(len(before))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
