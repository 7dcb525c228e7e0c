"""Labels of which several may be true at a pixel."""

import pickle

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapely import affinity, box

from perf_vit.errors import InputError
from perf_vit.labels import open_labels
from perf_vit.sources import open_raster
from perf_vit.types import IGNORE_INDEX, Window

CLASSES = ["wet", "built", "green", "dark"]
POLYGONS = [box(10, 5, 40, 30), box(20, 10, 60, 40), box(30, 0, 35, 60), box(70, 50, 80, 60)]
KINDS = ["wet", "built", "wet", "unknown"]


@pytest.fixture
def source(make_scene):
    return open_raster(make_scene(nodata=None))


@pytest.fixture
def polygons(source, tmp_path):
    t = source.transform
    placed = [affinity.affine_transform(p, (t.a, t.b, t.d, t.e, t.c, t.f)) for p in POLYGONS]
    path = tmp_path / "labels.gpkg"
    gpd.GeoDataFrame({"kind": KINDS}, geometry=placed, crs=source.crs).to_file(path)
    return path


def naive(background: int) -> np.ndarray:
    layers = np.full((4, 70, 90), background, np.uint8)
    if background:
        for polygon in POLYGONS:
            layers[:, rasterio.features.rasterize([polygon], (70, 90)) > 0] = 0
    for polygon, kind in zip(POLYGONS[:3], KINDS, strict=False):
        layers[CLASSES.index(kind), rasterio.features.rasterize([polygon], (70, 90)) > 0] = 1
    layers[:, rasterio.features.rasterize([POLYGONS[3]], (70, 90)) > 0] = IGNORE_INDEX
    return layers


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(-20, 80), st.integers(-20, 95), st.integers(1, 60), st.integers(1, 60), st.booleans())
def test_overlapping_polygons_are_all_true_in_any_window(source, polygons, row, col, height, width, only_samples):
    labels = open_labels(
        polygons,
        source,
        classes=CLASSES,
        attribute="kind",
        ignore_values=["unknown"],
        background="ignore" if only_samples else "none",
        multilabel=True,
    )
    padded = np.full((4, 270, 290), IGNORE_INDEX, np.uint8)
    padded[:, 100:170, 100:190] = naive(IGNORE_INDEX if only_samples else 0)
    expected = padded[:, 100 + row : 100 + row + height, 100 + col : 100 + col + width]
    np.testing.assert_array_equal(labels.read(Window(row, col, height, width)), expected)


def test_polygons_of_one_class_need_no_attribute(source, polygons):
    labels = open_labels(polygons, source, classes=["any"], multilabel=True).read(source.extent)
    np.testing.assert_array_equal(labels[0], rasterio.features.rasterize(POLYGONS, (70, 90), dtype="uint8"))
    with pytest.raises(InputError, match="polygons without attribute have one class, got 4 classes"):
        open_labels(polygons, source, classes=CLASSES, multilabel=True)


@pytest.mark.filterwarnings("error::perf_vit.errors.DataWarning")
@pytest.mark.parametrize("num_classes", [1, 3, 4, 5])
@pytest.mark.parametrize("nodata", [None, 9, IGNORE_INDEX])
def test_each_band_of_a_raster_is_a_class(source, make_scene, num_classes: int, nodata):
    # Four bands of bytes are, to GDAL, three colours and transparency.
    bands = np.random.default_rng(0).integers(0, 2, (num_classes, 70, 90)).astype(np.uint8)
    expected = bands.copy()
    if nodata is not None:
        bands[0, 3:9, 5:50] = nodata
        expected[0, 3:9, 5:50] = IGNORE_INDEX
    labels = open_labels(
        make_scene(pixels=bands, nodata=nodata), source, classes=[*"abcde"][:num_classes], multilabel=True
    )
    labels = pickle.loads(pickle.dumps(labels))
    np.testing.assert_array_equal(labels.read(source.extent), expected)
    outside = labels.read(Window(-2, 88, 4, 4))
    assert (outside[:, :2] == IGNORE_INDEX).all()
    np.testing.assert_array_equal(outside[:, 2:, :2], expected[:, :2, 88:])


def test_bands_that_are_no_layers_are_one_line(source, make_scene):
    two = np.zeros((2, 70, 90), np.uint8)
    with pytest.raises(InputError, match=r"expected one band per class in .*, 3, got 2"):
        open_labels(make_scene(pixels=two, nodata=None), source, classes=["a", "b", "c"], multilabel=True)
    with pytest.raises(InputError, match="must lie on the pixel grid"):
        open_labels(make_scene(pixels=two[:, 1:], nodata=None), source, classes=["a", "b"], multilabel=True)
    two[1, 40, 40] = 7
    with pytest.raises(InputError, match="value 7, which is neither a class"):
        open_labels(make_scene(pixels=two, nodata=None), source, classes=["a", "b"], multilabel=True)
