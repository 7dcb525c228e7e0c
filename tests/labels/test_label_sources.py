import pickle

import geopandas as gpd
import numpy as np
import pyproj
import pytest
import rasterio
import shapely
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rasterio.enums import Resampling
from rasterio.warp import reproject
from shapely import LineString, Polygon, affinity, box
from slides import levels_of, write_pyramid

from perf_vit.errors import DataWarning, InputError
from perf_vit.labels import open_labels, warn_of_polygons_outside
from perf_vit.sources import open_source
from perf_vit.types import IGNORE_INDEX, Window

CLASSES = ["background", "building"]


@pytest.fixture
def source(make_scene):
    return open_source(make_scene(nodata=None))


@pytest.fixture
def write_vector(source, tmp_path):
    """Write polygons given in pixel coordinates, in another CRS."""

    def _write(polygons, name="labels.geojson", crs="EPSG:4326", set_crs=True, **columns):
        t = source.transform
        placed = [affinity.affine_transform(p, (t.a, t.b, t.d, t.e, t.c, t.f)) if p else p for p in polygons]
        frame = gpd.GeoDataFrame({"id": range(len(placed)), **columns}, geometry=placed, crs=source.crs)
        frame = frame.to_crs(crs) if set_crs else frame.set_crs(None, allow_override=True)
        frame.to_file(tmp_path / name)
        return tmp_path / name

    return _write


def _mask(make_scene, values, **profile):
    return make_scene(pixels=np.asarray(values, np.uint8)[None], nodata=profile.pop("nodata", None), **profile)


POLYGONS = [box(10, 5, 40, 30), Polygon([(50, 20), (80, 25), (60, 60)]), box(-5, 60, 12, 90)]


@pytest.mark.parametrize("name", ["labels.geojson", "labels.gpkg", "labels.shp"])
@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857", "EPSG:32637"])
def test_polygons_in_any_crs_and_format_burn_the_pixels_whose_centre_they_hold(
    source, write_vector, name: str, crs: str
) -> None:
    labels = open_labels(write_vector(POLYGONS, name, crs), source, classes=CLASSES).read(source.extent)
    expected = rasterio.features.rasterize(POLYGONS, source.size, dtype="uint8")
    assert (labels != expected).mean() < 0.002
    assert set(np.unique(labels)) == {0, 1}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.integers(-30, 80), col=st.integers(-30, 100), size=st.integers(1, 50), all_touched=st.booleans())
def test_a_window_burns_exactly_what_the_whole_does(
    source, write_vector, row: int, col: int, size: int, all_touched: bool
) -> None:
    labels = open_labels(write_vector(POLYGONS, "labels.gpkg"), source, classes=CLASSES, all_touched=all_touched)
    padded = np.pad(labels.read(source.extent), 100, constant_values=IGNORE_INDEX)
    rows, cols = slice(row + 100, row + 100 + size), slice(col + 100, col + 100 + size)
    assert np.array_equal(labels.read(Window(row, col, size, size)), padded[rows, cols])


def test_attribute_gives_the_class_by_name_or_value_and_later_polygons_win(source, write_vector) -> None:
    polygons = [box(0, 0, 40, 40), box(20, 20, 60, 60)]
    path = write_vector(polygons, kind=["water", "forest"], code=[7, 9])
    classes = ["rest", "forest", "water"]
    by_name = open_labels(path, source, classes=classes, attribute="kind").read(source.extent)
    by_value = open_labels(path, source, classes=classes, attribute="code", values=[1, 9, 7]).read(source.extent)
    assert np.array_equal(by_name, by_value)
    assert (by_name[10, 10], by_name[30, 30], by_name[65, 80]) == (2, 1, 0)


def test_pixels_under_no_polygon_are_what_background_says(source, write_vector) -> None:
    path = write_vector([box(0, 0, 10, 10), box(20, 20, 30, 30)], kind=["tumor", "stroma"])
    options = {"classes": ["tumor", "stroma"], "attribute": "kind"}
    for background, outside in (("ignore", IGNORE_INDEX), ("tumor", 0), ("stroma", 1), (1, 1)):
        labels = open_labels(path, source, background=background, **options).read(source.extent)
        assert (labels[5, 5], labels[25, 25], labels[60, 60]) == (0, 1, outside)
    _assert_refused(
        "holds polygons: background must be set .* one of tumor, stroma, ignore, got nothing",
        path, source, background=None, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("background", "inside"), [("background", 1), ("building", 0)])
