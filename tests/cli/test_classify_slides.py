"""Train, evaluate and predict classes of whole slides through the real entry point."""

import contextlib
import csv
import json
import os
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from command_line import call
from encoder_weights import save_encoder
from PIL import Image
from synthetic_slide import make_slide

from perf_vit.config import load_config
from perf_vit.errors import DataWarning, InputError
from perf_vit.inference import SlideClassificationPredictor
from perf_vit.models import load_slide_classifier
from perf_vit.plotting import tissue_picture
from perf_vit.sources import find_images
from perf_vit.workflows.run_config import SlideClassificationRun

CONFIG = """
out: ???
task: slide_classification
data:
  train: {image: "???", labels: "???"}
  mpp: 1.0
  slide_mpp: 0.5
  tile_px: 32
  min_tissue: 0.2
  max_windows: 6
  batch_size: 2
  val_share: 0.4
model:
  backbone: performer_vit_tiny_patch16_224
  backbone_kwargs: {depth: 1, embed_dim: 64, num_heads: 2, attn_kwargs: {num_features: 16}}
  weights: WEIGHTS
  pool: avg
  hidden_dim: 32
  attention_dim: 16
optim: {lr: 0.01}
trainer: {max_epochs: 8, accelerator: cpu, val_every_epochs: 9, report: false}
"""
PER_CLASS = 5


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    """Slides of 640 x 600 px with small or large nuclei, and their CSV file."""
    root = tmp_path_factory.mktemp("slides")
    rows = []
    for number in range(2 * PER_CLASS):
        mpp = 0.5 if number % 2 else 0.15
        path = make_slide(root / f"s{number}.svs", 640, 600, mpp=mpp, tile_px=64, tissue_share=0.5, seed=number)
        # The config says how large pixels are where the file doesn't, so only the nuclei differ.
        path.write_bytes(path.read_bytes().replace(b"|MPP = ", b"|XXX = "))
        rows.append(f"s{number}{'.svs' if number < 3 else ''},{'small' if number % 2 else 'large'}")
    (root / "labels.csv").write_text("slide,label\n" + "\n".join(rows))
    weights = save_encoder(root / "encoder.safetensors")
    (root / "slides.yaml").write_text(CONFIG.replace("WEIGHTS", str(weights)))
    return root


def train_args(slides: Path, out: Path, *extra: str) -> list:
    files = [f"data.train.labels={slides / 'labels.csv'}", f"data.train.image={slides}", f"out={out}"]
    return ["train", slides / "slides.yaml", *files, *extra]


@pytest.fixture(scope="module")
def run(slides) -> Path:
    out = slides / "run"
    assert call(train_args(slides, out)) == 0
    return out


def test_the_run_folder_holds_config_checkpoints_metrics_and_a_file_of_features_a_slide(run) -> None:
    assert load_config(run / "config.yaml", SlideClassificationRun).model.hidden_dim == 32
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert {"train/loss", "val/auroc", "val/f1/large"} <= set(next(csv.DictReader((run / "metrics.csv").open())))
    features = sorted((run / "embeddings").glob("*.npz"))
    assert len(features) == 2 * PER_CLASS
    pictures = sorted((run / "embeddings").glob("*.png"))
    assert [path.stem for path in pictures] == [path.stem for path in features]
    with closing(load_slide_classifier(run / "checkpoints" / "best.ckpt").spec.open(run.parent / "s0.svs")) as source:
        assert np.array_equal(np.asarray(Image.open(pictures[0])), tissue_picture(source))
    with np.load(features[0]) as file:
        assert file["features"].shape == (len(file["windows"]), 64)
    spec = load_slide_classifier(run / "checkpoints" / "best.ckpt").spec
    assert spec.classes == ("large", "small")
    # ImageNet's, as slides are red, green and blue.
    assert spec.normalizer.mean[0] == pytest.approx(127.5, abs=5)


def test_features_are_computed_once(slides, run, tmp_path) -> None:
    shared = tmp_path / "features"
    os.symlink(run / "embeddings", shared)
    before = {path.name: path.stat().st_mtime_ns for path in shared.iterdir()}
    assert call(train_args(slides, tmp_path / "again", f"data.embeddings={shared}", "trainer.max_epochs=1")) == 0
    assert {path.name: path.stat().st_mtime_ns for path in shared.iterdir()} == before
    assert not (tmp_path / "again" / "embeddings").exists()


def test_damaged_features_are_named(slides, run, tmp_path, capsys) -> None:
    shared = tmp_path / "features"
    shared.mkdir()
    for path in (run / "embeddings").glob("*.npz"):
        (shared / path.name).write_bytes(path.read_bytes()[:200])
    assert call(train_args(slides, tmp_path / "again", f"data.embeddings={shared}")) == 2
    assert "is damaged" in capsys.readouterr().err


