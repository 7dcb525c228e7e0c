import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rio_cogeo.cogeo import cog_validate

from perf_vit.errors import OutputError
from perf_vit.io import CogWriter

UTM = CRS.from_epsg(32637)
PLACE = Affine(2.5, 0, 401_000.125, 0, -3.25, 4_510_000.5)


def _writer(path, pixels, **options):
    count, height, width = pixels.shape
    layout = {"height": height, "width": width, "num_bands": count, "dtype": pixels.dtype}
    return CogWriter(path, **{**layout, "crs": UTM, "transform": PLACE, **options})


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
