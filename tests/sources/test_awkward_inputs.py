"""Names and files that are legal and rare."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import rasterio

from perf_vit.errors import InputError
from perf_vit.files import atomic_file, staged
from perf_vit.inference import find_inputs, predict_many
from perf_vit.inference.jobs import JobResult
from perf_vit.inference.jobs.journal import open_journal
from perf_vit.sources import open_source


@pytest.mark.parametrize("href", ["./my%20tile%23.tif", "my tile#.tif", "file://{folder}/my%20tile%23.tif"])
def test_links_of_stac_items_may_be_percent_encoded(make_scene, tmp_path, href) -> None:
    make_scene().rename(tmp_path / "my tile#.tif")
    asset = {"href": href.format(folder=tmp_path), "roles": ["data"]}
    (tmp_path / "items.json").write_text(json.dumps([{"id": "a", "assets": {"data": asset}}]))
    source = open_source(tmp_path / "items.json")
    assert source.read(source.extent).valid.any()


def test_a_file_whose_name_holds_a_percent_sign_is_found(make_scene, tmp_path) -> None:
    make_scene().rename(tmp_path / "a%20b.tif")
    asset = {"href": "a%20b.tif", "roles": ["data"]}
    (tmp_path / "items.json").write_text(json.dumps([{"id": "a", "assets": {"data": asset}}]))
    assert open_source(tmp_path / "items.json").paths == (str(tmp_path / "a%20b.tif"),)


@pytest.mark.parametrize("options", [{}, {"bands": [3, 1]}, {"crs": "EPSG:32636"}])
def test_bands_of_several_dtypes_are_read_as_their_common_one(make_scene, tmp_path, options) -> None:
    path = make_scene(num_bands=3, dtype="uint8", nodata=None)
    bands = "".join(
        f'<VRTRasterBand dataType="{dtype}" band="{band}"><SimpleSource><SourceFilename>{path}</SourceFilename>'
        f'<SourceBand>{band}</SourceBand><SrcRect xOff="0" yOff="0" xSize="90" ySize="70"/>'
        f'<DstRect xOff="0" yOff="0" xSize="90" ySize="70"/></SimpleSource></VRTRasterBand>'
        for band, dtype in enumerate(("Byte", "Float32", "UInt16"), 1)
    )
    with rasterio.open(path) as dataset:
        place = ",".join(map(str, dataset.transform.to_gdal()))
    (tmp_path / "a.vrt").write_text(
        f'<VRTDataset rasterXSize="90" rasterYSize="70"><SRS>EPSG:32637</SRS><GeoTransform>{place}</GeoTransform>'
        f"{bands}</VRTDataset>"
    )
    mixed, plain = open_source(tmp_path / "a.vrt", **options), open_source(path, **options)
    found, expected = mixed.read(mixed.extent), plain.read(plain.extent)
    assert found.pixels.dtype == mixed.dtype == (np.uint16 if options.get("bands") else np.float32)
    if not options.get("crs"):
        assert np.array_equal(found.pixels, expected.pixels)
    assert mixed.read_reduced(30).pixels.shape == plain.read_reduced(30).pixels.shape


@pytest.mark.parametrize("length", [200, 245, 251])
@pytest.mark.parametrize("letter", ["a", "é"])
def test_outputs_may_have_the_longest_names_there_are(tmp_path, length, letter) -> None:
    name = letter * (length // len(letter.encode()))
    path = tmp_path / f"{name}.tif"
    with staged(path) as folder:
        (folder / path.name).write_text("staged")
    assert path.read_text() == "staged"
    with atomic_file(path) as unfinished:
        unfinished.write_text("replaced")
    with open_journal(path) as journal:
        journal.begin({"x": 1}, resume=True)
        (journal.folder / path.name).write_text("journal")
        journal.move(journal.folder / path.name)
    assert path.read_text() == "journal"
    assert os.listdir(tmp_path) == [path.name]


def test_a_name_that_is_not_utf8_does_not_end_a_batch(tmp_path, make_scene) -> None:
    (tmp_path / "scenes").mkdir()
    for name in (b"a.tif", b"caf\xe9.tif", b"z.tif"):
        make_scene().rename(os.fsdecode(os.fsencode(tmp_path / "scenes") + b"/" + name))

    def predict_one(item):
        open_source(item.path).close()
        return JobResult(made=True, num_windows=1, num_pixels=1)

    inputs = find_inputs([tmp_path / "scenes"], tmp_path / "maps")
    report = predict_many(predict_one, inputs, on_error="skip", report_path=tmp_path / "report.json")
    assert [one.status for one in report.inputs] == ["done", "failed", "done"]
    assert json.loads((tmp_path / "report.json").read_text())["totals"]["failed"] == 1


def test_a_name_that_is_not_utf8_is_one_line(tmp_path, make_scene) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.tif"))
    make_scene().rename(path)
    with pytest.raises(InputError, match=r"can't open .*caf.*\.tif: its name is not UTF-8; rename it"):
        open_source(path)


_ASSET = {"data": {"href": "a.tif"}}


@pytest.mark.parametrize(
    "item",
    [
        [],
        {},
        None,
        7,
        "text",
        {"type": "Feature"},
        {"type": "Feature", "assets": None},
        {"type": "Feature", "assets": []},
        {"type": "Feature", "assets": {}},
        {"type": "Feature", "assets": {"data": None}},
        {"type": "Feature", "assets": {"data": "a.tif"}},
        {"type": "Feature", "assets": {"data": {}}},
        {"type": "Feature", "assets": {"data": {"href": None}}},
        {"type": "Feature", "assets": {"data": {"href": 7}}},
        {"type": "Feature", "assets": {"data": {"href": ""}}},
        {"type": "Feature", "assets": {"data": {"href": "missing.tif"}}},
        {"type": "FeatureCollection"},
        {"type": "FeatureCollection", "features": None},
        {"type": "FeatureCollection", "features": []},
        {"type": "FeatureCollection", "features": [None]},
        {"type": "FeatureCollection", "features": [{"type": "Feature", "assets": _ASSET}, 7]},
    ],
    ids=repr,
)
def test_broken_stac_items_are_one_line(item, make_scene, tmp_path) -> None:
    make_scene().rename(tmp_path / "a.tif")
    path = tmp_path / "items.json"
    path.write_text(json.dumps(item), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)