def test_slides_without_features_are_reported_after_all_others(slides, run, tmp_path, capsys) -> None:
    root = tmp_path / "slides"
    shutil.copytree(slides, root, ignore=shutil.ignore_patterns("run"))
    broken = [root / "s4.svs", root / "s7.svs"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:4000])
    assert call(train_args(root, tmp_path / "stopped", f"data.embeddings={tmp_path / 'e'}")) == 2
    said = capsys.readouterr().err
    assert "2 of 10 slides have no features" in said
    assert all(f"failed: {path}" in said.replace("can't open ", "") or str(path) in said for path in broken)
    assert len(list((tmp_path / "e").glob("*.npz"))) == 2 * PER_CLASS - 2
    skip = ["data.on_error=skip", f"data.embeddings={tmp_path / 'e'}", "trainer.max_epochs=1"]
    assert call(train_args(root, tmp_path / "skipped", *skip)) == 0
    assert (tmp_path / "skipped" / "checkpoints" / "best.ckpt").is_file()


def test_a_run_resumes(slides, tmp_path) -> None:
    out = tmp_path / "run"
    assert call(train_args(slides, out, "trainer.max_epochs=2")) == 0
    assert call(train_args(slides, out, "trainer.max_epochs=4", "resume=true")) == 0
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]


def test_evaluation_prints_classes_and_writes_scores_and_confusion_matrix(run, slides, tmp_path, capsys) -> None:
    report = tmp_path / "scores.json"
    args = ["evaluate", "--checkpoint", run / "checkpoints" / "best.ckpt", "--input", slides]
    assert call([*args, "--labels", slides / "labels.csv", "--json", report]) == 0
    assert "large" in capsys.readouterr().out
    scores = json.loads(report.read_text())
    assert scores["auroc"] > 0.9
    assert np.sum(scores["confusion"]) == 2 * PER_CLASS
    assert Image.open(report.with_suffix(".png")).size[0] > 200
    assert Image.open(report.with_name("scores_precision_recall.png")).size[0] > 200
    assert call(args) == 2
    assert "needs --labels to be scored" in capsys.readouterr().err


def test_prediction_writes_probabilities_and_attention_in_pixels_of_level_0(run, slides, tmp_path) -> None:
    out = tmp_path / "new" / "found.csv"
    args = ["predict", "--checkpoint", run / "checkpoints" / "best.ckpt", "--output", out, "--batch-size", "4"]
    assert call([*args, "--input", slides / "s0.svs", "--input", slides / "s1.svs"]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [row["prediction"] for row in rows] == ["large", "small"]
    assert float(rows[0]["large"]) + float(rows[0]["small"]) == pytest.approx(1, abs=1e-4)
    folder = tmp_path / "new" / "found_attention"
    assert {path.name for path in folder.iterdir()} == {"s0.png", "s0.geojson", "s1.png", "s1.geojson", "tissue"}
    assert {path.name for path in (folder / "tissue").iterdir()} == {"s0.png", "s1.png"}
    with closing(load_slide_classifier(run / "checkpoints" / "best.ckpt").spec.open(slides / "s1.svs")) as source:
        assert np.array_equal(np.asarray(Image.open(folder / "tissue" / "s1.png")), tissue_picture(source))
    found = json.loads((folder / "s0.geojson").read_text())["features"]
    assert len(found) == int(rows[0]["windows"])
    scores = [each["properties"]["measurements"]["score"] for each in found]
    assert max(scores) == 1
    assert min(scores) >= 0
    corners = np.array([each["geometry"]["coordinates"][0] for each in found])
    picture = np.asarray(Image.open(folder / "s0.png"))
    # The title is black on white above the slide, and the bar beside it goes from red to blue.
    assert (picture[:40] == 0).all(-1).any()
    bar = picture[40:, -220:].reshape(-1, 3).astype(int)
    assert (bar[:, 0] - bar[:, 2] > 100).any()
    assert (bar[:, 2] - bar[:, 0] > 100).any()
    # A window of 32 px at 1 um is 64 px of level 0 wide.
    assert np.ptp(corners[..., 0], axis=1) == pytest.approx(64, abs=0.1)
    assert corners[..., 0].max() <= 600.1


def test_a_slide_that_cant_be_read_is_a_row_with_its_error_if_asked_for(run, slides, tmp_path, capsys) -> None:
    bad, out = tmp_path / "bad.svs", tmp_path / "found.csv"
    bad.write_bytes(b"no slide")
    args = ["predict", "--checkpoint", run / "checkpoints" / "best.ckpt", "--output", out]
    args += ["--input", bad, "--input", slides / "s1.svs"]
    assert call(args) == 2
    assert str(bad) in capsys.readouterr().err
    assert call([*args, "--on-error", "skip"]) == 0
    rows = list(csv.DictReader(out.open()))
    assert rows[0]["prediction"] == ""
    assert str(bad) in rows[0]["error"]
    assert rows[1]["prediction"] == "small"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train.labels=none.csv"], "no such file: none.csv"),
        (["data.label_column=kind"], "has no column kind"),
        (["data.classes=[large,tiny]"], "unknown class 'small'"),
        (["data.train.image=."], "check data.train.image"),
        (["data.tile_px=33"], "multiple of the patch size 16"),
        (["data.tissue=hand"], "otsu or null"),
        (["data.val_share=2"], "between 0 and 1"),
        (["data.mean=[1,2,3]"], "data.mean and data.std go together"),
        (["data.mean=[1,2]", "data.std=[1,2]"], "one value for each of 3 bands"),
        (["model.pool=map"], "trainable weights"),
        (["trainer.redraw_every_steps=3"], "would change the encoder"),
    ],
)
def test_a_config_that_doesnt_fit_is_one_line_and_leaves_nothing(slides, tmp_path, overrides, message, capsys) -> None:
    out = tmp_path / "run"
    assert call(train_args(slides, out, *overrides)) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_slide_without_tissue_is_named(run, tmp_path, capsys) -> None:
    glass = make_slide(tmp_path / "glass.svs", 640, 600, tile_px=64, tissue_share=0)
    args = ["predict", "--checkpoint", run / "checkpoints" / "best.ckpt", "--output", tmp_path / "found.csv"]
    assert call([*args, "--input", glass]) == 2
    message = capsys.readouterr().err
    assert "glass.svs" in message
    assert "tissue" in message


