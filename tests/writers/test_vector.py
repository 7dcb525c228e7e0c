import errno
import json
import resource
import signal
import threading
import time
import uuid

import geopandas as gpd
import jsonschema
import numpy as np
import pyogrio
import pytest
import shapely
from affine import Affine
from rasterio.crs import CRS
from slides import levels_of, write_pyramid

from perf_vit.errors import DataWarning, OutputError
from perf_vit.geometry.boxes import oriented_box_corners
from perf_vit.sources import open_source
from perf_vit.writers import CogWriter, RasterLayout, polygonize_classes, write_objects
from perf_vit.writers import vector as vector_writers
from perf_vit.writers.gis import _fixed_date

CLASSES = ("ship", "Öltank", 'a "quay"')
BOXES = np.array([[10, 12, 30, 40], [50.25, 5, 60, 9.5], [0, 60, 8, 69]])
ORIENTED = np.array([[30, 30, 20, 8, 0.5], [60, 40, 12, 12, -np.pi / 2], [15, 55, 9, 3, 1.2]])
SCORES = np.array([0.9, 0.8, 0.7], np.float32)
LABELS = np.array([2, 0, 1])

HOLED = shapely.Polygon([(10, 10), (40, 10), (40, 40), (10, 40)], [[(15, 15), (15, 20), (20, 20), (20, 15)]])
PARTS = shapely.MultiPolygon([shapely.box(50, 50, 60, 60), shapely.box(60, 60, 70, 65)])
POLYGONS = np.array([HOLED, PARTS, shapely.box(1, 2, 3, 4)], object)
GEOMETRIES = {"boxes": BOXES, "oriented_boxes": ORIENTED, "polygons": POLYGONS}


@pytest.fixture
def scene(make_scene):
    return open_source(make_scene())


@pytest.fixture
def slide(make_scene):
    return open_source(make_scene(crs=None, transform=Affine.identity()))


def outlines(kind: str) -> np.ndarray:
    if kind == "boxes":
        return shapely.box(*BOXES.T)
    return shapely.polygons(oriented_box_corners(ORIENTED)) if kind == "oriented_boxes" else POLYGONS


def in_map(polygons: np.ndarray, transform: Affine) -> np.ndarray:
    return shapely.transform(polygons, lambda xy: np.array([transform @ tuple(point) for point in xy]))


@pytest.mark.parametrize("kind", GEOMETRIES)
@pytest.mark.parametrize("name", ["out.gpkg", "out.parquet"])
def test_tables_hold_map_coordinates_in_the_scenes_crs(scene, tmp_path, kind, name) -> None:
    path = write_objects(tmp_path / "new" / name, GEOMETRIES[kind], SCORES, LABELS, CLASSES, source=scene)
    frame = gpd.read_parquet(path) if name.endswith("parquet") else gpd.read_file(path)
    assert CRS.from_user_input(frame.crs.to_wkt()) == scene.crs
    assert frame["class"].tolist() == [CLASSES[label] for label in LABELS]
    assert frame["label"].tolist() == LABELS.tolist()
    assert frame["score"].tolist() == [0.9, 0.8, 0.7]
    expected = in_map(outlines(kind), scene.transform)
    assert all(shapely.equals_exact(shapely.normalize(frame.geometry.to_numpy()), _as_in(frame, expected), 1e-6))
    if kind == "oriented_boxes":
        numbers = frame[["cx_px", "cy_px", "width_px", "height_px", "angle_rad"]].to_numpy()
        assert np.allclose(numbers, ORIENTED, atol=0, rtol=1e-15)


def _as_in(frame, polygons):
    """Polygons as multipolygons where the file made them so."""
    multi = (frame.geom_type == "MultiPolygon").to_numpy()
    polygons = polygons.copy()
    polygons[multi] = [shapely.multipolygons(shapely.get_parts(polygon)) for polygon in polygons[multi]]
    return shapely.normalize(polygons)


@pytest.mark.parametrize("kind", GEOMETRIES)
def test_geojson_is_in_longitude_and_latitude_with_outer_rings_counterclockwise(scene, tmp_path, kind) -> None:
    path = write_objects(tmp_path / "out.geojson", GEOMETRIES[kind], SCORES, LABELS, CLASSES, source=scene)
    assert "crs" not in json.loads(path.read_text())
    frame = gpd.read_file(path)
    assert frame.crs.to_epsg() == 4326
    expected = gpd.GeoSeries(in_map(outlines(kind), scene.transform), crs=scene.crs.to_wkt()).to_crs(4326)
    # 7 decimals of a degree.
    assert shapely.hausdorff_distance(frame.geometry.to_numpy(), expected.to_numpy()).max() < 1.5e-7
    assert all(shapely.is_ccw(part.exterior) for part in shapely.get_parts(frame.geometry.to_numpy()))
    assert frame["class"].tolist() == [CLASSES[label] for label in LABELS]