def test_polygons_without_attribute_are_the_class_that_is_not_background(
    source, write_vector, background: str, inside: int
) -> None:
    path = write_vector([box(0, 0, 10, 10)])
    labels = open_labels(path, source, classes=CLASSES, background=background).read(source.extent)
    assert (labels[5, 5], labels[60, 60]) == (inside, 1 - inside)
    _assert_refused("got no background; set attribute", path, source, background="ignore")


def test_masks_need_no_background(source, make_scene) -> None:
    values = np.random.default_rng(0).integers(0, 2, (70, 90))
    labels = open_labels(_mask(make_scene, values), source, classes=CLASSES, background=None)
    assert np.array_equal(labels.read(source.extent), values)


def test_a_mask_of_jpeg_is_an_error(source, tmp_path) -> None:
    Image.fromarray(np.zeros(source.size, np.uint8)).save(tmp_path / "mask.JPG")
    with pytest.raises(
        InputError, match=r"mask\.JPG is a JPEG, which changes the values of a mask; write masks as PNG"
    ):
        open_labels(tmp_path / "mask.JPG", source, classes=CLASSES)


def test_labels_travel_to_workers(source, write_vector, make_scene) -> None:
    vector = open_labels(write_vector(POLYGONS), source, classes=CLASSES)
    mask = open_labels(_mask(make_scene, np.eye(80), transform=source.transform), source, classes=CLASSES)
    for labels in (vector, mask):
        copy = pickle.loads(pickle.dumps(labels))
        assert np.array_equal(copy.read(source.extent), labels.read(source.extent))


def test_mask_on_the_same_grid_is_read_as_it_is(source, make_scene) -> None:
    values = np.random.default_rng(0).integers(0, 2, (70, 90))
    labels = open_labels(_mask(make_scene, values), source, classes=CLASSES)
    assert np.array_equal(labels.read(source.extent), values)
    assert np.array_equal(labels.read(Window(60, 80, 20, 20))[:10, :10], values[60:, 80:])
    assert (labels.read(Window(60, 80, 20, 20))[10:] == IGNORE_INDEX).all()


def test_mask_values_nodata_and_ignored_values(source, make_scene) -> None:
    values = np.random.default_rng(0).choice([0, 3, 5, 99], (70, 90))
    path = _mask(make_scene, values, nodata=0)
    labels = open_labels(path, source, classes=["a", "b"], values=[5, 3], ignore_values=[99]).read(source.extent)
    expected = np.select([values == 5, values == 3], [0, 1], IGNORE_INDEX)
    assert np.array_equal(labels, expected)


def test_mask_nodata_that_is_a_class_is_refused_until_the_user_decides(source, make_scene) -> None:
    values = np.zeros((70, 90))
    values[:30] = 1
    path = _mask(make_scene, values, nodata=0)
    _assert_refused("declares 0 as nodata, and 0 is the value of class 0.*unset-nodata", path, source)
    labels = open_labels(path, source, classes=CLASSES, ignore_values=[0]).read(source.extent)
    assert set(np.unique(labels)) == {1, IGNORE_INDEX}


def test_mask_in_another_crs_is_warped_to_the_grid(source, make_scene) -> None:
    values = np.zeros((200, 200), np.uint8)
    values[40:120, 60:150] = 1
    transform = Affine(4e-5, 0, source_longitude(source), 0, -4e-5, source_latitude(source))
    path = _mask(make_scene, values, crs="EPSG:4326", transform=transform)
    labels = open_labels(path, source, classes=CLASSES).read(source.extent)
    expected = np.full(source.size, IGNORE_INDEX, np.uint8)
    reproject(
        values,
        expected,
        src_transform=transform,
        src_crs="EPSG:4326",
        dst_transform=source.transform,
        dst_crs=source.crs,
        dst_nodata=IGNORE_INDEX,
        resampling=Resampling.nearest,
    )
    assert (labels != expected).mean() < 0.01
    assert {0, 1} <= set(np.unique(labels))


