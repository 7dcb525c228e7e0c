"""Files next to a map are of the map that is there, whatever was there before."""

import os
from pathlib import Path

import pytest
from stub_segmenter import StubSegmenter

from perf_vit.errors import DataWarning, OutputError
from perf_vit.files import put_in_place
from perf_vit.inference import DetectionPredictOptions, SegmentationPredictOptions, SegmentationPredictor
from perf_vit.inference.detection import ObjectJob
from perf_vit.plotting import default_colormap
from perf_vit.sources import open_source
from perf_vit.writers import write_qgis_style


class Inverted(StubSegmenter):
    def forward(self, tiles):
        return -super().forward(tiles)


@pytest.fixture
def scene(make_scene) -> Path:
    return make_scene(height=40, width=48, num_bands=3)


@pytest.fixture
def predict(scene, tmp_path):
    """Map a scene into `map.tif` and return the files of that name."""

    def _predict(model: StubSegmenter, **options) -> dict[str, bytes]:
        given = SegmentationPredictOptions(device="cpu", **{"style": True, **options})
        SegmentationPredictor(model, given).run(scene, tmp_path / "map.tif")
        return {path.name: path.read_bytes() for path in tmp_path.glob("*map.*")}

    return _predict


ASKED = {"quicklook": True, "report": True, "polygons": "geojson"}


def test_files_of_another_models_map_are_made_again_once_asked_for(predict, tmp_path) -> None:
    predict(StubSegmenter("a"), **ASKED)
    predict(Inverted("b"), overwrite=True)
    found = predict(Inverted("b"), **ASKED)
    for path in tmp_path.glob("*map.*"):
        path.unlink()
    assert found == predict(Inverted("b"), **ASKED)


def test_polygons_of_another_map_that_were_edited_are_refused(predict, tmp_path) -> None:
    predict(StubSegmenter("a"), polygons="geojson")
    polygons = tmp_path / "map.geojson"
    polygons.write_bytes(polygons.read_bytes() + b"\n")
    predict(Inverted("b"), overwrite=True)
    with pytest.raises(OutputError, match=r"map\.geojson exists already, but of another map"):
        predict(Inverted("b"), polygons="geojson")


def test_pictures_of_others_stay(predict, tmp_path) -> None:
    for name in ("map.png", "map.html", "map.qml"):
        (tmp_path / name).write_text("mine")
        os.utime(tmp_path / name, (0, 0))
    predict(StubSegmenter("a"), style=False)
    found = predict(StubSegmenter("a"), quicklook=True, report=True)
    assert [found[name] for name in ("map.png", "map.html", "map.qml")] == [b"mine"] * 3


@pytest.mark.parametrize("options", [{"kind": "probabilities"}, {"style": False}])
def test_names_and_colours_of_a_replaced_map_go_with_it(predict, tmp_path, options) -> None:
    assert {"map.tif.aux.xml", "map.qml"} <= predict(StubSegmenter("a")).keys()
    assert predict(StubSegmenter("b"), overwrite=True, **options).keys() == {"map.tif"}
    (tmp_path / "map.qml").write_text("<!DOCTYPE qgis>\n<qgis/>")
    assert predict(StubSegmenter("c"), overwrite=True, **options).keys() == {"map.tif", "map.qml"}


def test_metadata_of_a_map_that_is_gone_are_not_attached_to_another(predict, tmp_path) -> None:
    predict(StubSegmenter("a"))
    (tmp_path / "map.tif").unlink()
    with pytest.raises(OutputError, match=r"map\.tif\.aux\.xml exists already"):
        predict(StubSegmenter("b"), kind="probabilities")


def test_the_style_of_a_map_that_is_gone_is_not_applied_to_another(predict, tmp_path) -> None:
    predict(StubSegmenter("a"))
    for name in ("map.tif", "map.tif.aux.xml"):
        (tmp_path / name).unlink()
    with pytest.raises(OutputError, match=r"map\.qml exists already"):
        predict(StubSegmenter("b"), style=False)
    assert predict(StubSegmenter("b"), style=False, overwrite=True).keys() == {"map.tif"}