@pytest.mark.parametrize("kind", GEOMETRIES)
def test_coco_is_read_by_pycocotools(scene, tmp_path, kind) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    path = write_objects(tmp_path / "out.json", GEOMETRIES[kind], SCORES, LABELS, CLASSES, source=scene)
    data = coco.COCO(str(path))
    assert data.imgs[1] == {"id": 1, "file_name": "scene_0.tif", "height": 70, "width": 90}
    assert {index: category["name"] for index, category in data.cats.items()} == dict(enumerate(CLASSES, 1))
    for annotation, polygon in zip(data.loadAnns([1, 2, 3]), outlines(kind), strict=True):
        left, top, right, bottom = polygon.bounds
        assert np.allclose(annotation["bbox"], [left, top, right - left, bottom - top], atol=2e-3)
        assert annotation["area"] == pytest.approx(polygon.area, abs=1e-3)
        # Rasterised, it covers what the outline covers, up to the pixels on its edge.
        assert abs(int(data.annToMask(annotation).sum()) - polygon.area) <= polygon.length
    assert [data.anns[i]["score"] for i in (1, 2, 3)] == [0.9, 0.8, 0.7]


def test_holes_stay_holes_in_coco(scene, tmp_path) -> None:
    mask = pytest.importorskip("pycocotools.mask")
    holes = [[(x, y), (x, y + 5), (x + 5, y + 5), (x + 5, y)] for x, y in ((5, 5), (20, 22), (30, 8))]
    polygon = shapely.Polygon([(0, 0), (50, 0), (50, 50), (0, 50)], holes)
    path = write_objects(tmp_path / "out.json", np.array([polygon], object), None, [0], CLASSES, source=scene)
    (annotation,) = json.loads(path.read_text())["annotations"]
    assert "score" not in annotation
    burnt = mask.decode(mask.merge(mask.frPyObjects(annotation["segmentation"], 70, 90)))
    expected = np.zeros((70, 90), np.uint8)
    expected[:50, :50] = 1
    for x, y in ((5, 5), (20, 22), (30, 8)):
        expected[y : y + 5, x : x + 5] = 0
    assert np.array_equal(burnt, expected)


# Names and places as QuPath writes them, since version 0.4: measurements are an object, colours [red, green, blue].
# Coordinates: https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html (pixels of the full
# resolution, from its top left corner). Object types: https://qupath.readthedocs.io/en/stable/docs/concepts/objects.html
QUPATH = {
    "type": "object",
    "required": ["type", "features"],
    "additionalProperties": False,
    "properties": {
        "type": {"const": "FeatureCollection"},
        # Members of our own, which RFC 7946 allows and readers pass over.
        "frame": {"const": "QuPath"},
        "frame_unit": {"const": "pixel of level 0"},
        "frame_origin_level0_px": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
        "features": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "id", "geometry", "properties"],
                "additionalProperties": False,
                "properties": {
                    "type": {"const": "Feature"},
                    "id": {"type": "string", "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"},
                    "geometry": {
                        "type": "object",
                        "required": ["type", "coordinates"],
                        "oneOf": [
                            {"properties": {"type": {"const": "Polygon"}, "coordinates": {"$ref": "#/$defs/rings"}}},
                            {
                                "properties": {
                                    "type": {"const": "MultiPolygon"},
                                    "coordinates": {"type": "array", "items": {"$ref": "#/$defs/rings"}},
                                }
                            },
                        ],
                    },
                    "properties": {
                        "type": "object",
                        "required": ["objectType", "classification"],
                        "additionalProperties": False,
                        "properties": {
                            "objectType": {"enum": ["annotation", "detection", "cell", "tile"]},
                            "classification": {
                                "type": "object",
                                "required": ["name", "color"],
                                "additionalProperties": False,
                                "properties": {
                                    "name": {"type": "string", "minLength": 1},
                                    "color": {
                                        "type": "array",
                                        "items": {"type": "integer", "minimum": 0, "maximum": 255},
                                        "minItems": 3,
                                        "maxItems": 3,
                                    },
                                },
                            },
                            "measurements": {"type": "object", "additionalProperties": {"type": "number"}},
                        },
                    },
                },
            },
        },
    },
    "$defs": {
        "rings": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "array",
                "minItems": 4,
                "items": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
            },
        }
    },
}