def source_longitude(source) -> float:
    return rasterio.warp.transform(source.crs, "EPSG:4326", [source.bounds[0]], [source.bounds[3]])[0][0] - 1e-4


def source_latitude(source) -> float:
    return rasterio.warp.transform(source.crs, "EPSG:4326", [source.bounds[0]], [source.bounds[3]])[1][0] + 1e-4


def test_a_value_that_is_no_class_is_an_error(source, make_scene) -> None:
    values = np.zeros((70, 90))
    values[-1, -1] = 255
    _assert_refused(
        r"has value 255, which is neither a class \(values 0, 1\) nor nodata", _mask(make_scene, values), source
    )


def _assert_refused(match: str, path, source, **options) -> None:
    with pytest.raises(InputError, match=match) as error:
        open_labels(path, source, **{"classes": CLASSES, **options})
    assert "\n" not in str(error.value)


def test_missing_labels(source, tmp_path) -> None:
    _assert_refused("no such file", tmp_path / "none.geojson", source)
    _assert_refused("no such file", tmp_path / "none.tif", source)


def test_a_file_that_is_no_vector_file(source, tmp_path) -> None:
    (tmp_path / "bad.geojson").write_text("{")
    _assert_refused("can't open .* as a vector file", tmp_path / "bad.geojson", source)


def test_an_image_without_crs(source, write_vector, make_scene) -> None:
    plain = open_source(make_scene(crs=None, transform=Affine.identity(), nodata=None))
    _assert_refused("has no CRS", write_vector(POLYGONS), plain)


def test_labels_without_crs(source, write_vector) -> None:
    _assert_refused("labels.shp have no CRS", write_vector(POLYGONS, "labels.shp", set_crs=False), source)


def test_labels_elsewhere(source, write_vector, make_scene) -> None:
    far = affinity.translate(box(0, 0, 10, 10), 5000, 5000)
    _assert_refused("don't overlap", write_vector([far]), source)
    mask = _mask(make_scene, np.eye(50), transform=Affine(3, 0, 900_000, 0, -3, 4_000_000))
    _assert_refused("don't overlap", mask, source)


def test_attributes_and_classes_that_do_not_fit(source, write_vector) -> None:
    path = write_vector(POLYGONS, kind=["building", "house", None])
    _assert_refused("'king' is not a column of .*; columns: id, kind", path, source, attribute="king")
    _assert_refused(
        "holds house, null; the classes are background, building, values 0, 1", path, source, attribute="kind"
    )
    _assert_refused("one of two classes that is not background, got 3 classes", path, source, classes=["a", "b", "c"])


def test_lines_are_refused_and_empty_geometries_dropped(source, write_vector) -> None:
    _assert_refused(
        "holds LineString; labels must be polygons", write_vector([LineString([(0, 0), (9, 9)])], "l.gpkg"), source
    )
    path = write_vector([box(1, 1, 9, 9), None], "some.gpkg")
    with pytest.warns(DataWarning, match=r"1 of 2 features of .*some.gpkg have no usable geometry .* is number 2"):
        labels = open_labels(path, source, classes=CLASSES)
    assert labels.read(source.extent).sum() == 64


def test_a_file_without_polygons_is_background_alone_and_says_so(source, write_vector) -> None:
    path = write_vector([], "none.gpkg")
    with pytest.warns(DataWarning, match=r"none.gpkg holds no polygons: all of .* is background"):
        labels = open_labels(path, source, classes=CLASSES, attribute="kind")
    assert (labels.read(source.extent) == 0).all()
    _assert_refused(
        "no polygons; without a background class", path, source, background="ignore", attribute="id", values=[0, 1]
    )


def test_polygons_without_area_are_counted(source, write_vector) -> None:
    path = write_vector([box(1, 1, 9, 9), Polygon([(0, 0), (5, 5), (5, 5)])])
    with pytest.warns(DataWarning, match="1 of 2 polygons of .* have no area and label nothing; the first is number 2"):
        open_labels(path, source, classes=CLASSES)


