"""Areas of objects on the ground, and polygons that are tidied by them."""

import geopandas as gpd
import numpy as np
import pyproj
import pytest
import shapely
from affine import Affine
from rasterio.crs import CRS
from synthetic_slide import make_slide

from perf_vit.sources import open_source
from perf_vit.sources.pixel_size import pixel_areas
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
