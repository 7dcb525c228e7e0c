"""Vector files as GIS programs write them: formats, layers, ids as text, coordinates without CRS, odd geometries."""

import json

import geopandas as gpd
import numpy as np
import pandas as pd
import pyogrio
import pytest
import rasterio
import shapely
from affine import Affine
from rasterio.crs import CRS
from shapely import LineString, MultiPolygon, Point, Polygon, affinity, box

from perf_vit.errors import DataWarning, InputError, OutputError
from perf_vit.labels import open_labels
from perf_vit.labels.objects import PolygonFile
from perf_vit.sources import open_source
from perf_vit.types import IGNORE_INDEX
from perf_vit.writers import check_outputs, write_objects

NAMES = ["l.gpkg", "l.geojson", "l.parquet", "l.shp", "l.fgb"]
BOXES = [box(10, 5, 40, 30), box(50, 20, 60, 60)]
LOCAL = CRS.from_wkt('LOCAL_CS["Local Coordinates (m)",UNIT["metre",1]]')


@pytest.fixture
def source(make_scene):
    return open_source(make_scene(nodata=None))


def write(source, path, polygons, **columns):
    """Write geometries given in pixels of a source."""
    t = source.transform
    placed = [affinity.affine_transform(p, (t.a, t.b, t.d, t.e, t.c, t.f)) for p in polygons]
    frame = gpd.GeoDataFrame(columns, geometry=placed, crs=source.crs.to_wkt())
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_file(path)
    return path


def burnt(polygons, shape=(70, 90), **options):
    return rasterio.features.rasterize(polygons, shape, dtype="uint8", **options)


@pytest.mark.parametrize("name", NAMES)
def test_every_vector_format_is_read_by_name_by_value_and_by_text_ids(source, tmp_path, name: str) -> None:
    columns = {"kind": ["water", "wood"], "code": [7, 9], "text": ["7", "9"]}
    path = write(source, tmp_path / name, BOXES, **columns)
    expected = burnt(list(zip(BOXES, [1, 2], strict=True)))
    classes = ["rest", "water", "wood"]
    for column in columns:
        labels = open_labels(path, source, attribute=column, classes=classes, values=[0, 7, 9])
        assert np.array_equal(labels.read(source.extent), expected), column
    objects = PolygonFile(path, attribute="kind")
    # FlatGeobuf sorts features by place.
    order = np.argsort(objects.values)
    assert objects.values[order].tolist() == ["water", "wood"]
    bounds = shapely.bounds(objects.in_pixels_of(source)[order])
    np.testing.assert_allclose(bounds, shapely.bounds(BOXES), atol=0.01)


@pytest.mark.parametrize("name", ["o.gpkg", "o.geojson", "o.parquet"])
def test_files_of_predicted_objects_are_labels(source, tmp_path, name: str) -> None:
    boxes = np.array([b.bounds for b in BOXES])
    write_objects(tmp_path / name, boxes, [0.9, 0.8], [0, 1], ["x", "y"], source=source)
    for attribute, options in (("class", {"classes": ["bg", "x", "y"]}), ("label", {"values": [9, 0, 1]})):
        labels = open_labels(tmp_path / name, source, attribute=attribute, **options).read(source.extent)
        assert np.array_equal(labels, burnt(list(zip(BOXES, [1, 2], strict=True))))


def test_a_coco_file_is_refused_as_what_it_is(source, tmp_path) -> None:
    write_objects(tmp_path / "o.json", np.array([[1.0, 1, 9, 9]]), None, [0], ["x"], source=source)
    with pytest.raises(InputError, match="COCO"):
        open_labels(tmp_path / "o.json", source)


