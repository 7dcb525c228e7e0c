"""Reports of predictions, evaluations and training runs, one mechanism for all tasks."""

import csv
from pathlib import Path

import numpy as np
import pytest
import rasterio
from command_line import call, train_args
from jobs_that_write import CPU, write_mask, write_scene
from pages import Parsed, parsed
from PIL import Image
from small_models import save_classifier, save_segmenter, save_slide_classifier, save_small_detector
from synthetic_slide import make_slide

import perf_vit
from perf_vit.reporting import Page
from perf_vit.workflows.train import Run


def page(path: Path, *headings: str) -> Parsed:
    """A report that is whole: nothing outside of it, no picture without content, no more than 10 MB."""
    found = parsed(path)
    assert set(headings) <= set(found.headings), found.headings
    assert found.links == []
    assert all(uri.startswith("data:image/") and len(uri) > 100 for uri in found.images)
    assert found.num_bytes < 10_000_000
    return found


def predict(checkpoint: Path, given: Path, output: Path, *extra: str) -> None:
    args = ["predict", "--checkpoint", checkpoint, "--input", given, "--output", output, *CPU, *extra]
    assert call(args) == 0


def evaluate(checkpoint: Path, given: Path, labels: Path, report: Path, *extra: str) -> None:
    args = ["evaluate", "--checkpoint", checkpoint, "--input", given, "--labels", labels, "--report", report, *CPU]
    assert call([*args, *extra]) == 0


@pytest.fixture
def scene(tmp_path) -> Path:
    return write_scene(tmp_path / "in" / "images" / "a.tif")


def test_a_map_has_a_zoomable_preview_with_its_classes(tmp_path, scene, capsys) -> None:
    predict(save_segmenter(tmp_path / "m.ckpt", target="<ship>"), scene, tmp_path / "out" / "map.tif")
    found = page(tmp_path / "out" / "map.html", "a.tif", "Map", "Classes", "Settings")
    assert "<ship>" in found.text
    assert '"name": "map"' in found.text
    assert found.num_scripts == 1
    assert f"report: {tmp_path / 'out' / 'map.html'}" in capsys.readouterr().out