@pytest.mark.parametrize("kind", GEOMETRIES)
@pytest.mark.parametrize("object_type", ["detection", "annotation"])
def test_qupath_geojson_has_its_structure_and_level_0_pixels(tmp_path, kind, object_type) -> None:
    slide = open_source(write_pyramid(tmp_path / "slide.tif", levels_of(280, 360, 3)), level=2)
    assert slide.crs is None
    path = write_objects(
        tmp_path / "out.geojson",
        GEOMETRIES[kind],
        SCORES,
        LABELS,
        CLASSES,
        source=slide,
        object_type=object_type,
    )
    data = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.validate(data, QUPATH)
    features = data["features"]
    got = [shapely.geometry.shape(feature["geometry"]) for feature in features]
    expected = shapely.transform(outlines(kind), lambda xy: xy * 4)
    assert shapely.hausdorff_distance(got, expected).max() < 0.01
    found = [feature["properties"] for feature in features]
    assert {properties["objectType"] for properties in found} == {object_type}
    assert [properties["classification"]["name"] for properties in found] == [CLASSES[label] for label in LABELS]
    assert len({tuple(properties["classification"]["color"]) for properties in found}) == 3
    assert [properties["measurements"]["score"] for properties in found] == [0.9, 0.8, 0.7]
    assert len({uuid.UUID(feature["id"]) for feature in features}) == 3
    if kind == "oriented_boxes":
        assert found[0]["measurements"]["cx_px"] == 30
        assert found[0]["measurements"]["angle_rad"] == 0.5


@pytest.mark.parametrize("name", ["out.gpkg", "out.parquet", "out.geojson", "out.json", "qupath.json"])
def test_the_same_objects_give_the_same_bytes(scene, tmp_path, name) -> None:
    written = []
    for folder in ("a", "b"):
        # GeoPackages count in milliseconds: a time of writing would show.
        time.sleep(0.01)
        options = {"format": "qupath"} if name.startswith("qupath") else {}
        path = tmp_path / folder / name
        write_objects(path, POLYGONS, SCORES, LABELS, CLASSES, source=scene, **options)
        written.append(path.read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize("name", ["out.gpkg", "out.parquet", "out.geojson", "out.json", "qupath.json"])
def test_no_objects_make_a_file_without_objects(scene, tmp_path, name) -> None:
    options = {"format": "qupath"} if name.startswith("qupath") else {}
    path = write_objects(tmp_path / name, np.zeros((0, 4)), [], [], CLASSES, source=scene, **options)
    if name.endswith("json"):
        data = json.loads(path.read_text())
        assert data["annotations" if name == "out.json" else "features"] == []
    else:
        frame = gpd.read_parquet(path) if name.endswith("parquet") else gpd.read_file(path)
        assert len(frame) == 0
        assert CRS.from_user_input(frame.crs.to_wkt()) == scene.crs


def test_a_full_disk_leaves_nothing_and_keeps_what_was_there(scene, tmp_path, monkeypatch) -> None:
    def write(path, *args, **options):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(vector_writers, "write_coco", write)
    kept = tmp_path / "kept.json"
    kept.write_text("before")
    for path in (kept, tmp_path / "new" / "out.json"):
        with pytest.raises(OutputError, match=r"can't write .*\.json: No space left on device"):
            write_objects(path, BOXES, SCORES, LABELS, CLASSES, source=scene)
    assert kept.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.json", "scene_0.tif"]


@pytest.mark.parametrize("name", ["o.gpkg", "o.parquet"])
def test_a_table_of_a_source_without_crs_is_refused(slide, tmp_path, name) -> None:
    with pytest.raises(OutputError, match=r"has no CRS, .* write QuPath's \.geojson or COCO's \.json"):
        write_objects(tmp_path / name, BOXES, SCORES, LABELS, CLASSES, source=slide)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("o.shp", {}, r"can't tell the format of .*o\.shp: expected a name that ends in \.gpkg, \.parquet"),
        ("o.json", {"format": "csv"}, "format must be one of gpkg, geoparquet, geojson, coco, qupath, got csv"),
        ("o.json", {"scores": [1, 2]}, "expected a label and a score for each of 3 objects, got 3 labels and 2 scores"),
        ("o.json", {"scores": [1, 2, np.nan]}, "scores and coordinates must be finite; those of object 2 are not"),
        ("o.json", {"geometries": [[0, 0, 1, 1], [0, 0, np.inf, 1], [0, 0, 1, 1]]}, "those of object 1 are not"),
        ("o.json", {"geometries": [*POLYGONS[:2], shapely.Polygon()]}, "those of object 2 are not"),
        ("o.json", {"labels": [0, 1, 3]}, "labels run from 0 to 3, but there are 3 class names, for 0 to 2"),
        ("o.json", {"geometries": np.zeros((3, 6))}, r"expected polygons \[n\], boxes_xyxy \[n, 4\]"),
        ("o.json", {"geometries": shapely.points(BOXES[:, :2])}, r"expected polygons \[n\], boxes_xyxy \[n, 4\]"),
    ],
)
def test_what_cannot_be_written_says_why(scene, tmp_path, name, changes, message) -> None:
    given = {"geometries": BOXES, "scores": SCORES, "labels": LABELS, "class_names": CLASSES, **changes}
    with pytest.raises(OutputError, match=message):
        write_objects(tmp_path / name, source=scene, **given)