def test_a_warped_mask_reads_the_same_through_any_window(source, make_scene) -> None:
    values = np.random.default_rng(1).integers(0, 2, (100, 100))
    place = Affine(3e-5, 0, source_longitude(source), 0, -3e-5, source_latitude(source))
    labels = open_labels(_mask(make_scene, values, crs="EPSG:4326", transform=place), source, classes=CLASSES)
    whole = labels.read(source.extent)
    for row, col, size in ((0, 0, 5), (13, 40, 31), (60, 80, 9)):
        expected = whole[row : row + size, col : col + size]
        assert np.array_equal(labels.read(Window(row, col, size, size))[: len(expected)], expected)


def test_a_mask_that_covers_a_part_leaves_the_rest_ignored(source, make_scene) -> None:
    values = np.random.default_rng(2).integers(0, 2, (30, 40))
    place = source.transform @ Affine.translation(20, 10)
    labels = open_labels(_mask(make_scene, values, transform=place), source, classes=CLASSES).read(source.extent)
    assert np.array_equal(labels[10:40, 20:60], values)
    assert (labels != IGNORE_INDEX).sum() == values.size


def test_masks_without_georeference_fit_a_plain_image_of_their_size(make_scene) -> None:
    nowhere = {"crs": None, "transform": Affine.identity(), "nodata": None}
    plain = open_source(make_scene(**nowhere))
    values = np.random.default_rng(3).integers(0, 2, (70, 90))
    assert np.array_equal(open_labels(_mask(make_scene, values, **nowhere), plain).read(plain.extent), values)
    _assert_refused(
        "must have the raster's size, 70 rows x 90 columns", _mask(make_scene, values[1:], **nowhere), plain
    )


def test_a_mask_without_crs_does_not_fit_a_placed_raster(source, make_scene) -> None:
    mask = _mask(make_scene, np.eye(70, 90), crs=None, transform=Affine.identity())
    _assert_refused("labels .* have no CRS", mask, source)


def test_a_picture_is_no_mask(source, make_scene) -> None:
    _assert_refused("one band of label values in .*, got 3 bands", make_scene(), source)


def test_nan_in_a_float_mask_is_no_label(source, make_scene) -> None:
    values = np.zeros((1, 70, 90), np.float32)
    values[0, 3] = np.nan
    labels = open_labels(make_scene(pixels=values, nodata=None), source, classes=CLASSES).read(source.extent)
    assert (labels[3] == IGNORE_INDEX).all()
    assert (np.delete(labels, 3, axis=0) == 0).all()


def test_ignored_attribute_values_are_burnt_as_no_label(source, write_vector) -> None:
    path = write_vector([box(0, 0, 10, 10), box(20, 20, 30, 30)], "labels.gpkg", code=[1, 9])
    labels = open_labels(path, source, classes=CLASSES, attribute="code", ignore_values=[9]).read(source.extent)
    assert (labels[5, 5], labels[25, 25], labels[50, 50]) == (1, IGNORE_INDEX, 0)


def test_a_vector_file_of_any_suffix_is_recognised(source, write_vector) -> None:
    path = write_vector([box(0, 0, 10, 10)])
    assert open_labels(path.rename(path.with_suffix(".txt")), source).read(source.extent).sum() == 100


def test_a_file_of_two_layers_is_refused(source, tmp_path) -> None:
    frame = gpd.GeoDataFrame(geometry=[box(*source.bounds)], crs=source.crs.to_wkt())
    for layer in ("roofs", "roads"):
        frame.to_file(tmp_path / "two.gpkg", layer=layer)
    _assert_refused("expected one layer of polygons in .*, got roofs, roads", tmp_path / "two.gpkg", source)


