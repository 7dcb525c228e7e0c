"""Vector files of any name, written and read again."""

import os

import geopandas
import numpy as np
import pytest
import shapely
from nasty_names import NASTY_NAMES, UNSEEN_NAMES

from perf_vit.labels import open_labels
from perf_vit.labels.objects import PolygonFile
from perf_vit.sources import open_source
from perf_vit.writers import write_objects

LONG = ["n" * 241, "漢" * 80]
STEMS = [
    *(name for name in NASTY_NAMES if "/" not in name),
    *UNSEEN_NAMES,
    "a;b",
    "a!b",
    "a?",
    "x.zip!y",
    "caf\udce9",
    *LONG,
]
CLASSES = (*NASTY_NAMES, *UNSEEN_NAMES)


# The fast suite writes one format into folders of these names.
@pytest.mark.parametrize(
    ("suffix", "where"),
    [
        *((suffix, "file") for suffix in (".gpkg", ".geojson", ".parquet", ".json")),
        (".gpkg", "folder"),
        *(pytest.param(suffix, "folder", marks=pytest.mark.slow) for suffix in (".geojson", ".parquet", ".json")),
    ],
)
@pytest.mark.parametrize("stem", STEMS)
def test_objects_are_written_under_any_name_and_read_with_their_classes(
    stem, suffix, where, make_scene, tmp_path
) -> None:
    source = open_source(make_scene(height=40, width=60))
    path = tmp_path / f"{stem}{suffix}" if where == "file" else tmp_path / stem / f"x{suffix}"
    boxes = np.array([[2.0 + i, 3, 9 + i, 12] for i in range(len(CLASSES))])
    write_objects(path, boxes, None, np.arange(len(CLASSES)), CLASSES, source=source)
    assert os.listdir(path.parent).count(path.name) == 1
    if suffix == ".json":
        return
    read = PolygonFile(path, attribute="class")
    assert list(read.values) == list(CLASSES)
    assert np.allclose(shapely.bounds(read.in_pixels_of(source)), boxes, atol=0.01)
    # No other file and no link is left.
    assert {name for name in os.listdir(path.parent) if name != path.name} <= {"scene_0.tif"}


@pytest.mark.parametrize("stem", ["a;b", "a!b", "caf\udce9"])
@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".shp"])
def test_labels_of_any_name_are_read_with_the_files_beside_them(stem, suffix, make_scene, tmp_path) -> None:
    source = open_source(make_scene(height=40, width=60))
    frame = geopandas.GeoDataFrame({"kind": ["漢"]}, geometry=[shapely.box(2, 3, 9, 12)])
    frame["geometry"] = frame.geometry.affine_transform(source.transform.to_shapely())
    frame.set_crs(source.crs.to_wkt()).to_file(tmp_path / f"plain{suffix}")
    for made in tmp_path.glob("plain.*"):
        made.rename(tmp_path / f"{stem}{made.suffix}")
    labels = open_labels(tmp_path / f"{stem}{suffix}", source, classes=("ground", "漢"), attribute="kind")
    assert (labels.read(source.extent) == 1).sum() == 7 * 9


@pytest.mark.parametrize("stem", ["-dash", "[bold]", "..", "漢", "a b"])
def test_a_layer_has_a_name_that_geopackages_can_hold(stem, make_scene, tmp_path) -> None:
    source = open_source(make_scene(height=40, width=60))
    path = write_objects(tmp_path / f"{stem}.gpkg", np.array([[0.0, 0, 5, 5]]), None, [0], ["a"], source=source)
    assert len(geopandas.read_file(path)) == 1
