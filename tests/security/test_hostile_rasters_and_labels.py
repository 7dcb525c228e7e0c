"""Rasters and labels from elsewhere: no code, no growth out of a few lines, no other file's text."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import perf_vit
from perf_vit.errors import InputError, PerfVitError
from perf_vit.labels import open_labels
from perf_vit.labels.objects import read_object_labels
from perf_vit.sources import open_source
from perf_vit.sources.mosaic import item_paths
from perf_vit.writers import input_files

SECRET = "hunter2"


def bomb(levels: int = 12) -> str:
    """Each entity holds ten of the one before."""
    entities = '<!ENTITY e0 "lol">' + "".join(f'<!ENTITY e{i + 1} "{f"&e{i};" * 10}">' for i in range(levels))
    return f"<!DOCTYPE x [{entities}]>"


def quadratic() -> str:
    return f'<!DOCTYPE x [<!ENTITY e12 "{"a" * 50_000}">]>'


def what_is_said_of(path: Path) -> str:
    """Names of the bands, or the error."""
    try:
        with open_source(path) as source:
            return " ".join(source.band_names or ())
    except PerfVitError as error:
        return str(error)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.txt"
    path.write_text(SECRET)
    return path


def declarations(secret: Path) -> dict[str, tuple[str, str]]:
    """Declarations before the root and what stands in the text then."""
    return {
        "entities of entities": (bomb(), "&e12;"),
        "one long entity, often": (quadratic(), "&e12;" * 20_000),
        "another file": (f'<!DOCTYPE x [<!ENTITY f SYSTEM "file://{secret}">]>', "&f;"),
        "another file's declarations": (
            f'<!DOCTYPE x [<!ENTITY % f SYSTEM "file://{secret}"> %f; <!ENTITY g "x">]>',
            "&g;",
        ),
        "a server": ('<!DOCTYPE x SYSTEM "http://127.0.0.1:9/x.dtd">', "&h;"),
    }


KINDS = list(declarations(Path("x")))


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_of_pascal_voc_hold_no_entities(kind: str, tmp_path: Path, secret: Path) -> None:
    before, text = declarations(secret)[kind]
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    labels.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(images / "a.png")
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox>"
    (labels / "a.xml").write_text(
        f"{before}<annotation><filename>a.png</filename><object><name>{text}</name>{box}</object></annotation>"
    )
    start = time.process_time()
    with pytest.raises(InputError, match=r"can't read .*a\.xml as XML") as found:
        read_object_labels(labels, images, label_format="voc")
    assert time.process_time() - start < 5
    assert SECRET not in str(found.value)


@pytest.mark.parametrize("kind", KINDS)
def test_descriptions_of_an_ome_tiff_hold_no_entities(kind: str, tmp_path: Path, secret: Path) -> None:
    before, text = declarations(secret)[kind]
    channel = f'<Channel ID="c" Name="a" SamplesPerPixel="1"/><TiffData/><Note>{text}</Note>'
    xml = (
        f'<?xml version="1.0" encoding="UTF-8"?>{before}<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        '<Image ID="Image:0"><Pixels ID="p" DimensionOrder="XYZCT" Type="uint8" SizeX="64" SizeY="64" SizeZ="1" '
        f'SizeC="1" SizeT="1">{channel}</Pixels></Image></OME>'
    )
    path = tmp_path / "x.ome.tif"
    tifffile.imwrite(path, np.zeros((64, 64), np.uint8), description=xml, metadata=None)
    start = time.process_time()
    assert SECRET not in what_is_said_of(path)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("kind", KINDS)
def test_vrts_hold_no_entities(kind: str, tmp_path: Path, secret: Path, make_scene) -> None:
    before, text = declarations(secret)[kind]
    scene = make_scene(height=16, width=16, num_bands=1)
    path = tmp_path / "x.vrt"
    path.write_text(
        f'{before}<VRTDataset rasterXSize="16" rasterYSize="16"><VRTRasterBand dataType="UInt16" band="1">'
        f"<Description>{text}</Description><SimpleSource><SourceFilename>{scene}</SourceFilename></SimpleSource>"
        "</VRTRasterBand></VRTDataset>"
    )
    start = time.process_time()
    assert SECRET not in what_is_said_of(path)
    assert time.process_time() - start < 5


def test_python_in_a_vrt_does_not_run_even_if_the_environment_allows_it(tmp_path: Path, make_scene) -> None:
    scene, mark = make_scene(height=16, width=16, num_bands=1), tmp_path / "the code ran"
    path = tmp_path / "x.vrt"
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\ndef run(a, out, *args, **kwargs):\n    out[:] = 1\n"
    path.write_text(
        '<VRTDataset rasterXSize="16" rasterYSize="16"><VRTRasterBand dataType="UInt16" band="1" '
        'subClass="VRTDerivedRasterBand"><PixelFunctionType>run</PixelFunctionType><PixelFunctionLanguage>Python'
        f"</PixelFunctionLanguage><PixelFunctionCode><![CDATA[{code}]]></PixelFunctionCode><SimpleSource>"
        f"<SourceFilename>{scene}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    ours = (
        "from perf_vit.sources import open_source\nfrom perf_vit.types import Window\n"
        f"source = open_source({str(path)!r})\n"
        "try:\n    source.read(Window(0, 0, 16, 16))\nexcept ValueError as error:\n    print(error)\n"
    )
    theirs = f"import rasterio\nrasterio.open({str(path)!r}).read()\n"
    allowed = {**os.environ, "GDAL_VRT_ENABLE_PYTHON": "YES"}
    done = subprocess.run([sys.executable, "-c", ours], env=allowed, capture_output=True, text=True, check=True)
    assert "explicitly disabled" in done.stdout
    assert not mark.exists()
    # The code would run.
    subprocess.run([sys.executable, "-c", theirs], env=allowed, check=True, capture_output=True)
    assert mark.exists()


@pytest.mark.slow
def test_drivers_are_left_out_by_the_environment(tmp_path: Path, make_scene) -> None:
    scene = make_scene(height=16, width=16, num_bands=1)
    path = tmp_path / "x.vrt"
    path.write_text(
        '<VRTDataset rasterXSize="16" rasterYSize="16"><VRTRasterBand dataType="UInt16" band="1"><SimpleSource>'
        f"<SourceFilename>{scene}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    script = f"from perf_vit.sources import open_source\nopen_source({str(path)!r})\n"
    for skipped, code in (("", 0), ("VRT", 1)):
        environment = {**os.environ, "GDAL_SKIP": skipped}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
        assert done.returncode == code


NESTED = {
    "lists": "[" * 200_000 + "]" * 200_000,
    "mappings": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "unclosed": "[" * 200_000,
}


@pytest.mark.parametrize("kind", NESTED)
def test_nested_json_is_a_line_and_no_crash(kind: str, tmp_path: Path, make_scene) -> None:
    images, folder = tmp_path / "images", tmp_path / "model"
    images.mkdir()
    folder.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(images / "a.png")
    scene = make_scene(height=16, width=16)
    (folder / "config.json").write_text(NESTED[kind])
    item = tmp_path / "item.json"
    item.write_text(NESTED[kind])
    geojson = tmp_path / "labels.geojson"
    feature = '{"type": "Feature", "properties": {"x": ' + NESTED[kind] + '}, "geometry": null}'
    geojson.write_text('{"type": "FeatureCollection", "features": [' + feature + "]}")
    coco = tmp_path / "coco.json"
    coco.write_text('{"images": [], "annotations": [], "categories": ' + NESTED[kind] + "}")
    with open_source(scene) as source:
        calls = {
            "coco": lambda: read_object_labels(coco, images, label_format="coco"),
            "list of items": lambda: item_paths(str(item), None),
            "model": lambda: perf_vit.conversion.load_converted(folder),
            "polygons": lambda: open_labels(geojson, source, background=0),
        }
        for call in calls.values():
            with pytest.raises(PerfVitError):
                call()
    assert [path for _, path in input_files([item])] == [item]