def test_a_class_map_becomes_areas_in_gpkg_and_for_a_slide_in_qupath(scene, slide, tmp_path) -> None:
    labels = np.zeros((1, 70, 90), np.uint8)
    labels[0, 10:40, 20:50], labels[0, 30:60, 60:80], labels[0, :, :4] = 1, 2, 255
    for source, name in ((scene, "areas.gpkg"), (slide, "areas.geojson")):
        layout = {"height": 70, "width": 90, "num_bands": 1, "dtype": "uint8", "nodata": 255}
        with CogWriter(
            tmp_path / "map.tif", RasterLayout(crs=source.crs, transform=source.transform, **layout)
        ) as writer:
            writer.write(0, labels)
        polygons, classes = polygonize_classes(tmp_path / "map.tif", skip=[0], block_px=16)
        path = write_objects(tmp_path / name, polygons, None, classes, CLASSES, source=source, object_type="annotation")
        if source is scene:
            frame = gpd.read_file(path)
            assert frame.geometry.area.tolist() == pytest.approx([900 * 2.5 * 3.25, 600 * 2.5 * 3.25])
            assert "score" not in frame
        else:
            data = json.loads(path.read_text(encoding="utf-8"))
            jsonschema.validate(data, QUPATH)
            got = [shapely.geometry.shape(feature["geometry"]).bounds for feature in data["features"]]
            assert got == [(20, 10, 50, 40), (60, 30, 80, 60)]


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".parquet", ".json"])
def test_a_disk_that_fills_up_leaves_no_part_of_a_file(suffix, make_scene, tmp_path) -> None:
    source = open_source(make_scene(height=40, width=60))
    boxes = np.tile([[2.0, 3, 9, 12]], (40, 1))
    path = tmp_path / "out" / f"o{suffix}"
    write_objects(path, boxes, None, np.zeros(40, int), ["a"], source=source)
    size = path.stat().st_size
    path.unlink()
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for limit in (0, 100, size // 4, size // 2, size - 5000, size - 3):
            if limit < 0:
                continue
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            with pytest.raises(OutputError, match="can't write"):
                write_objects(path, boxes, None, np.zeros(40, int), ["a"], source=source)
            assert list(path.parent.iterdir()) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_geopackages_of_two_threads_have_the_same_date(tmp_path) -> None:
    before = pyogrio.get_gdal_config_option("OGR_CURRENT_DATE")
    inside, leave, entered = threading.Event(), threading.Event(), threading.Event()
    dates = []

    def first() -> None:
        with _fixed_date():
            inside.set()
            assert leave.wait(20)

    def second() -> None:
        with _fixed_date():
            entered.set()
            dates.append(pyogrio.get_gdal_config_option("OGR_CURRENT_DATE"))

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(20)
    threads[1].start()
    assert not entered.wait(0.2)
    leave.set()
    for thread in threads:
        thread.join()
    assert dates == ["1970-01-01T00:00:00.000Z"]
    assert pyogrio.get_gdal_config_option("OGR_CURRENT_DATE") == before


def test_coco_of_a_raster_on_another_grid_tells_whose_pixels_it_holds(make_scene, tmp_path, recwarn) -> None:
    path = make_scene()
    given = {"scores": SCORES, "labels": LABELS, "class_names": CLASSES}
    write_objects(tmp_path / "own.json", BOXES, source=open_source(path), **given)
    assert not [one for one in recwarn if "COCO" in str(one.message)]
    with pytest.warns(DataWarning, match=r"its objects are in pixels of the grid that it was read on"):
        write_objects(tmp_path / "coarse.json", BOXES, source=open_source(path, resolution=5.0), **given)
