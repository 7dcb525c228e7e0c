"""Areas of objects and classes on the ground, and polygons that are tidied by them."""

import json
import re

import geopandas as gpd
import numpy as np
import pyproj
import pytest
import shapely
from affine import Affine
from rasterio.crs import CRS
from synthetic_slide import make_slide

from perf_vit.errors import OutputError
from perf_vit.geometry import Objects
from perf_vit.reporting.outputs import write_map_report, write_object_report
from perf_vit.sources import open_source
from perf_vit.sources.pixel_size import pixel_areas, polygon_areas
from perf_vit.writers import tidy_polygons, write_objects

LOCAL = CRS.from_wkt('LOCAL_CS["Local Coordinates (m)",UNIT["metre",1]]')
BOXES = shapely.box([10, 30], [10, 20], [20, 31], [30, 21])


def geodesic_areas(polygons: np.ndarray, source) -> list[float]:
    to_degrees = pyproj.Transformer.from_crs(source.crs.to_wkt(), "EPSG:4326", always_xy=True)
    found = []
    for polygon in shapely.segmentize(polygons, 0.5):
        x, y = source.transform @ tuple(shapely.get_coordinates(polygon).T)
        found.append(abs(pyproj.Geod(ellps="WGS84").polygon_area_perimeter(*to_degrees.transform(x, y))[0]))
    return found


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ("EPSG:32637", Affine(2.5, 0, 401_000, 0, -3.25, 4_510_000)),
        ("EPSG:32637", Affine(2.0, 0.7, 401_000, 0.7, -2.0, 4_510_000)),
        ("EPSG:3857", Affine(2, 0, 1_500_000, 0, -2, 9_000_000)),
        ("EPSG:4326", Affine(1e-5, 0, 13.5, 0, -1e-5, 62.1)),
        ("EPSG:2263", Affine(3, 0, 980_000, 0, -3, 200_000)),
    ],
)
def test_areas_are_those_on_the_ellipsoid(make_scene, tmp_path, crs: str, transform: Affine) -> None:
    source = open_source(make_scene(crs=crs, transform=transform))
    areas, unit = pixel_areas(source, shapely.get_coordinates(shapely.centroid(BOXES)))
    expected = geodesic_areas(BOXES, source)
    assert unit == "m2"
    assert shapely.area(BOXES) * areas == pytest.approx(expected, rel=2e-5)
    path = write_objects(tmp_path / "o.gpkg", BOXES, None, [0, 0], ["a"], source=source)
    assert gpd.read_file(path)["area_m2"].tolist() == pytest.approx(expected, rel=2e-5)


# Of half a degree, 21 km at the equator, and 25 km.
WIDE = {
    "degrees": ("EPSG:4326", Affine(0.5, 0, -60, 0, -0.5, 75), (300, 400)),
    "mercator": ("EPSG:3857", Affine(21_000, 0, -6_000_000, 0, -21_000, 15_000_000), (1400, 600)),
    "polar": ("EPSG:3413", Affine(25_000, 0, -3_850_000, 0, -25_000, 5_850_000), (448, 304)),
    "date line": ("EPSG:3832", Affine(21_000, 0, 1_000_000, 0, -21_000, 9_000_000), (600, 300)),
}
LARGE = [
    shapely.box(20, 10, 280, 250),
    shapely.box(100, 20, 120, 280),
    shapely.box(150, 100, 151, 101),
    shapely.Point(150, 140).buffer(90).difference(shapely.box(140, 100, 300, 130)),
    shapely.MultiPolygon([shapely.box(10, 10, 60, 40), shapely.box(200, 200, 290, 260)]),
]


def pieces_on_ellipsoid(polygon, source) -> float:
    """Area of a polygon by its parts, each with its holes."""
    parts = list(getattr(polygon, "geoms", [polygon]))
    return sum(geodesic_areas(np.array(parts, object), source))


@pytest.mark.parametrize("kind", WIDE)
def test_areas_of_objects_that_span_many_degrees_are_those_on_the_ellipsoid(make_scene, kind: str) -> None:
    crs, transform, (height, width) = WIDE[kind]
    source = open_source(make_scene(crs=crs, transform=transform, height=height, width=width, num_bands=1))
    polygons = np.array(LARGE, object)
    areas, unit = polygon_areas(source, polygons)
    assert unit == "m2"
    assert areas == pytest.approx([pieces_on_ellipsoid(each, source) for each in polygons], rel=5e-4)
    kept = tidy_polygons(polygons, source, min_area=areas[1])[1]
    assert kept.tolist() == (areas >= areas[1]).tolist()


