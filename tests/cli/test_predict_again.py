"""The same command again: what is there stays, what is missing is made."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import call
from jobs_that_write import write_scene
from small_models import save_segmenter, save_small_detector


@pytest.fixture(params=["one", pytest.param("many", marks=pytest.mark.slow)])
def predict(request, predict_as):
    """Predict into `out/map.tif`, as one input or as one of a folder."""
    return predict_as(request.param)


@pytest.fixture
def predict_as(trained, tmp_path):
    image = tmp_path / "images" / "map.tif"
    image.parent.mkdir()
    shutil.copy(trained.scene.image, image)
    out = tmp_path / "out"

    def _predict_as(how: str):
        def _predict(*extra: str) -> dict[str, bytes]:
            ends = [image, out / "map.tif"] if how == "one" else [image.parent, out]
            args = ["predict", "--checkpoint", trained.checkpoint, "--input", ends[0], "--output", ends[1], *extra]
            assert call(args) == 0
            return {path.name: path.read_bytes() for path in out.glob("map.*")}

        _predict.out, _predict.many = out, how == "many"
        return _predict

    return _predict_as


def test_a_missing_quicklook_is_made(predict) -> None:
    whole = predict()
    (predict.out / "map.png").unlink()
    made = (predict.out / "map.tif").stat().st_mtime_ns
    assert predict() == whole
    assert (predict.out / "map.tif").stat().st_mtime_ns == made


def test_polygons_that_are_asked_for_later_are_made_of_the_map_that_is_there(predict) -> None:
    options = ["--polygons", "geojson"]
    predict()
    made = (predict.out / "map.tif").stat().st_mtime_ns
    later = predict(*options)
    names = {"map.tif", "map.png", "map.qml", "map.tif.aux.xml", "map.geojson"}
    names |= set() if predict.many else {"map.html"}
    assert set(later) == names
    assert (predict.out / "map.tif").stat().st_mtime_ns == made
    shutil.rmtree(predict.out)
    # The page says what was asked for when it was written.
    later.pop("map.html", None)
    assert {name: content for name, content in predict(*options).items() if name != "map.html"} == later


def test_polygons_are_tidied_again_while_the_map_stays(predict) -> None:
    def num_polygons() -> int:
        return len(json.loads((predict.out / "map.geojson").read_bytes())["features"])

    predict("--polygons", "geojson")
    made, all_of_them = (predict.out / "map.tif").stat().st_mtime_ns, num_polygons()
    few = predict("--polygons", "geojson", "--min-area", "50")
    assert 0 < num_polygons() < all_of_them
    assert predict("--polygons", "geojson", "--min-area", "50") == few
    predict("--polygons", "geojson")
    assert num_polygons() == all_of_them
    assert (predict.out / "map.tif").stat().st_mtime_ns == made


def test_polygons_that_were_edited_are_not_tidied_away(trained, tmp_path, capsys) -> None:
    polygons = tmp_path / "map.geojson"
    args = ["predict", "--checkpoint", trained.checkpoint, "--input", trained.scene.image, "--polygons", "geojson"]
    args += ["--output", tmp_path / "map.tif"]
    assert call(args) == 0
    polygons.write_text(polygons.read_text() + "\n")
    edited = polygons.read_bytes()
    assert call(args) == 0
    assert call([*args, "--simplify", "1"]) == 2
    assert "but of another map, tidied otherwise, or changed since it was made" in capsys.readouterr().err
    assert polygons.read_bytes() == edited


def test_each_file_is_announced_with_its_path(trained, tmp_path, capsys) -> None:
    out = tmp_path / "map.tif"
    args = ["predict", "--checkpoint", trained.folder, "--input", trained.scene.image, "--polygons", "gpkg", "--output"]
    for _ in range(2):
        assert call([*args, out]) == 0
        said = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
        assert said.pop("seam_disagreement").endswith("of the pixels under several windows")
        paths = {name: path.split(",")[0] for name, path in said.items()}
        assert paths == {
            "map": str(out),
            "quicklook": str(tmp_path / "map.png"),
            "polygons": str(tmp_path / "map.gpkg"),
            "QGIS style": str(tmp_path / "map.qml"),
            "class names": str(tmp_path / "map.tif.aux.xml"),
            "report": str(tmp_path / "map.html"),
        }
        assert all(Path(path).is_file() for path in paths.values())


@pytest.mark.parametrize(
    "place",
    [
        "perf_vit.inference.jobs.journal._remove",
        "perf_vit.inference.segmentation.write_map_quicklook",
        "perf_vit.inference.segmentation.write_objects",
    ],
)
def test_a_process_killed_after_the_map_leaves_the_rest_to_the_next(predict, monkeypatch, place) -> None:
    options = ["--polygons", "geojson"]
    whole = predict(*options)
    shutil.rmtree(predict.out)

    class KilledError(BaseException):
        pass

    def kill(*_, **__) -> None:
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(place, kill)
        predict(*options)
    assert (predict.out / "map.tif").exists()
    assert predict(*options) == whole
    assert not list(Path(predict.out).glob("*.partial"))


def test_a_process_killed_between_the_files_of_one_of_many_leaves_them_to_the_next(predict_as, monkeypatch) -> None:
    place = "perf_vit.inference.segmentation.write_map_quicklook"
    test_a_process_killed_after_the_map_leaves_the_rest_to_the_next(predict_as("many"), monkeypatch, place)


def test_files_of_an_earlier_map_are_not_left_next_to_another(predict, monkeypatch) -> None:
    options = ["--polygons", "geojson"]
    smooth = predict(*options, "--blend", "gaussian")
    shutil.rmtree(predict.out)
    predict(*options)

    class KilledError(BaseException):
        pass

    def kill(*_, **__) -> None:
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr("perf_vit.inference.segmentation.write_map_quicklook", kill)
        predict(*options, "--blend", "gaussian", "--overwrite")
    assert predict(*options, "--blend", "gaussian") == smooth


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_scene_of_a_folder_may_be_written_into_a_sub_folder_of_it(task, tmp_path, capsys) -> None:
    tiles = tmp_path / "tiles"
    for number in range(2):
        write_scene(tiles / f"{number}.tif", number, 64 * number)
    checkpoint = (save_segmenter if task == "segmentation" else save_small_detector)(tmp_path / "model.ckpt")
    output = tiles / "out" / f"map.{'tif' if task == 'segmentation' else 'gpkg'}"
    args = ["predict", "--checkpoint", checkpoint, "--input", tiles, "--mosaic", "--output", output, "--device", "cpu"]
    assert call(args) == 0
    before = output.read_bytes()
    if task == "segmentation":
        assert call(args) == 0
        assert output.read_bytes() == before
    assert call([*args, "--overwrite"]) == 0
    member = (tiles / "0.tif").read_bytes()
    output.unlink()
    output.hardlink_to(tiles / "0.tif")
    assert call([*args, "--overwrite"]) == 2
    assert "would replace " in capsys.readouterr().err
    assert (tiles / "0.tif").read_bytes() == member
