"""Names and colours of classes that QGIS and GDAL show."""

import json
import os
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import rasterio

from perf_vit.plotting import default_colormap
from perf_vit.plotting.colors import _luminance, on_light_color
from perf_vit.sources import open_source
from perf_vit.writers import (
    CogWriter,
    RasterLayout,
    category_names_path,
    write_category_names,
    write_objects,
    write_qgis_style,
)

CLASSES = ["rest", "Öl & <tank>", 'a "quay"']
COLORS = default_colormap(3, 0)
# Prints renderer, labels and colours of a raster and of vector layers.
SCRIPT = """
import json, sys
from qgis.core import QgsApplication, QgsRasterLayer, QgsVectorLayer
app = QgsApplication([], False)
app.initQgis()
raster = QgsRasterLayer(sys.argv[1], "map")
found = [["raster", raster.isValid(), [[c.label, c.color.name()] for c in raster.renderer().classes()]]]
for path in sys.argv[2:]:
    layer = QgsVectorLayer(path, "areas", "ogr")
    shown = [[c.label(), c.symbol().color().name()] for c in layer.renderer().categories()]
    found.append(["vector", layer.isValid(), shown])
print(json.dumps(found))
app.exitQgis()
"""


@pytest.fixture
def outputs(make_scene, tmp_path) -> dict[str, Path]:
    """A class map with polygons and the files next to it."""
    source = open_source(make_scene(height=40, width=40))
    layout = {"height": 40, "width": 40, "num_bands": 1, "dtype": "uint8", "nodata": 255, "colormap": COLORS}
    labels = np.arange(1600).reshape(1, 40, 40) % 3
    path = tmp_path / "map.tif"
    with CogWriter(path, RasterLayout(crs=source.crs, transform=source.transform, **layout)) as writer:
        writer.write(0, labels.astype(np.uint8))
    write_qgis_style(path.with_suffix(".qml"), CLASSES, COLORS)
    write_category_names(category_names_path(path), CLASSES)
    boxes = np.array([[1.0, 1, 5, 5], [8, 8, 20, 20]])
    vectors = [path.with_suffix(suffix) for suffix in (".gpkg", ".geojson")]
    for vector in vectors:
        write_objects(vector, boxes, None, [1, 2], CLASSES, source=source)
    return {"map": path, "gpkg": vectors[0], "geojson": vectors[1]}


def hexes() -> list[str]:
    return ["#{:02x}{:02x}{:02x}".format(*COLORS[index][:3]) for index in range(3)]


def test_a_style_has_a_name_and_a_colour_for_each_class(outputs) -> None:
    root = ET.parse(outputs["map"].with_suffix(".qml")).getroot()
    entries = root.findall("pipe/rasterrenderer/colorPalette/paletteEntry")
    assert [each.get("label") for each in entries] == CLASSES
    assert [each.get("color") for each in entries] == hexes()
    categories = root.findall("renderer-v2/categories/category")
    assert [each.get("value") for each in categories] == CLASSES
    with rasterio.open(outputs["map"]) as dataset:
        assert category_names_path(outputs["map"]).name in {Path(file).name for file in dataset.files}
        assert dataset.colormap(1)[1] == COLORS[1]
    names = ET.parse(category_names_path(outputs["map"])).getroot().findall("PAMRasterBand/CategoryNames/Category")
    assert [each.text for each in names] == CLASSES


@pytest.mark.slow
def test_qgis_shows_names_and_colours_of_maps_and_polygons(outputs) -> None:
    python = shutil.which("python3", path="/usr/bin")
    if shutil.which("qgis_process") is None or python is None:
        pytest.skip("QGIS isn't installed")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", SCRIPT, *map(str, outputs.values())],
        env={**clean, "QT_QPA_PLATFORM": "offscreen"},
        capture_output=True,
        text=True,
        check=False,
    )
    # Some versions of QGIS crash when they end.
    line = next((line for line in done.stdout.splitlines() if line.startswith("[")), done.stderr)
    shown = [list(pair) for pair in zip(CLASSES, hexes(), strict=True)]
    assert json.loads(line) == [["raster", True, shown], ["vector", True, shown], ["vector", True, shown]]


def test_lines_on_a_white_slide_can_be_seen() -> None:
    for color in default_colormap(40).values():
        seen = on_light_color(color)
        assert _luminance([channel / 255 for channel in seen]) <= 0.31
    yellow, blue = default_colormap(7)[3], default_colormap(7)[4]
    assert on_light_color(yellow) != list(yellow[:3])
    assert on_light_color(blue) == list(blue[:3])
