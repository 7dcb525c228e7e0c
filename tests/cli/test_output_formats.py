"""Whether objects and areas have a place in their format is known before the work begins."""

import re

import pytest
from affine import Affine
from command_line import call, save_detector
from rasterio.crs import CRS

from perf_vit.inference import detection
from perf_vit.models import DetectionSpec
from perf_vit.transforms import Normalizer

LOCAL = CRS.from_wkt('LOCAL_CS["Local Coordinates (m)",UNIT["metre",1]]')
PLACES = {
    "local": {"crs": LOCAL, "transform": Affine(0.05, 0, 100, 0, -0.05, 200)},
    "beyond": {"crs": "EPSG:3035", "transform": Affine(10, 0, 9e18, 0, -10, 9e18)},
    "none": {"crs": None, "transform": Affine.identity()},
}
SPEC = DetectionSpec(
    classes=("a",), normalizer=Normalizer((100.0,) * 3, (50.0,) * 3), tile_px=64, label_options={"label_format": "coco"}
)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return save_detector(tmp_path_factory.mktemp("detector") / "d.ckpt", SPEC, head="fcos")


@pytest.fixture
def no_work(monkeypatch):
    def refuse(*_: object, **__: object):
        raise AssertionError("the scene was searched")

    monkeypatch.setattr(detection, "predict_objects", refuse)


@pytest.mark.parametrize(
    ("place", "name", "message"),
    [
        ("local", "o.geojson", "longitudes and latitudes, and those of .* are not known from its CRS .Local Coord"),
        ("beyond", "o.geojson", "are not known from its CRS .EPSG:3035"),
        ("none", "o.gpkg", "has no CRS, so its objects can't be placed in gpkg"),
        ("none", "o.parquet", "has no CRS, so its objects can't be placed in geoparquet"),
        ("local", "o.shp", "can't tell the format of .*o.shp"),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_objects_that_cannot_be_written_are_not_looked_for(
    detector, make_scene, tmp_path, capsys, no_work, place: str, name: str, message: str, several: bool
) -> None:
    scene = make_scene(dtype="uint8", **PLACES[place])
    args = ["--checkpoint", detector, "--input", scene]
    if several:
        if name.endswith("shp"):
            pytest.skip("a folder's format is one of a list")
        args += ["--input", make_scene(dtype="uint8", **PLACES[place]), "--output", tmp_path / "out"]
        args += ["--polygons", name.partition(".")[2]]
    else:
        args += ["--output", tmp_path / name]
    assert call(["predict", *args]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("**/o.*"))


@pytest.mark.parametrize(("place", "suffix"), [("local", "geojson"), ("beyond", "geojson"), ("none", "gpkg")])
@pytest.mark.parametrize("several", [False, True])
def test_areas_that_cannot_be_written_keep_their_map_from_being_made(
    trained, make_scene, tmp_path, capsys, place: str, suffix: str, several: bool
) -> None:
    scenes = [make_scene(num_bands=4, **PLACES[place]) for _ in range(1 + several)]
    args = [part for scene in scenes for part in ("--input", scene)]
    args += ["--output", tmp_path / "out" if several else tmp_path / "map.tif", "--polygons", suffix]
    assert call(["predict", "--checkpoint", trained.checkpoint, *args]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "are not known from its CRS" in error or "has no CRS" in error
    assert not list(tmp_path.glob("**/*map*")) + list((tmp_path / "out").glob("*.tif"))


@pytest.mark.parametrize("name", ["o.gpkg", "o.parquet", "o.json"])
def test_objects_in_a_local_crs_are_written_in_it(detector, make_scene, tmp_path, name: str) -> None:
    scene = make_scene(dtype="uint8", **PLACES["local"])
    args = ["--checkpoint", detector, "--input", scene, "--output", tmp_path / name, "--score-threshold", "0"]
    assert call(["predict", *args]) == 0
    assert (tmp_path / name).stat().st_size > 100