def test_statistics_that_the_config_gives_are_those_of_the_classifier(slides, run, tmp_path) -> None:
    statistics = ["data.mean=[200,150,180]", "data.std=[40,50,60]", "trainer.max_epochs=1"]
    assert call(train_args(slides, tmp_path / "run", *statistics)) == 0
    given, default = (
        load_slide_classifier(path / "checkpoints" / "last.ckpt").spec for path in (tmp_path / "run", run)
    )
    assert (given.normalizer.mean, given.normalizer.std) == ((200, 150, 180), (40, 50, 60))
    assert default.normalizer != given.normalizer
    assert default.trained_on == given.trained_on


@pytest.mark.parametrize("folder", ["given", "of training"])
def test_one_slide_on_both_sides_is_refused(slides, tmp_path, capsys, folder) -> None:
    val = [f"data.val.labels={slides / 'labels.csv'}", *([f"data.val.image={slides}"] if folder == "given" else [])]
    assert call(train_args(slides, tmp_path / "run", *val)) == 2
    assert "in both data.train and data.val" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.num_pictures=3", "trainer.num_pictures must be 0: a slide is a bag of windows"),
        ("optim.layer_decay=0.7", "are of trained encoders"),
        ("data.augment={gain: 0.1}", "data.augment would change windows whose features are made once"),
    ],
)
def test_options_that_bags_of_features_have_no_use_for_are_refused(slides, tmp_path, override, message, capsys) -> None:
    assert call(train_args(slides, tmp_path / "out", override)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class KilledError(BaseException):
    pass


@pytest.fixture(scope="module")
def three_slides(run, slides, tmp_path_factory) -> tuple[list, str]:
    """The command line that predicts three slides, up to the output, and the table that it writes."""
    inputs = [part for number in range(3) for part in ("--input", slides / f"s{number}.svs")]
    args = ["predict", "--checkpoint", run / "checkpoints" / "best.ckpt", *inputs, "--output"]
    whole = tmp_path_factory.mktemp("whole") / "whole.csv"
    assert call([*args, whole]) == 0
    return args, whole.read_text()


@pytest.mark.parametrize("end", [KilledError(), InputError("damaged")], ids=["killed", "damaged"])
def test_a_prediction_that_ends_early_goes_on_with_the_slides_that_were_left(
    three_slides, tmp_path, monkeypatch, end
) -> None:
    args, whole = three_slides
    embed, embedded = SlideClassificationPredictor.embed, []

    def embed_some(self, path, *args):
        if len(embedded) == 2:
            raise end
        embedded.append(path)
        return embed(self, path, *args)

    with monkeypatch.context() as patch, contextlib.suppress(KilledError):
        patch.setattr(SlideClassificationPredictor, "embed", embed_some)
        call([*args, tmp_path / "found.csv"])
    assert len(embedded) == 2
    again = []
    monkeypatch.setattr(
        SlideClassificationPredictor, "embed", lambda self, path, *args: again.append(path) or embed(self, path, *args)
    )
    assert call([*args, tmp_path / "found.csv"]) == 0
    assert (tmp_path / "found.csv").read_text() == whole
    assert len(again) == 1


def test_pictures_of_an_earlier_prediction_in_the_folder_of_slides_are_no_slides(run, slides, tmp_path) -> None:
    for number in range(2):
        shutil.copy(slides / f"s{number}.svs", tmp_path)
    checkpoint, output = run / "checkpoints" / "best.ckpt", tmp_path / "found.csv"
    args = ["predict", "--checkpoint", checkpoint, "--input", tmp_path, "--output", output]
    assert call(args) == 0
    before = output.read_text()
    assert call([*args, "--overwrite"]) == 0
    assert output.read_text() == before
    with pytest.warns(DataWarning, match="4 of 6 images found are outputs of perf_vit"):
        assert [path.name for path in find_images([tmp_path])] == ["s0.svs", "s1.svs"]
