import json
from pathlib import Path

import numpy as np
import pytest
from rasterio.features import rasterize
from shapely import Polygon
from slides import write_pyramid

from perf_vit.errors import InputError
from perf_vit.sources import open_source
from perf_vit.sources.slides.brightfield import find_tissue, otsu_threshold
from perf_vit.types import Window

STAR = [(900.3, 200.0), (1500.0, 700.7), (1200.5, 1400.0), (300.0, 1100.2), (900.3, 200.0)]


def tissue_picture(height: int, width: int) -> np.ndarray:
    """A pink disk on glass with a white hole, a speck of dust and a black pen mark; [H, W, 3]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    picture = np.full((height, width, 3), (241, 240, 243), float)
    radius = np.hypot(y - height / 2, x - width / 2)
    picture[radius < height / 4] = (220, 150, 190)
    picture[radius < height / 64] = (241, 240, 243)
    picture[:4, :4] = (220, 150, 190)
    picture[height * 7 // 8 :, : width // 4] = (8, 2, 2)
    return np.clip(picture + rng.normal(0, 2, picture.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Path:
    picture = tissue_picture(1600, 1600)
    levels = [picture, picture[::4, ::4].copy(), picture[::16, ::16].copy()]
    return write_pyramid(tmp_path_factory.mktemp("tissue") / "slide.svs", levels, aperio_mpp=0.5)


@pytest.fixture
def outlines(tmp_path: Path):
    def _write(content: object) -> Path:
        path = tmp_path / "outlines.geojson"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return _write


def polygon(ring: list) -> dict:
    return {"type": "Polygon", "coordinates": [ring]}


def feature(geometry: dict | None) -> dict:
    return {"type": "Feature", "id": "x", "properties": {"objectType": "annotation"}, "geometry": geometry}


def test_otsu_parts_two_heaps_at_the_largest_variance_between_them() -> None:
    rng = np.random.default_rng(1)
    counts = np.bincount(
        np.clip(np.r_[rng.normal(40, 9, 5000), rng.normal(150, 20, 900)], 0, 255).astype(int), None, 256
    )

    def between(last: int) -> float:
        low, high = counts[: last + 1], counts[last + 1 :]
        if low.sum() == 0 or high.sum() == 0:
            return 0.0
        means = np.average(np.arange(last + 1), weights=low), np.average(np.arange(last + 1, 256), weights=high)
        return float(low.sum()) * float(high.sum()) * (means[1] - means[0]) ** 2

    assert otsu_threshold(counts) == max(range(256), key=between)


def test_tissue_is_found_without_glass_dust_pen_and_holes() -> None:
    picture = tissue_picture(400, 400)
    mask = find_tissue(picture.transpose(2, 0, 1), np.ones((400, 400), bool))
    y, x = np.mgrid[:400, :400]
    radius = np.hypot(y - 200, x - 200)
    assert mask[radius < 98].all()
    assert not mask[radius > 102].any()


def test_clean_glass_and_empty_slides_hold_no_tissue() -> None:
    glass = np.random.default_rng(0).normal(241, 2, (3, 90, 80)).astype(np.uint8)
    assert not find_tissue(glass, np.ones((90, 80), bool)).any()
    pink = np.broadcast_to(np.array([220, 150, 190], np.uint8)[:, None, None], (3, 90, 80))
    assert not find_tissue(pink, np.zeros((90, 80), bool)).any()


def test_tissue_limits_valid_and_leaves_pixels(slide: Path) -> None:
    plain, limited = open_source(slide, mpp=2.0), open_source(slide, mpp=2.0, tissue="otsu")
    before, after = plain.read(plain.extent), limited.read(limited.extent)
    assert np.array_equal(before.pixels, after.pixels)
    y, x = np.mgrid[:400, :400] + 0.5
    radius = np.hypot(y - 200, x - 200)
    # Within one pixel of the mask, 8 micrometres.
    assert after.valid[radius < 94].all()
    assert not after.valid[radius > 106].any()
    assert limited.read_reduced(100).valid.mean() == pytest.approx(after.valid.mean(), abs=0.01)


def test_a_mask_is_the_same_in_every_window(slide: Path, outlines) -> None:
    path = outlines({"type": "FeatureCollection", "features": [feature(polygon(STAR)), feature(None)]})
    for tissue in ("otsu", path):
        source = open_source(slide, mpp=1.7, tissue=tissue)
        whole = source.read(source.extent).valid
        assert 0.05 < whole.mean() < 0.6
        for row, col in [(0, 0), (123, 77), (300, 211)]:
            window = Window(row, col, 101, 97)
            assert np.array_equal(source.read(window).valid, whole[row : row + 101, col : col + 97])


@pytest.mark.parametrize(
    "content",
    [
        {"type": "FeatureCollection", "features": [feature(polygon(STAR))]},
        [feature(polygon(STAR))],
        feature({"type": "MultiPolygon", "coordinates": [[STAR]]}),
        polygon(STAR),
    ],
)
def test_outlines_are_in_pixels_of_level_0(slide: Path, outlines, content: object) -> None:
    source = open_source(slide, level=0, tissue=outlines(content))
    expected = rasterize([Polygon(STAR)], out_shape=(1600, 1600)) > 0
    assert np.mean(source.read(source.extent).valid != expected) < 1e-5
    reduced = open_source(slide, level=1, tissue=outlines(content))
    assert np.mean(reduced.read(reduced.extent).valid != expected[2::4, 2::4]) < 0.002


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "as a vector file"),
        ("[not json", "is not GeoJSON"),
        ({"kind": "FeatureCollection"}, "as a vector file"),
        ([{"kind": "FeatureCollection"}], "is not GeoJSON: expected features"),
        ({"type": "FeatureCollection", "features": []}, "holds no polygons"),
        ({"type": "Point", "coordinates": [1, 2]}, "holds no polygons"),
    ],
)
def test_bad_outlines_are_one_clear_line(slide: Path, outlines, content: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_source(slide, tissue=outlines(content))


def test_missing_outlines_are_one_clear_line(slide: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.geojson: no such file"):
        open_source(slide, tissue=tmp_path / "none.geojson")