def test_a_style_of_somebody_else_stays_with_a_warning(predict, tmp_path) -> None:
    (tmp_path / "map.qml").write_text("mine")
    with pytest.warns(DataWarning, match=r"map\.qml is not of map\.tif and stays; QGIS applies it"):
        assert predict(StubSegmenter("a"), style=False)["map.qml"] == b"mine"


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("place", ["the record", "the polygons"])
def test_polygons_and_their_record_are_one_step(predict, tmp_path, monkeypatch, place) -> None:
    """After a process that ended between the two, the same command goes on; polygons tidied otherwise were there."""
    whole = predict(StubSegmenter("a"), polygons="geojson", min_area=0)
    tidied = predict(StubSegmenter("a"), polygons="geojson", min_area=40)
    assert whole != tidied

    def kill(*given) -> None:
        if place == "the record" or Path(given[1]).suffix == ".geojson":
            raise KilledError
        put_in_place(*given)

    names = {
        "the record": "perf_vit.inference.jobs.beside.OutputRecord.write",
        "the polygons": "perf_vit.inference.jobs.journal.put_in_place",
    }
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(names[place], kill)
        # What a process that is killed leaves, and an exception doesn't.
        patch.setattr("perf_vit.inference.jobs.journal._remove", lambda folder: None)
        predict(StubSegmenter("a"), polygons="geojson", min_area=0)
    assert predict(StubSegmenter("a"), polygons="geojson", min_area=0) == whole
    assert not list(tmp_path.glob("*.partial"))


def test_a_style_and_metadata_that_others_changed_stay(predict, tmp_path) -> None:
    found = predict(StubSegmenter("a"))
    changed = {
        "map.qml": found["map.qml"].replace(b'alpha="255"', b'alpha="99"'),
        "map.tif.aux.xml": found["map.tif.aux.xml"].replace(b"<PAMDataset>", b"<PAMDataset><Metadata/>"),
    }
    for name, content in changed.items():
        assert content != found[name]
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, (0, 0))
    assert predict(StubSegmenter("a")) == found | changed


def test_the_style_of_objects_that_are_gone_is_not_applied_to_others(scene, tmp_path) -> None:
    write_qgis_style(tmp_path / "found.qml", ["a"], default_colormap(1))
    with open_source(scene) as source:
        given = {"source": source, "out": tmp_path / "found.gpkg", "settings": {}, "meaning": {}}
        with pytest.raises(OutputError, match=r"found\.qml exists already"):
            ObjectJob(**given, options=DetectionPredictOptions(style=False)).check()
        assert not ObjectJob(**given, options=DetectionPredictOptions(style=False, overwrite=True)).check()


@pytest.mark.parametrize("is_edited", [False, True])
def test_the_style_of_replaced_objects_goes_with_them(scene, tmp_path, is_edited) -> None:
    def write(**options) -> None:
        given = DetectionPredictOptions(**options)
        out = tmp_path / "found.gpkg"
        with open_source(scene) as source:
            job = ObjectJob(source=source, out=out, settings={}, meaning={}, options=given)
            with job.work() as journal:
                made = {path: journal.folder / path.name for path in [out, *job.beside]}
                for file in made.values():
                    file.write_text(str(options))
                job.finish(journal, made)

    write(style=True)
    if is_edited:
        (tmp_path / "found.qml").write_text("mine")
    write(overwrite=True, style=False)
    assert (tmp_path / "found.qml").exists() == is_edited


@pytest.mark.parametrize("suffix", [".json", ".gpkg"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_style_of_a_map_stays_beside_new_objects(scene, predict, tmp_path, suffix: str, overwrite: bool) -> None:
    before = predict(StubSegmenter("a"))
    assert "map.qml" in before
    with open_source(scene) as source:
        options = DetectionPredictOptions(style=False, overwrite=overwrite)
        job = ObjectJob(source=source, out=tmp_path / f"map{suffix}", settings={}, meaning={}, options=options)
        assert not job.check()
        with job.work() as journal:
            (journal.folder / job.out.name).write_text("objects")
            job.finish(journal, {job.out: journal.folder / job.out.name})
    found = {path.name: path.read_bytes() for path in tmp_path.glob("map.*")}
    assert found == {**before, f"map{suffix}": b"objects"}


def test_polygons_stay_if_their_record_cannot_be_written(predict, tmp_path, monkeypatch) -> None:
    before = predict(StubSegmenter("a"), polygons="geojson", min_area=0)

    def full(*given) -> None:
        raise OutputError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="the disk is full"):
        patch.setattr("perf_vit.inference.jobs.beside.OutputRecord.write", full)
        predict(StubSegmenter("a"), polygons="geojson", min_area=40)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*map.*")} == before
