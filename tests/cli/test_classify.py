"""Train, evaluate and predict classes and regression targets of whole images through the real entry point."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from command_line import call
from PIL import Image

import perf_vit
from perf_vit.config import load_config
from perf_vit.errors import DataWarning
from perf_vit.inference import ClassificationPredictor
from perf_vit.models import load_classifier
from perf_vit.workflows.classification import build_classification_data, build_classification_task
from perf_vit.workflows.run_config import ClassificationRun
from perf_vit.workflows.train import read_run

BASE = """
out: ???
data:
  train: {image: "???"}
  tile_px: 32
  batch_size: 4
  val_share: 0.25
model:
  backbone: performer_vit_tiny_patch16_224
  backbone_kwargs: {depth: 1, embed_dim: 64, num_heads: 2, attn_kwargs: {num_features: 16}}
  pool: avg
optim: {lr: 0.005}
trainer: {max_epochs: 4, accelerator: cpu, report: false}
"""
KINDS = ("field", "sea", "town")


def write_image(path: Path, kind: int, rng: np.random.Generator) -> None:
    """A raster of two bands, 37 x 45 px; its kind decides which band is bright."""
    pixels = rng.normal(100, 10, (2, 37, 45)).astype(np.float32)
    pixels[: (0, 1, 2)[kind]] += 80
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "height": 37, "width": 45, "count": 2, "dtype": "float32", "crs": "EPSG:32636"}
    with rasterio.open(path, "w", transform=rasterio.Affine(1, 0, 5e5, 0, -1, 4e6), **profile) as file:
        file.write(pixels)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "images"
    rng = np.random.default_rng(0)
    for number in range(24):
        write_image(root / KINDS[number % 3] / f"{number}.tif", number % 3, rng)
    return root


@pytest.fixture(scope="module")
def config(folders) -> Path:
    path = folders.parent / "scenes.yaml"
    path.write_text(BASE)
    return path


@pytest.fixture(scope="module")
def run(folders, config) -> Path:
    out = folders.parent / "run"
    args = ["train", config, "task=classification", f"data.train.image={folders}", f"out={out}"]
    assert call(args) == 0
    return out


@pytest.fixture(scope="module")
def table(folders) -> Path:
    """A CSV with two columns of 0 and 1 and one of numbers."""
    path = folders.parent / "table.csv"
    rows = [f"{number}.tif,{number % 3 > 0:d},{number % 3 > 1:d},{number % 3 * 1000 + 5}" for number in range(24)]
    path.write_text("image,first,second,height\n" + "\n".join(rows))
    return path


def test_the_run_folder_holds_config_checkpoints_metrics_and_curve(run) -> None:
    assert load_config(run / "config.yaml", ClassificationRun).model.pool == "avg"
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert len(list((run / "pictures").iterdir())) == 4
    last = list(csv.DictReader((run / "metrics.csv").open()))[-1]
    assert {"train/loss", "val/loss", "val/accuracy", "val/auroc", "val/f1/sea"} <= set(last)
    assert Image.open(run / "loss_curve.png").size[0] > 500
    assert load_classifier(run / "checkpoints" / "best.ckpt").spec.classes == KINDS


def test_evaluation_prints_classes_and_writes_scores_and_confusion_matrix(run, folders, tmp_path, capsys) -> None:
    report = tmp_path / "new" / "scores.json"
    checkpoint = run / "checkpoints" / "best.ckpt"
    assert call(["evaluate", "--checkpoint", checkpoint, "--input", folders, "--json", report]) == 0
    assert "town" in capsys.readouterr().out
    scores = json.loads(report.read_text())
    assert scores["accuracy"] > 0.9
    assert np.sum(scores["confusion"]) == 24
    assert np.trace(scores["confusion"]) == round(scores["accuracy"] * 24)
    assert Image.open(report.with_suffix(".png")).size[0] > 200
    assert Image.open(report.with_name("scores_precision_recall.png")).size[0] > 200
    assert "precision_recall" not in scores


def test_prediction_writes_a_row_an_image(run, folders, tmp_path) -> None:
    out = tmp_path / "found.csv"
    args = ["predict", "--checkpoint", run / "checkpoints" / "best.ckpt", "--input", folders, "--output", out]
    assert call([*args, "--batch-size", "5"]) == 0
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 24
    assert list(rows[0]) == ["image", "prediction", *KINDS]
    assert sum(float(rows[0][kind]) for kind in KINDS) == pytest.approx(1, abs=1e-4)
    right = [Path(row["image"]).parent.name == row["prediction"] for row in rows]
    assert np.mean(right) > 0.9


def test_an_image_that_cant_be_read_stops_or_is_a_row_with_its_error(run, folders, tmp_path, capsys) -> None:
    bad = tmp_path / "bad.tif"
    bad.write_bytes(b"no image")
    good, out = folders / "sea" / "1.tif", tmp_path / "found.csv"
    args = ["predict", "--checkpoint", run / "checkpoints" / "best.ckpt", "--input", bad, "--input", good]
    assert call([*args, "--output", out]) == 2
    assert not out.exists()
    assert str(bad) in capsys.readouterr().err
    assert call([*args, "--output", out, "--on-error", "skip"]) == 0
    rows = list(csv.DictReader(out.open()))
    assert str(bad) in rows[0]["error"]
    assert rows[0]["prediction"] == ""
    assert rows[1]["error"] == ""


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--output", "found.tif"], "must end in .csv"),
        (["--output", "found.csv", "--flips"], "--flips is not for a"),
        (["--output", "found.csv", "--overlap", "3"], "--overlap is not for a"),
    ],
)
def test_options_of_maps_are_refused(run, folders, extra, message, capsys) -> None:
    args = ["predict", "--checkpoint", run / "checkpoints" / "best.ckpt", "--input", folders]
    assert call([*args, *extra]) == 2
    assert message in capsys.readouterr().err


def test_several_classes_an_image_train_evaluate_and_predict(folders, config, table, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    labels = [f"data.train.image={folders}", f"data.train.labels={table}", f"out={out}"]
    more = [
        "data.multilabel=true",
        "data.classes=[first,second]",
        "trainer.max_epochs=6",
        "trainer.val_every_epochs=9",
        "optim.lr=0.01",
    ]
    assert call(["train", config, "task=classification", *labels, *more]) == 0
    checkpoint, report = out / "checkpoints" / "best.ckpt", tmp_path / "scores.json"
    assert call(["evaluate", "--checkpoint", checkpoint, "--input", folders, "--labels", table, "--json", report]) == 0
    scores = json.loads(report.read_text())
    assert scores["confusion"] is None
    assert [each["num_images"] for each in scores["classes"]] == [16, 8]
    assert scores["auroc"] > 0.9
    assert all(each["average_precision"] > 0.8 for each in scores["classes"])
    assert Image.open(report.with_name("scores_precision_recall.png")).size[0] > 200
    assert not report.with_suffix(".png").exists()
    found = tmp_path / "found.csv"
    assert call(["predict", "--checkpoint", checkpoint, "--input", folders, "--output", found]) == 0
    assert {row["predictions"] for row in csv.DictReader(found.open())} <= {"", "first", "second", "first;second"}


def test_numbers_are_estimated_in_their_unit(folders, config, table, tmp_path) -> None:
    out = tmp_path / "run"
    labels = [f"data.train.image={folders}", f"data.train.labels={table}", f"out={out}"]
    more = [
        "data.targets=[height]",
        "data.resize=true",
        "trainer.max_epochs=6",
        "trainer.val_every_epochs=9",
        "optim.lr=0.01",
    ]
    assert call(["train", config, "task=regression", *labels, *more]) == 0
    checkpoint, report = out / "checkpoints" / "best.ckpt", tmp_path / "scores.json"
    assert call(["evaluate", "--checkpoint", checkpoint, "--input", folders, "--labels", table, "--json", report]) == 0
    (height,) = json.loads(report.read_text())["targets"]
    assert height["r2"] > 0.8
    assert height["mae"] < 400
    found = tmp_path / "found.csv"
    assert call(["predict", "--checkpoint", checkpoint, "--input", folders / "town", "--output", found]) == 0
    heights = [float(row["height"]) for row in csv.DictReader(found.open())]
    assert np.mean(heights) == pytest.approx(2005, abs=500)


def test_options_of_classes_are_refused_for_numbers(folders, config, table, tmp_path, capsys) -> None:
    labels = [f"data.train.image={folders}", f"data.train.labels={table}", f"out={tmp_path / 'run'}"]
    numbers = ["task=regression", "data.targets=[height]", "data.crop=true"]
    assert call(["train", config, *numbers, *labels, "optim.label_smoothing=0.1"]) == 2
    assert "for classification, not regression" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=classify"], "task must be one of segmentation"),
        (["task=classification", "data.classes=[field,sea,twon]"], "did you mean twon?"),
        (["task=classification", "data.tile_px=33"], "multiple of the patch size 16"),
        (["task=classification", "model.pool=mean"], "model.pool must be one of token"),
        (["task=classification", "data.batch_size=100"], "data.batch_size must be at most the 18 tiles"),
        (["task=classification", "data.multilabel=true", "data.classes=[a]"], "needs a CSV file"),
        (["task=regression", "data.targets=[height]"], "regression needs a CSV file"),
        (["task=classification", "optim.class_weights=[1,2]"], "one weight a class"),
    ],
)
def test_a_config_that_doesnt_fit_is_one_line_and_leaves_nothing(
    folders, config, tmp_path, overrides, message, capsys
) -> None:
    out = tmp_path / "run"
    assert call(["train", config, f"data.train.image={folders}", f"out={out}", *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_constant_number_is_named_and_has_std_1(folders, config, tmp_path, capsys) -> None:
    rows = [f"{path.relative_to(folders)},{0.1},{number}" for number, path in enumerate(sorted(folders.rglob("*.tif")))]
    (tmp_path / "numbers.csv").write_text("image,depth,height\n" + "\n".join(rows))
    files = [f"data.train.image={folders}", f"data.train.labels={tmp_path / 'numbers.csv'}", f"out={tmp_path / 'run'}"]
    options = ["task=regression", "data.targets=[depth,height]", "data.crop=true", "trainer.max_epochs=1"]
    assert call(["train", config, *options, *files]) == 0
    spec = load_classifier(tmp_path / "run" / "checkpoints" / "last.ckpt").spec
    assert spec.target_std[0] == 1
    assert spec.target_std[1] > 3
    printed = " ".join("".join(capsys.readouterr()).split())
    assert "the target depth (std" in printed
    assert "the target height (std" not in printed


def test_without_r2_the_best_checkpoint_has_the_lowest_loss(folders, config, tmp_path) -> None:
    places = sorted((folders / "sea").glob("*.tif"))[:5]
    train, val = tmp_path / "train.csv", tmp_path / "val.csv"
    train.write_text("image,height\n" + "\n".join(f"{path},{index}" for index, path in enumerate(places[:4])))
    val.write_text(f"image,height\n{places[4]},2")
    overrides = {
        "task": "regression",
        "data.train.image": str(folders),
        "data.train.labels": str(train),
        "data.val": {"image": str(folders), "labels": str(val)},
        "data.targets": ["height"],
        "data.crop": True,
        "optim.lr": 0.05,
        "trainer.max_epochs": 5,
        "trainer.num_pictures": 0,
    }
    with pytest.warns(DataWarning, match=r"R2 is undefined, so best\.ckpt has the lowest val/loss"):
        run = perf_vit.train(config, overrides, out=tmp_path / "run", progress=False)
    rows = [row for row in run.metrics if row["epoch"] > 0]
    assert not any("val/r2" in row for row in rows)
    losses = [row["val/loss"] for row in rows]
    assert losses[0] > min(losses)
    stored = torch.load(run.best, weights_only=False)
    assert stored["epoch"] == losses.index(min(losses))
    assert "val/negative_loss" in run.report().read_text()


def test_without_any_class_in_validation_the_loss_chooses(folders, config, table, tmp_path) -> None:
    places = sorted((folders / "sea").glob("*.tif"))
    (tmp_path / "val.csv").write_text("image,first,second\n" + "\n".join(f"{path},0,0" for path in places))
    overrides = {
        "data.train": {"image": str(folders), "labels": str(table)},
        "data.val": {"image": str(folders), "labels": str(tmp_path / "val.csv")},
        "data.classes": ["first", "second"],
        "data.multilabel": True,
    }
    run = read_run(config, overrides | {"task": "classification"}, tmp_path / "run")
    with pytest.warns(DataWarning, match=r"none of 8 validation images has a class: F1 is undefined, so best\.ckpt"):
        task = build_classification_task(run, build_classification_data(run))
    assert task.monitor == "val/negative_loss"


class KilledError(BaseException):
    pass


def interrupt_reading(patch, after: int) -> list[str]:
    """Names of images in the order that prediction opens them; the one after so many kills the process."""
    opened: list[str] = []

    read_input = ClassificationPredictor.read_input

    def read_counted(self, path):
        if len(opened) == after:
            raise KilledError
        opened.append(Path(path).name)
        return read_input(self, path)

    patch.setattr(ClassificationPredictor, "read_input", read_counted)
    # Several threads would count at once.
    patch.setattr(ClassificationPredictor, "num_readers", 1)
    return opened


def predict_args(run: Path, images: Path, out: Path, *extra: str) -> list:
    return ["predict", "--checkpoint", run / "checkpoints" / "best.ckpt", "--input", images, "--output", out, *extra]


def test_a_killed_prediction_goes_on_with_the_images_that_were_left(run, folders, tmp_path, monkeypatch) -> None:
    assert call(predict_args(run, folders, tmp_path / "whole.csv")) == 0
    out = tmp_path / "found.csv"
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        interrupt_reading(patch, after=20)
        call(predict_args(run, folders, out))
    with monkeypatch.context() as patch:
        opened = interrupt_reading(patch, after=-1)
        assert call(predict_args(run, folders, out)) == 0
    # A row may be lost that was being computed or written.
    assert 4 <= len(opened) <= 6
    assert out.read_text() == (tmp_path / "whole.csv").read_text()


def test_an_image_that_cant_be_read_costs_no_row_before_it(run, folders, tmp_path, monkeypatch) -> None:
    images = shutil.copytree(folders, tmp_path / "images")
    bad = images / "town" / "8.tif"
    content = bad.read_bytes()
    bad.write_bytes(b"no raster")
    out = tmp_path / "found.csv"
    assert call(predict_args(run, images, out)) == 2
    bad.write_bytes(content)
    with monkeypatch.context() as patch:
        opened = interrupt_reading(patch, after=-1)
        assert call(predict_args(run, images, out)) == 0
    assert "8.tif" in opened
    assert len(opened) < 24
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 24
    assert all(row["prediction"] for row in rows)
