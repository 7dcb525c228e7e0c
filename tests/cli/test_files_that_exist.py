"""Files that a user has in the place of outputs, one example of each kind."""

from functools import partial
from pathlib import Path

import jobs_that_write as jobs
import pytest
import rasterio.shutil
import small_models
from command_line import call
from kept_files import MINE, put, refused

import perf_vit
from perf_vit.config import dump_config
from perf_vit.data import make_ship_scene
from perf_vit.errors import OutputError
from perf_vit.sources import image_names
from perf_vit.tasks.callbacks import plot_history
from perf_vit.workflows.train import Run, read_run

EXAMPLES = [
    (
        "predict --input scene.png --output scene.tif",
        "scene.png would replace the input scene.png",
    ),
    (
        "predict --input scene.tif --output scene.tif",
        "scene.tif would replace the input scene.tif",
    ),
    (
        "predict --input scene.tif --output new/../scene.tif",
        "new/../scene.tif would replace the input scene.tif",
    ),
    (
        "predict --input all.vrt --output scene.tif",
        "scene.tif would replace a part of the input all.vrt",
    ),
    (
        "predict --input png.vrt --output scene.tif",
        "scene.png would replace a part of the input png.vrt",
    ),
    (
        "predict --input tiles --output tiles/a.tif --mosaic",
        "tiles/a.tif would replace a part of the input tiles",
    ),
    (
        "predict --input items.json --output tiles/a.tif --mosaic",
        "tiles/a.tif would replace a part of the input items.json",
    ),
    (
        "predict --input items.json --output items.tif --mosaic --polygons json",
        "items.json would replace the input items.json",
    ),
    (
        "predict --input scene.tif --output site.tif --polygons geojson --tissue site.geojson",
        "replace the input site.geojson",
    ),
    (
        "predict --input scene.tif --output model.tif --checkpoint model.tif",
        "model.tif would replace the input model.tif",
    ),
    (
        "predict --input list.csv --output list.csv --checkpoint classes.ckpt",
        "list.csv would replace the input list.csv",
    ),
    (
        "evaluate --input scene.png --labels mask.vrt --json scene.json",
        "scene.png would replace the input scene.png",
    ),
    (
        "evaluate --input scene_confusion.png --labels mask.vrt --json scene.json",
        "the input scene_confusion.png",
    ),
    (
        "evaluate --input scene.tif --labels mask.vrt --json mask.json",
        "mask.png would replace a part of the input mask.vrt",
    ),
    (
        "evaluate --input photos --labels mask.vrt --json photos/a.json",
        "photos/a.png would replace a part of the input photos",
    ),
]
"""Commands, of a segmenter where none is named, and what their line says."""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with files of all these names."""
    monkeypatch.chdir(tmp_path)
    for name in ("scene.tif", "tiles/a.tif", "tiles/b.tif"):
        jobs.write_scene(Path(name))
    for name in ("scene.png", "photos/a.png", "scene_confusion.png"):
        Path(name).parent.mkdir(exist_ok=True)
        rasterio.shutil.copy("scene.tif", name, driver="PNG")
    for name, member in (("all.vrt", "scene.tif"), ("png.vrt", "scene.png")):
        Path(name).write_text(jobs.VRT.format("".join(jobs.VRT_BAND.format(band, member) for band in (1, 2, 3))))
    Path("items.json").write_text('[{"assets": {"data": {"href": "tiles/a.tif", "roles": ["data"]}}}]')
    Path("site.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    Path("list.csv").write_text("path,label\nscene.tif,a\n")
    jobs.write_mask(Path("mask.tif"))
    rasterio.shutil.copy("mask.tif", "mask.png", driver="PNG")
    Path("mask.vrt").write_text(jobs.VRT.format(jobs.VRT_BAND.format(1, "mask.png")))
    small_models.save_segmenter(Path("model.ckpt"))
    small_models.save_segmenter(Path("model.tif"))
    small_models.save_classifier(Path("classes.ckpt"), "single_label")
    return tmp_path


@pytest.mark.parametrize("overwrite", [pytest.param([], marks=pytest.mark.slow), ["--overwrite"]])
@pytest.mark.parametrize(("command", "message"), EXAMPLES)
def test_an_input_by_any_way_to_name_it_is_refused(
    place, capsys, command: str, message: str, overwrite: list[str]
) -> None:
    args = [*command.split(), *overwrite]
    if "--checkpoint" not in args:
        args += ["--checkpoint", "model.ckpt"]
    assert message in refused(args, place, capsys)


def test_a_hand_drawn_file_beside_the_map_is_kept(place, capsys) -> None:
    args = [
        "predict",
        "--checkpoint",
        "model.ckpt",
        "--input",
        "scene.tif",
        "--output",
        "site.tif",
        "--polygons",
        "geojson",
    ]
    assert "site.geojson exists already; choose another output, or replace it" in refused(args, place, capsys)
    assert call([*args, "--overwrite"]) == 0
    assert len(Path("site.geojson").read_text()) > 100


@pytest.mark.parametrize("polygons", ["gpkg", "json"])
def test_an_unrelated_file_in_a_folder_of_maps_is_kept(place, capsys, polygons: str) -> None:
    args = ["predict", "--checkpoint", "model.ckpt", "--input", "tiles", "--output", "maps", "--polygons", polygons]
    for name in ("b.tif", "b.png", f"b.{polygons}", "report.json"):
        put(Path("maps", name))
        # The first input isn't mapped before that.
        assert f"maps/{name} exists already" in refused(args, place, capsys)
        Path("maps", name).unlink()
    put(Path("maps/b.tif.partial/mine.txt"))
    assert "maps/b.tif.partial" in refused([*args, "--overwrite"], place, capsys)


def test_an_input_named_like_the_report_is_refused(place, capsys) -> None:
    jobs.write_scene(Path("tiles/report.tif"))
    args = ["predict", "--checkpoint", "model.ckpt", "--input", "tiles", "--output", "maps", "--polygons", "json"]
    assert "maps/report.json would be written twice" in refused(args, place, capsys)


def test_scores_named_like_their_picture_are_refused(place, capsys) -> None:
    args = [
        "evaluate",
        "--checkpoint",
        "model.ckpt",
        "--input",
        "scene.tif",
        "--labels",
        "mask.tif",
        "--json",
        "new.png",
    ]
    assert "new.png would be written twice" in refused(args, place, capsys)


def test_two_detections_of_one_name_are_refused(place, capsys) -> None:
    small_models.save_small_detector(Path("cars.ckpt"))
    Path("both").mkdir()
    for name in ("both/a.tif", "both/a.svs"):
        jobs.write_scene(Path(name))
    args = ["predict", "--checkpoint", "cars.ckpt", "--input", "both", "--output", "found"]
    assert "found/a.gpkg would be written twice" in refused(args, place, capsys)


def test_python_keeps_files_too(place) -> None:
    model, source = perf_vit.load("model.ckpt"), perf_vit.open("scene.tif")
    put(Path("map.tif"))
    with pytest.raises(OutputError, match=r"map.tif exists already.*overwrite=True"):
        perf_vit.predict(model, source, "map.tif")
    assert Path("map.tif").read_bytes() == MINE
    perf_vit.predict(model, source, "map.tif", overwrite=True)
    made = Path("map.tif").stat().st_mtime_ns
    assert not perf_vit.predict(model, source, "map.tif").made
    assert Path("map.tif").stat().st_mtime_ns == made
    with pytest.raises(OutputError, match=r"tiles/b\.tif would replace the input tiles/b\.tif"):
        perf_vit.predict(model, perf_vit.open(["tiles/a.tif", "tiles/b.tif"]), "tiles/b.tif", overwrite=True)


def test_slides_of_one_name_have_attention_files_of_their_own() -> None:
    paths = ["x/a.svs", "y/a.svs", "a-2.svs", "z/a.svs", "b.svs"]
    assert list(image_names(paths).values()) == ["a", "a-3", "a-2", "a-4", "b"]


def test_a_saved_model_is_not_converted_onto_itself(place, capsys) -> None:
    job = jobs.convert(place / "job")
    assert call(job.args) == 0
    linear = job.outputs[0].parent
    args = ["convert", linear, "--out", linear]
    assert "would replace the input" in refused([*args, "--overwrite"], place, capsys)
    inside = ["convert", linear, "--out", place / "new", "--weights", linear / "model.safetensors"]
    assert "a folder with weights of its own" in refused(inside, place, capsys)
    weights = ["convert", "test_vit", "--weights", linear / "model.safetensors", "--out", linear]
    assert "would replace the input" in refused([*weights, "--overwrite"], place, capsys)


def test_a_link_to_a_folder_of_a_model_stays_one(place) -> None:
    job = jobs.convert(place / "job")
    assert call(job.args) == 0
    (place / "link").symlink_to(job.outputs[0].parent)
    args = [place / "link" if each == job.outputs[0].parent else each for each in job.args]
    assert call([*args, "--overwrite"]) == 0
    assert (place / "link").is_symlink()
    assert all(output.exists() for output in job.outputs)


@pytest.fixture
def demo(tmp_path, monkeypatch) -> list[str | Path]:
    """The command line of a demo that doesn't train."""

    def train(config, overrides, *, out) -> Run:
        run = Path(out)
        assert not list((run / "checkpoints").glob("*"))
        dump_config(read_run(config, overrides, out), run / "config.yaml")
        plot_history([], run / "loss_curve.png")
        (run / "metrics.csv").write_text("epoch,train/loss,val/iou\n1,0.5,0.25\n")
        put(run / "checkpoints" / "last.ckpt")
        small_models.save_segmenter(run / "checkpoints" / "best.ckpt", "ship", num_bands=4, tile_px=256)
        return Run(run)

    monkeypatch.setattr("perf_vit.workflows.demo.train", train)
    monkeypatch.setattr("perf_vit.workflows.demo.make_ship_scene", partial(make_ship_scene, size_px=512, num_targets=9))
    (tmp_path / "out" / "run").mkdir(parents=True)
    return ["demo", "--out", tmp_path / "out"]


def test_a_demo_is_made_anew_on_demand_and_no_other_run_is_touched(demo, tmp_path, capsys) -> None:
    assert call(demo) == 0
    assert "scene.tif exists already" in refused(demo, tmp_path, capsys)
    before = (tmp_path / "out" / "map.tif").stat().st_mtime_ns
    assert call([*demo, "--overwrite"]) == 0
    assert (tmp_path / "out" / "map.tif").stat().st_mtime_ns > before
    put(tmp_path / "out" / "run" / "config.yaml", b"task: of somebody else")
    assert "run/config.yaml exists already and is not of a run" in refused([*demo, "--overwrite"], tmp_path, capsys)


def test_a_demo_that_was_killed_while_mapping_is_made_anew_on_demand(demo, tmp_path, monkeypatch) -> None:
    class KilledError(BaseException):
        pass

    def kill(*_) -> None:
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr("perf_vit.inference.jobs.job.write_cog", kill)
        call(demo)
    assert list((tmp_path / "out").glob("map.tif.partial/rows_*"))
    assert call([*demo, "--overwrite"]) == 0
    assert (tmp_path / "out" / "report.html").exists()
    assert not list((tmp_path / "out").glob("*.partial"))