def test_polygons_beyond_the_projection_are_left_out(source, write_vector, tmp_path) -> None:
    near = gpd.read_file(write_vector([box(0, 0, 10, 10)])).geometry.tolist()
    frame = gpd.GeoDataFrame(geometry=[box(-179, -89, -170, 89), *near], crs="EPSG:4326")
    frame.to_file(tmp_path / "world.gpkg")
    labels = open_labels(tmp_path / "world.gpkg", source)
    assert labels.read(source.extent).sum() == 100
    with pytest.warns(
        DataWarning, match=r"1 of 2 polygons of .*world.gpkg lie outside of the images; the first is number 1"
    ):
        warn_of_polygons_outside([labels])


def test_polygons_on_none_of_the_rasters_are_counted_once(source, write_vector, make_scene) -> None:
    shapes = [box(0, 0, 10, 10), box(500, 5, 510, 15), box(-60, 5, -50, 15)]
    other = open_source(make_scene(transform=source.transform @ Affine.translation(490, 0)))
    path = write_vector(shapes)
    one, second = open_labels(path, source, classes=CLASSES), open_labels(path, other, classes=CLASSES)
    with pytest.warns(DataWarning, match="2 of 3 polygons of .* lie outside of the images; the first is number 2"):
        warn_of_polygons_outside([one])
    with pytest.warns(DataWarning, match="1 of 3 polygons of .* lie outside of the images; the first is number 3"):
        warn_of_polygons_outside([one, second, object()])
    # Nothing of a file may lie on a raster in the midst of what it labels: that is all background.
    middle = open_labels(write_vector(shapes[1:], "around.gpkg"), source, classes=CLASSES)
    assert (middle.read(source.extent) == 0).all()


def test_outlines_that_cross_themselves_are_labelled_and_counted(source, write_vector) -> None:
    turns = np.deg2rad(90 + 144 * np.arange(5))
    pentagram = Polygon(np.column_stack([35 + 30 * np.cos(turns), 35 - 30 * np.sin(turns)]))
    with pytest.warns(DataWarning, match="1 of 2 polygons of .* intersect themselves; .*; the first is number 2"):
        labels = open_labels(write_vector([box(80, 1, 85, 6), pentagram]), source, classes=CLASSES).read(source.extent)
    assert labels[35, 35] == 1
    assert (labels[:, :75] == 1).sum() == pytest.approx(
        shapely.make_valid(pentagram, method="structure").area, rel=0.02
    )


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("background must be a class, one of background, building, ignore, got 2", {"background": 2}),
        ("one value for each of 2 classes, got 3", {"values": [0, 1, 2]}),
        ("different numbers", {"values": [1, 1]}),
    ],
)
def test_arguments_that_contradict_each_other(source, write_vector, match: str, options: dict) -> None:
    _assert_refused(match, write_vector(POLYGONS), source, **options)


def test_a_mask_of_a_pyramid_lies_on_its_level_0(make_scene, tmp_path) -> None:
    path = write_pyramid(tmp_path / "pyramid.tif", levels_of(200, 160, 2), mpp_xy=(0.5, 0.5))
    values = np.random.default_rng(0).integers(0, 2, (200, 160))
    mask = _mask(make_scene, values, crs=None, transform=None)
    slide = open_source(path)
    assert np.array_equal(open_labels(mask, slide, classes=CLASSES).read(slide.extent), values)
    with pytest.raises(InputError, match=r"must be polygons, .* as it isn't read at its level 0"):
        open_labels(mask, open_source(path, mpp=1.0), classes=CLASSES)