def test_no_report_is_written_unasked(tmp_path, scene) -> None:
    checkpoint = save_segmenter(tmp_path / "m.ckpt")
    predict(checkpoint, scene, tmp_path / "out" / "map.tif", "--no-report", "--no-style", "--no-quicklook")
    perf_vit.predict(checkpoint, scene, tmp_path / "out" / "again.tif", progress=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["again.tif", "map.tif"]


def test_several_maps_have_one_report(tmp_path, scene) -> None:
    write_scene(scene.with_name("b.tif"), 1)
    checkpoint, out = save_segmenter(tmp_path / "m.ckpt"), tmp_path / "out"
    predict(checkpoint, scene.parent, out)
    found = page(out / "report.html", "Outputs", "Inputs", "Settings")
    assert found.captions == ["a.tif", "b.tif"]
    assert not (out / "a.html").exists()
    # That of an earlier run is replaced, and no other file.
    predict(checkpoint, scene.parent, out)
    (out / "report.html").write_text("mine")
    args = ["predict", "--checkpoint", checkpoint, "--input", scene.parent, "--output", out, *CPU]
    assert call(args) == 2
    assert (out / "report.html").read_text() == "mine"


def test_the_report_of_training_stays_when_its_folder_gets_maps(tmp_path, scene) -> None:
    write_scene(scene.with_name("b.tif"), 1)
    checkpoint, run = save_segmenter(tmp_path / "m.ckpt"), tmp_path / "run"
    run.mkdir()
    content = Page(title="training").write(run / "report.html").read_bytes()
    predict(checkpoint, scene.parent, run)
    # The page of the first run is replaced by that of the second.
    predict(checkpoint, scene.parent, run, "--overwrite")
    assert (run / "report.html").read_bytes() == content
    assert page(run / "predictions.html", "Outputs", "Inputs").captions == ["a.tif", "b.tif"]


def test_objects_are_drawn_on_their_scene(tmp_path, scene) -> None:
    out = tmp_path / "out" / "o.gpkg"
    predict(save_small_detector(tmp_path / "m.ckpt"), scene, out, "--score-threshold", "0")
    found = page(out.with_suffix(".html"), "Objects", "Classes", "Settings")
    assert '"shapes": [["#e69f00"' in found.text
    assert "objects by score" in found.captions
    picture = np.asarray(Image.open(out.with_suffix(".png")))
    assert (picture == (230, 159, 0)).all(-1).sum() > 100


@pytest.mark.parametrize("kind", ["single_label", "multilabel", "regression"])
def test_images_of_a_table_are_shown_with_what_was_predicted(tmp_path, scene, kind: str) -> None:
    write_scene(scene.with_name("b.tif"), 1)
    out = tmp_path / "out" / "found.csv"
    predict(save_classifier(tmp_path / "m.ckpt", kind), scene.parent, out)
    found = page(out.with_suffix(".html"), "Inputs", "Settings")
    rows = list(csv.DictReader(out.open()))
    assert len(found.images) == 2
    if kind == "single_label":
        assert found.captions[0].startswith(f"a.tif: {rows[0]['prediction']}, 0.")
    if kind == "regression":
        assert found.captions[0] == f"a.tif: height {rows[0]['height']}"


def test_maps_and_objects_of_slides_show_the_outline_of_tissue(tmp_path) -> None:
    slide = make_slide(tmp_path / "a.svs", 640, 600, mpp=0.5, tile_px=64, tissue_share=0.5)
    for model, out in (
        (save_segmenter(tmp_path / "map.ckpt"), tmp_path / "out" / "map.tif"),
        (save_small_detector(tmp_path / "objects.ckpt"), tmp_path / "out" / "objects.geojson"),
    ):
        predict(model, slide, out, "--tissue", "auto")
        assert "outline of the tissue" in page(out.with_suffix(".html"), "Tissue").captions
        predict(model, slide, out, "--overwrite")
        assert "Tissue" not in page(out.with_suffix(".html")).headings


def test_slides_are_shown_with_their_attention(tmp_path) -> None:
    slide = tmp_path / "a.svs"
    make_slide(slide, 640, 600, mpp=0.5, tile_px=64, tissue_share=0.5)
    checkpoint = save_slide_classifier(tmp_path / "run" / "checkpoints" / "best.ckpt")
    predict(checkpoint, slide, tmp_path / "out" / "found.csv")
    found = page(tmp_path / "out" / "found.html", "Predictions", "Inputs")
    assert found.captions == ["tissue", "attention"]
    (tmp_path / "labels.csv").write_text("slide,label\na.svs,small\n")
    evaluate(checkpoint, tmp_path, tmp_path / "labels.csv", tmp_path / "scores.html")
    found = page(tmp_path / "scores.html", "Scores", "Curves and confusion", "Worst")
    assert "true small" in found.captions[-1]


def test_an_evaluation_of_a_map_shows_the_worst_cells_and_all_of_it(tmp_path, scene) -> None:
    mask = write_mask(tmp_path / "in" / "mask.tif")
    evaluate(save_segmenter(tmp_path / "m.ckpt"), scene, mask, tmp_path / "scores.html")
    found = page(tmp_path / "scores.html", "Map", "Scores", "Curves and confusion", "Worst", "Settings")
    assert {"image", "labels", "prediction", "errors", "confusion matrix"} <= set(found.captions)
    assert '"name": "errors"' in found.text
    # Nothing else was asked for.
    assert not list(tmp_path.glob("scores*.png"))


def test_the_report_lies_next_to_the_scores(tmp_path, scene, capsys) -> None:
    mask = write_mask(tmp_path / "in" / "mask.tif")
    args = ["evaluate", "--checkpoint", save_segmenter(tmp_path / "m.ckpt"), "--input", scene, "--labels", mask, *CPU]
    (tmp_path / "s.html").write_text("mine")
    assert call([*args, "--json", tmp_path / "s.json"]) == 2
    assert (tmp_path / "s.html").read_text() == "mine"
    assert "take its name; try s_scores.json" in " ".join(capsys.readouterr().err.split())
    assert call([*args, "--json", tmp_path / "s.json", "--overwrite"]) == 0
    page(tmp_path / "s.html", "Scores")


def test_an_evaluation_of_objects_shows_hits_and_errors(tmp_path, scene) -> None:
    labels = tmp_path / "in" / "labels.csv"
    labels.write_text("image,xmin,ymin,xmax,ymax,label\na.tif,5,5,20,20,car\n")
    evaluate(save_small_detector(tmp_path / "m.ckpt"), scene.parent, labels, tmp_path / "scores.html")
    found = page(tmp_path / "scores.html", "Scores", "Curves and confusion", "Worst")
    assert {"image", "labels", "prediction", "errors"} <= set(found.captions)
    assert "false alarm" in found.text


@pytest.mark.parametrize("kind", ["single_label", "regression"])
def test_an_evaluation_of_images_shows_the_worst(tmp_path, scene, kind: str) -> None:
    column, value = ("height", "1.5") if kind == "regression" else ("label", "a")
    labels = tmp_path / "in" / "labels.csv"
    labels.write_text(f"image,{column}\na.tif,{value}\n")
    evaluate(save_classifier(tmp_path / "m.ckpt", kind), scene.parent, labels, tmp_path / "scores.html")
    found = page(tmp_path / "scores.html", "Scores", "Worst")
    assert any("a.tif" in caption and "true" in caption for caption in found.captions)


def test_a_run_has_a_report_that_can_be_made_again(trained, tmp_path) -> None:
    path = trained.folder / "report.html"
    found = page(path, "Curves", "Scores", "Worst", "Settings")
    assert {"image", "labels", "prediction", "errors"} <= set(found.captions)
    assert "backbone: performer_vit_tiny_patch16_224" in found.text
    again = Run(trained.folder).report(tmp_path / "again.html")
    assert page(again).headings == found.headings


def test_a_run_without_a_report(trained, tmp_path) -> None:
    args = train_args(trained.scene, tmp_path / "run", "trainer.max_epochs=1")
    assert args[-2] == "trainer.report=false"
    assert call(args) == 0
    assert not (tmp_path / "run" / "report.html").exists()


def test_scores_from_python_have_a_report(trained, tmp_path) -> None:
    found = perf_vit.evaluate(trained.folder, trained.scene.image, trained.scene.labels, progress=False)
    path = found.report(tmp_path / "scores.html")
    assert path == tmp_path / "scores.html"
    page(path, "Map", "Scores", "Worst", "Best")


def test_a_map_of_a_damaged_scene_has_a_report_without_it(tmp_path) -> None:
    scene = tmp_path / "scene.tif"
    pixels = np.random.default_rng(0).integers(1, 255, (3, 128, 128)).astype(np.uint8)
    profile = {"driver": "GTiff", "height": 128, "width": 128, "count": 3, "dtype": "uint8", "crs": "EPSG:32637"}
    with rasterio.open(scene, "w", tiled=True, blockxsize=64, blockysize=64, compress="deflate", **profile) as file:
        file.write(pixels)
    content = bytearray(scene.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = bytes(400)
    scene.write_bytes(content)
    predict(save_segmenter(tmp_path / "m.ckpt"), scene, tmp_path / "map.tif", "--on-error", "skip")
    found = page(tmp_path / "map.html", "Map")
    assert '"name": "image"' not in found.text