def test_parquet_without_geometries_and_damaged_ones_are_one_line(source, tmp_path) -> None:
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t.parquet is a Parquet file without geometries; write it as GeoParquet"):
        open_labels(tmp_path / "t.parquet", source)
    (tmp_path / "d.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match=r"can't open .*d.parquet as GeoParquet"):
        open_labels(tmp_path / "d.parquet", source)
    with pytest.raises(InputError, match=r"attribute 'kind' is not a column of .*; columns: text"):
        open_labels(write(source, tmp_path / "l.parquet", BOXES[:1], text=["a"]), source, attribute="kind")


def test_a_layer_is_chosen_by_name(source, tmp_path) -> None:
    for layer, shapes in (("roads", [LineString([(0, 0), (9, 9)])]), ("roofs", BOXES)):
        write(source, tmp_path / f"{layer}.fgb", shapes)
        gpd.read_file(tmp_path / f"{layer}.fgb").to_file(tmp_path / "site.gpkg", layer=layer)
    named = f"{tmp_path / 'site.gpkg'}|layername=roofs"
    assert np.array_equal(open_labels(named, source).read(source.extent), burnt(BOXES))
    assert len(PolygonFile(named)) == 2
    with pytest.raises(OutputError, match="would replace"):
        check_outputs([tmp_path / "site.gpkg"], [named], overwrite=True)
    with pytest.raises(InputError, match=r"got roads, roofs; choose one as '.*site.gpkg\|layername=roads'"):
        open_labels(tmp_path / "site.gpkg", source)
    with pytest.raises(InputError, match=r"site.gpkg has no layer walls; its layers are roads, roofs"):
        PolygonFile(f"{tmp_path / 'site.gpkg'}|layername=walls")
    with pytest.raises(InputError, match="no such file"):
        open_labels(tmp_path / "none.gpkg|layername=roofs", source)


@pytest.mark.parametrize("name", NAMES)
def test_text_and_missing_values_can_be_ignored_as_the_message_says(source, tmp_path, name: str) -> None:
    path = write(source, tmp_path / name, [*BOXES, box(70, 0, 80, 9)], kind=["water", "unknown", None])
    options = {"attribute": "kind", "classes": ["rest", "water"]}
    with pytest.raises(InputError, match=r"holds unknown, null; .* \(ignore_values=\[unknown, null\]\)"):
        open_labels(path, source, **options)
    with pytest.raises(InputError, match=r"holds null; .* \(ignore_values=\[null\]\)"):
        open_labels(path, source, ignore_values=["unknown"], **options)
    labels = open_labels(path, source, ignore_values=["unknown", None], **options).read(source.extent)
    assert (labels[10, 20], labels[30, 55], labels[5, 75], labels[0, 0]) == (1, IGNORE_INDEX, IGNORE_INDEX, 0)


def test_a_class_name_that_spells_a_number_is_a_name(source, tmp_path) -> None:
    path = write(source, tmp_path / "l.gpkg", BOXES, kind=["0", "1"])
    labels = open_labels(path, source, attribute="kind", classes=["1", "0"], values=[5, 6]).read(source.extent)
    assert (labels[10, 20], labels[30, 55]) == (1, 0)


def test_geojson_in_metres_without_crs_says_what_its_coordinates_were_taken_for(source, tmp_path) -> None:
    content = json.loads(write(source, tmp_path / "l.geojson", BOXES).read_text())
    assert content.pop("crs")
    (tmp_path / "l.geojson").write_text(json.dumps(content))
    left = f"{gpd.read_file(tmp_path / 'l.geojson').total_bounds[0]:.8g}"
    for read in (lambda path: open_labels(path, source), lambda path: PolygonFile(path).in_pixels_of(source)):
        with pytest.raises(InputError, match=rf"cover x {left} to .* no longitudes .*EPSG:4326.*GeoJSON without a crs"):
            read(tmp_path / "l.geojson")


def test_labels_elsewhere_show_their_own_coordinates_and_crs(source, tmp_path) -> None:
    frame = gpd.GeoDataFrame(geometry=[box(7, 8, 9, 10)], crs="EPSG:4326")
    frame.to_file(tmp_path / "l.geojson")
    with pytest.raises(InputError, match=r"\(in the file x 7 to 9, y 8 to 10, EPSG:4326\)"):
        open_labels(tmp_path / "l.geojson", source)


def test_a_local_crs_takes_labels_in_it_and_refuses_others_in_one_line(make_scene, tmp_path) -> None:
    source = open_source(make_scene(crs=LOCAL, transform=Affine(0.05, 0, 100, 0, -0.05, 200), nodata=None))
    path = write(source, tmp_path / "l.gpkg", BOXES)
    assert np.array_equal(open_labels(path, source).read(source.extent), burnt(BOXES))
    gpd.GeoDataFrame(geometry=[box(7, 8, 9, 10)], crs="EPSG:4326").to_file(tmp_path / "w.geojson")
    for read in (lambda path: open_labels(path, source), lambda path: PolygonFile(path).in_pixels_of(source)):
        with pytest.raises(InputError, match=r"no transformation is known from the CRS of .*w.geojson"):
            read(tmp_path / "w.geojson")


@pytest.mark.parametrize("name", ["l.gpkg", "l.geojson", "l.parquet"])
def test_heights_and_parts_make_no_difference(source, tmp_path, name: str) -> None:
    high = shapely.force_3d(MultiPolygon([box(10, 5, 40, 30), box(80, 60, 90, 70)]), 7.0)
    path = write(source, tmp_path / name, [high, Polygon([(50, 20, 1), (60, 20, 2), (60, 60, 3), (50, 60, 4)])])
    labels = open_labels(path, source).read(source.extent)
    assert np.array_equal(labels, burnt([*BOXES, box(80, 60, 90, 70)]))
    assert not any(shapely.has_z(PolygonFile(path).in_pixels_of(source)))


def test_curves_are_read_as_polygons(source, tmp_path) -> None:
    x, y = source.transform @ (45, 35)
    radius = 20 * abs(source.transform.a)
    arc = f"CURVEPOLYGON (CIRCULARSTRING ({x - radius} {y}, {x} {y + radius}, {x + radius} {y}, {x} {y - radius}, {x - radius} {y}))"  # noqa: E501
    (tmp_path / "c.csv").write_text(f'WKT\n"{arc}"\n')
    labels = pyogrio.read_dataframe(tmp_path / "c.csv").set_crs(source.crs.to_wkt())
    labels.to_file(tmp_path / "c.gpkg")
    area = (open_labels(tmp_path / "c.gpkg", source).read(source.extent) == 1).sum() * abs(source.transform.e)
    assert area * abs(source.transform.a) == pytest.approx(np.pi * radius**2, rel=0.02)


def test_files_of_several_kinds_of_geometry_are_refused(source, tmp_path) -> None:
    path = write(source, tmp_path / "m.geojson", [*BOXES, Point(3, 3), LineString([(0, 0), (9, 9)])])
    for read in (lambda path: open_labels(path, source), PolygonFile):
        with pytest.raises(InputError, match=r"holds LineString, Point; .* must be polygons"):
            read(path)


@pytest.mark.parametrize("multilabel", [False, True])
def test_polygons_smaller_than_a_pixel_are_counted_or_touched(source, tmp_path, multilabel: bool) -> None:
    # Between centres, around one, a thin slanted one, and one of two parts of which one holds a centre.
    tiny = [box(3.6, 3.6, 4.4, 4.4), box(8.4, 8.4, 8.6, 8.6), Polygon([(20, 20.1), (30, 30.1), (30, 30.4), (20, 20.4)])]
    parts = MultiPolygon([box(50.6, 50.6, 50.9, 50.9), box(60, 60, 62, 62)])
    path = write(source, tmp_path / "l.gpkg", [*tiny, parts])
    options = {"classes": ["any"] if multilabel else ["rest", "any"], "multilabel": multilabel}
    with pytest.warns(DataWarning, match=r"2 of 4 polygons of .* contain no pixel centre .*; the first is number 1"):
        labels = open_labels(path, source, **options)
    assert (labels.read(source.extent) == 1).sum() == 1 + 4
    touched = open_labels(path, source, all_touched=True, **options).read(source.extent)
    assert np.array_equal(touched.reshape(70, 90), burnt([*tiny, parts], all_touched=True))
    assert (touched == 1).sum() == 30


def test_the_count_of_polygons_without_a_pixel_is_that_of_burning_them(source, tmp_path) -> None:
    rng = np.random.default_rng(3)
    centers, sizes = rng.uniform(5, 65, (400, 2)), 10 ** rng.uniform(-1, 0.8, (400, 2))
    shapes = [
        affinity.rotate(box(x - w / 2, y - h / 2, x + w / 2, y + h / 2), angle)
        for (x, y), (w, h), angle in zip(centers, sizes, rng.uniform(0, 180, 400), strict=True)
    ]
    vanished = sum(not burnt([shape]).any() for shape in shapes)
    assert 50 < vanished < 350
    path = write(source, tmp_path / "l.parquet", shapes)
    with pytest.warns(DataWarning, match=r"polygons of .* contain no pixel centre") as caught:
        open_labels(path, source)
    counted = int(str(caught[0].message).split()[0])
    # Coordinates are rounded to 1/256 pixel.
    assert abs(counted - vanished) <= 2