@pytest.mark.parametrize(
    ("crs", "bounds", "shape"),
    [
        # A whole disc, seen from a satellite; the polygon goes on behind the horizon, and to the other side.
        (
            "+proj=geos +lon_0=0 +h=35785831 +sweep=y +datum=WGS84",
            (-5.5e6, -5.5e6, 5.5e6, 5.5e6),
            box(20, -30, 150, 70),
        ),
        (
            "+proj=geos +lon_0=0 +h=35785831 +sweep=y +datum=WGS84",
            (-5.5e6, -5.5e6, 5.5e6, 5.5e6),
            box(-170, 0, 170, 90),
        ),
        # One corner is 90 degrees from the central meridian, on the equator, where nothing has coordinates.
        ("EPSG:32633", (0, 4e6, 1e6, 5e6), box(15, 0, 105, 60)),
    ],
)
def test_a_polygon_that_leaves_the_domain_of_the_crs_labels_its_part_inside(
    make_scene, tmp_path, crs, bounds, shape
) -> None:
    size = 80
    transform = rasterio.transform.from_bounds(*bounds, size, size)
    source = open_source(make_scene(height=size, width=size, crs=crs, transform=transform, nodata=None))
    path = tmp_path / "labels.gpkg"
    gpd.GeoSeries([shapely.segmentize(shape, 1)], crs="EPSG:4326").to_file(path)
    labels = open_labels(path, source, classes=CLASSES).read(source.extent)
    centres = np.arange(size) + 0.5
    x, y = transform @ tuple(np.meshgrid(centres, centres))
    to_degrees = pyproj.Transformer.from_crs(source.crs.to_wkt(), "EPSG:4326", always_xy=True)
    lonlat = np.stack(to_degrees.transform(x, y), axis=-1)
    expected = np.isfinite(lonlat).all(-1) & shapely.contains_xy(shape, *np.moveaxis(lonlat, -1, 0))
    assert expected.sum() > 1000
    # Outlines are straight between their corners.
    assert (labels != expected).sum() <= 6


def test_a_mask_across_180_degrees_is_read(make_scene) -> None:
    source = open_source(make_scene(crs="EPSG:4326", transform=Affine(0.01, 0, -179.9, 0, -0.01, 1), nodata=None))
    place = Affine(1000, 0, 3_320_000, 0, -1000, 120_000)
    # Longitudes from 179.8 to -178.9.
    mask = _mask(make_scene, np.ones((140, 150)), crs="EPSG:3832", transform=place)
    labels = open_labels(mask, source, classes=CLASSES).read(source.extent)
    assert (labels[:, :80] == 1).all()


def test_a_mask_on_a_local_grid_does_not_fit_a_raster_on_the_earth(source, make_scene) -> None:
    local = rasterio.crs.CRS.from_wkt('LOCAL_CS["site",UNIT["metre",1]]')
    _assert_refused("no transformation is known from the CRS of", _mask(make_scene, np.eye(70, 90), crs=local), source)


@pytest.mark.parametrize("margin", [-7, 0, 9])
def test_tiles_of_a_mask_need_not_end_where_the_raster_does(source, make_scene, tmp_path, margin) -> None:
    values = np.random.default_rng(5).integers(0, 2, (70 + 2 * margin, 90 + 2 * margin))
    begin = source.transform @ Affine.translation(-margin, -margin)
    (tmp_path / "tiles").mkdir()
    for name, left, right in (("a", 0, 40), ("b", 40, values.shape[1])):
        tile = _mask(make_scene, values[:, left:right], transform=begin @ Affine.translation(left, 0))
        tile.rename(tmp_path / "tiles" / f"{name}.tif")
    labels = open_labels(tmp_path / "tiles", source, classes=CLASSES).read(source.extent)
    expected = np.pad(values, max(0, -margin), constant_values=IGNORE_INDEX)
    cut = max(0, margin)
    assert np.array_equal(labels, expected[cut : cut + 70, cut : cut + 90])


def test_polygons_behind_the_horizon_label_nothing(make_scene, tmp_path) -> None:
    disc = rasterio.transform.from_bounds(-5.5e6, -5.5e6, 5.5e6, 5.5e6, 80, 80)
    crs = "+proj=geos +lon_0=0 +h=35785831 +sweep=y +datum=WGS84"
    source = open_source(make_scene(height=80, width=80, crs=crs, transform=disc, nodata=None))
    behind, seen = box(170, -5, 175, 5), box(0, 0, 20, 20)
    gpd.GeoSeries([behind, seen], crs="EPSG:4326").to_file(tmp_path / "both.gpkg")
    gpd.GeoSeries([behind], crs="EPSG:4326").to_file(tmp_path / "behind.gpkg")
    labels = open_labels(tmp_path / "both.gpkg", source, classes=CLASSES)
    assert labels.is_on_source.tolist() == [False, True]
    assert labels.read(source.extent).sum() > 50
    _assert_refused("don't overlap", tmp_path / "behind.gpkg", source)
