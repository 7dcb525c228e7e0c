"""Pixels of a size in metres are as large on the ground whatever the unit of a raster's CRS."""

import re

import numpy as np
import pytest
from affine import Affine
from rasterio.crs import CRS

from perf_vit.errors import DataWarning, InputError
from perf_vit.sources import PixelSize, common_unit, open_source, pixel_size, unit_of

METRE = ("metre", 1.0)
FEET = {"EPSG:2263": 1200 / 3937, "EPSG:2222": 0.3048}


def _scene(make_scene, crs: str, side: float, corner=(300_000.0, 200_000.0)):
    transform = Affine(side, 0, corner[0], 0, -side, corner[1])
    return make_scene(height=60, width=90, num_bands=1, crs=crs, transform=transform)


@pytest.mark.parametrize("crs", FEET)
def test_metres_become_feet(make_scene, crs) -> None:
    path = _scene(make_scene, crs, 2.5 / FEET[crs])
    source = open_source(path, resolution=PixelSize(5, METRE))
    assert source.transform.a == pytest.approx(5 / FEET[crs], rel=1e-9)
    assert source.size == (30, 45)


def test_feet_become_metres(make_scene) -> None:
    foot = unit_of(open_source(_scene(make_scene, "EPSG:2263", 1)).crs)
    assert foot == ("US survey foot", pytest.approx(1200 / 3937, rel=1e-12))
    source = open_source(_scene(make_scene, "EPSG:32637", 2.5), resolution=PixelSize(10, foot))
    assert source.transform.a == pytest.approx(12_000 / 3937, rel=1e-9)


def test_the_same_unit_changes_nothing(make_scene) -> None:
    path = _scene(make_scene, "EPSG:32637", 2.5)
    named, plain = open_source(path, resolution=PixelSize(5, METRE)), open_source(path, resolution=5)
    assert named.transform == plain.transform
    assert np.array_equal(named.read(named.extent).pixels, plain.read(plain.extent).pixels)


@pytest.mark.parametrize(("corner", "zone"), [((37.5, 55.0), 32637), ((-70.0, -33.0), 32719), ((179.9, -8.0), 32760)])
def test_degrees_against_metres_are_refused_with_the_zone_to_give(make_scene, corner, zone) -> None:
    path = _scene(make_scene, "EPSG:4326", 0.0001, corner)
    with pytest.raises(InputError, match=f"10 metre, but .* is in degree \\(EPSG:4326\\); .*`crs=EPSG:{zone}`, or"):
        open_source(path, resolution=PixelSize(10, METRE))
    placed = open_source(path, resolution=PixelSize(10, METRE), crs=f"EPSG:{zone}")
    assert placed.transform.a == 10
    assert min(placed.size) > 20


def test_metres_against_degrees_are_refused(make_scene) -> None:
    path = _scene(make_scene, "EPSG:32637", 2.5)
    with pytest.raises(InputError, match=r"0\.001 degree, but .* is in metre .*`crs=EPSG:4326`, or"):
        open_source(path, resolution=PixelSize(0.001, ("degree", None)))


@pytest.mark.parametrize(("crs", "side", "asked"), [("EPSG:4326", 0.0001, 10), ("EPSG:32637", 10, 0.0001),
                                                   ("EPSG:32637", 2.5, 400)])  # fmt: skip
def test_a_size_that_must_be_of_another_unit_is_refused(make_scene, crs, side, asked) -> None:
    path = _scene(make_scene, crs, side, (37.5, 55.0))
    unit = "degree" if crs == "EPSG:4326" else "metre"
    with pytest.raises(InputError, match=f"resolution {asked:g} x {asked:g} makes .* units of the CRS, here {unit}"):
        open_source(path, resolution=asked)


def test_rasters_of_two_units_have_no_common_one(make_scene) -> None:
    metres = open_source(_scene(make_scene, "EPSG:32637", 2.5))
    degrees = open_source(_scene(make_scene, "EPSG:4326", 0.0001, (37.5, 55.0)))
    assert common_unit([("a", metres.crs), ("b", metres.crs)]) == METRE
    with pytest.raises(InputError, match="which is metre in a and degree in b"):
        common_unit([("a", metres.crs), ("b", degrees.crs)])


def test_a_unit_is_common_whatever_its_name_and_last_digits(make_scene) -> None:
    feet = [
        CRS.from_user_input(text) for text in ("EPSG:2263", "+proj=lcc +lat_1=33 +lat_2=45 +lon_0=-96 +units=us-ft")
    ]
    assert unit_of(feet[0]) != unit_of(feet[1])
    assert common_unit([("a", feet[0]), ("b", feet[1])]) == unit_of(feet[0])
    with pytest.raises(InputError, match="which is US survey foot in a and foot in b"):
        common_unit([("a", feet[0]), ("b", CRS.from_epsg(2222))])


@pytest.mark.parametrize(("unit", "metres"), [('"metre",1', 1.0), ('"US survey foot",0.304800609601219', 1200 / 3937)])
def test_local_grids_have_a_unit(make_scene, unit, metres) -> None:
    path = _scene(make_scene, f'LOCAL_CS["grid",UNIT[{unit}]]', 2.5 / metres)
    source = open_source(path, resolution=PixelSize(5, METRE))
    assert source.size == (30, 45)
    assert common_unit([("a", source.crs)])[1] == pytest.approx(metres, rel=1e-12)
    with pytest.raises(InputError, match="whose pixels are"):
        open_source(path, resolution=1e5)


@pytest.mark.parametrize(
    ("crs", "corner", "told"),
    [("EPSG:3857", (1_000_000, 8_400_000), r"5 metre in EPSG:3857 are 2\.[45]\d* metre on the ground .*EPSG:32632"),
     ("EPSG:3857", (1_000_000, 0), None), ("EPSG:32637", (300_000, 200_000), None)],
)  # fmt: skip
def test_lengths_that_are_other_ones_on_the_ground_are_told(make_scene, recwarn, crs, corner, told) -> None:
    open_source(_scene(make_scene, crs, 2.5, corner), resolution=PixelSize(5, METRE))
    found = [str(one.message) for one in recwarn if "on the ground" in str(one.message)]
    assert len(found) == (told is not None)
    assert told is None or re.search(told, found[0])


@pytest.mark.parametrize(("crs", "side", "corner"), [("+proj=longlat +R=1737400", 1e-3, (10, 60)),
                                                    ("+proj=merc +R=1737400", 60, (300_000, 2_280_000))])  # fmt: skip
def test_no_zone_of_the_earth_is_advised_on_the_moon(make_scene, crs, side, corner) -> None:
    path = _scene(make_scene, crs, side, corner)
    if side < 1:
        with pytest.raises(InputError, match=r"100 metre, but .* is in degree .*`crs=EPSG:CODE`"):
            open_source(path, resolution=PixelSize(100, METRE))
        return
    with pytest.warns(DataWarning, match=r"pixels of 100 metre .* on the ground .*`crs=EPSG:CODE`"):
        open_source(path, resolution=PixelSize(100, METRE))


def test_all_zones_of_the_earth_are_set_up_once() -> None:
    zones = [CRS.from_epsg(base + zone) for base in (32600, 32700) for zone in range(1, 61)]
    for _ in range(2):
        before = pixel_size._to_degrees.cache_info().misses
        for crs in zones:
            pixel_size.warn_of_ground_size(crs, 10.0, "a.tif", (500_000.0, 4_000_000.0))
    assert pixel_size._to_degrees.cache_info().misses == before