def test_areas_of_classes_and_objects_in_a_report_are_those_on_the_ellipsoid(make_scene, tmp_path) -> None:
    labels = np.zeros((1, 1800, 100), np.uint8)
    labels[:, 200:500, 20:90] = 1
    transform = Affine(0.1, 0, 10, 0, -0.1, 90)
    path = make_scene(pixels=labels, crs="EPSG:4326", transform=transform, nodata=None)
    source = open_source(path)
    square = shapely.box(20, 200, 90, 500)
    (expected,) = geodesic_areas(np.array([square], object), source)
    write_map_report(tmp_path / "map.html", source, path, ["sea", "land"], settings={})
    objects = Objects("boxes", np.array([square.bounds]), np.array([0.9], np.float32), np.array([0], np.int32))
    write_object_report(tmp_path / "objects.html", source, objects, ["land"], settings={})
    for page, column in (("map", 1), ("objects", 3)):
        (row,) = re.findall(r"land</th>(.*?)</tr>", (tmp_path / f"{page}.html").read_text())
        cells = re.findall(r"<td[^>]*>([^<]*)</td>", row)
        assert float(cells[column].replace(",", "")) == pytest.approx(expected, rel=0.005)


def test_areas_of_local_grids_slides_and_photos_have_their_own_units(make_scene, tmp_path) -> None:
    place = np.array([[5.0, 5.0]])
    local = open_source(make_scene(crs=LOCAL, transform=Affine(0.5, 0, 100, 0, -0.5, 200)))
    assert pixel_areas(local, place) == (np.array([0.25]), "m2")
    photo = open_source(make_scene(crs=None, transform=Affine.identity()))
    assert pixel_areas(photo, place) == (np.array([1.0]), "px")
    make_slide(tmp_path / "slide.svs", 256, 240, mpp=0.5, tile_px=64)
    slide = open_source(tmp_path / "slide.svs", mpp=1.0)
    assert pixel_areas(slide, place)[0] == pytest.approx([1.0], rel=0.01)
    assert pixel_areas(slide, place)[1] == "um2"


def test_polygons_are_tidied_in_metres(make_scene) -> None:
    source = open_source(make_scene(transform=Affine(2, 0, 401_000, 0, -2, 4_510_000)))
    stairs = shapely.Polygon([(0, 0), (10, 0), (10, 1), (9, 1), (9, 2), (8, 2), (8, 12), (0, 12)])
    polygons = np.array([*BOXES, stairs], object)
    # 800 m2, 4 m2, 400 m2.
    tidy, kept = tidy_polygons(polygons, source, min_area=300)
    assert kept.tolist() == [True, False, True]
    assert shapely.equals(tidy, polygons).all()
    tidy, kept = tidy_polygons(polygons, source, simplify=0.2)
    assert shapely.get_num_coordinates(tidy[2]) == shapely.get_num_coordinates(stairs)
    tidy, kept = tidy_polygons(polygons, source, simplify=4.0)
    assert kept.all()
    assert shapely.get_num_coordinates(tidy[2]) < shapely.get_num_coordinates(stairs)
    assert shapely.hausdorff_distance(tidy[2], stairs) <= 2.01
    assert tidy_polygons(polygons[:0], source, min_area=3)[1].tolist() == []


MOON = (
    'GEOGCS["Moon 2000",DATUM["D_Moon_2000",SPHEROID["Moon_2000_IAU_IAG",1737400.0,0.0]],'
    'PRIMEM["Reference_Meridian",0.0],UNIT["Degree",0.0174532925199433]]'
)


def test_areas_on_the_moon_are_those_of_its_sphere(make_scene, tmp_path) -> None:
    source = open_source(make_scene(crs=CRS.from_wkt(MOON), transform=Affine(1e-3, 0, 10, 0, -1e-3, 60)))
    (area,), unit = pixel_areas(source, np.array([[0.0, 0.0]]))
    assert unit == "m2"
    assert area == pytest.approx((1_737_400 * np.radians(1e-3)) ** 2 * np.cos(np.radians(60)), rel=1e-6)


def test_a_crs_without_a_transform_places_nothing(make_scene, tmp_path) -> None:
    source = open_source(make_scene(transform=Affine.identity()))
    assert source.crs is not None
    assert pixel_areas(source, np.array([[5.0, 5.0]])) == (np.array([1.0]), "px")
    given = {"scores": None, "labels": [0, 0], "class_names": ["a"], "source": source}
    with pytest.raises(OutputError, match=r"a CRS but no transform, so its objects can't be placed in gpkg"):
        write_objects(tmp_path / "o.gpkg", BOXES, **given)
    features = json.loads(write_objects(tmp_path / "o.geojson", BOXES, **given).read_text())["features"]
    assert features[0]["properties"]["objectType"] == "detection"
    assert shapely.geometry.shape(features[1]["geometry"]).bounds == (30, 20, 31, 21)


def test_outlines_move_no_further_than_asked_where_pixels_are_not_square(make_scene) -> None:
    source = open_source(make_scene(transform=Affine(1, 0, 401_000, 0, -9, 4_510_000)))
    # Steps of 3 m in rows, which a tolerance of 2 m must keep.
    rows = np.where(np.arange(60) // 2 % 2, 10.3333, 10.0)
    comb = shapely.Polygon([(0, 30), *zip(np.arange(60) * 1.0, rows, strict=True), (60, 30)])
    (tidy,), _ = tidy_polygons(np.array([comb], object), source, simplify=2.0)
    in_metres = shapely.transform([comb, tidy], lambda xy: xy * (1.0, 9.0))
    assert shapely.hausdorff_distance(*in_metres) <= 2.01
