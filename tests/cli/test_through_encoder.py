"""Slide classifiers that are trained through their encoder: train, resume, load, predict and evaluate."""

import csv
import json
import logging
import shutil
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
from command_line import call
from lightning.pytorch.callbacks.progress.rich_progress import CustomProgress
from rich.text import Text
from safetensors.torch import save_file
from synthetic_slide import make_slide

import perf_vit
from perf_vit.config import load_config
from perf_vit.data.slide_windows import SlideWindows
from perf_vit.models import load_slide_classifier, tissue_windows
from perf_vit.tasks import through_encoder
from perf_vit.tasks.callbacks import EpochProgressBar
from perf_vit.workflows.run_config import SlideClassificationRun

CONFIG = """
out: ???
task: slide_classification
data:
  train: {image: "???", labels: "???"}
  mpp: 1.0
  tile_px: 32
  min_tissue: 0.2
  embed_batch_size: 4
  augment: {flips: true, gain: 0.1}
  val_share: 0.5
model:
  backbone: performer_vit_tiny_patch16_224
  backbone_kwargs: {depth: 1, embed_dim: 32, num_heads: 2, drop_path_rate: 0.2, attn_kwargs: {num_features: 8}}
  pool: avg
  hidden_dim: 16
  attention_dim: 8
  through_encoder: true
optim: {lr: 0.003, schedule: constant, warmup_fraction: 0}
trainer: {max_epochs: 2, accelerator: cpu, report: false, redraw_every_steps: 1}
"""


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    """Slides of 5 x 5 windows, and their CSV file."""
    root = tmp_path_factory.mktemp("slides")
    for number in range(4):
        make_slide(root / f"s{number}.svs", 320, 300, mpp=0.5, tile_px=64, tissue_share=0.5, seed=number)
    rows = "".join(f"s{number},{'ab'[number % 2]}\n" for number in range(4))
    (root / "labels.csv").write_text("slide,label\n" + rows)
    (root / "slides.yaml").write_text(CONFIG)
    return root


def train_args(slides: Path, out: Path, *extra: str) -> list:
    files = [f"data.train.labels={slides / 'labels.csv'}", f"data.train.image={slides}", f"out={out}"]
    return ["train", slides / "slides.yaml", *files, *extra]


@pytest.fixture(scope="module")
def run(slides, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    with patch("perf_vit.workflows.train.wait_for_long_steps") as waits:
        assert call(train_args(slides, out, "trainer.report=true")) == 0
    assert waits.call_count == 1
    return out


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_the_run_keeps_windows_without_features_and_trains_the_encoder(run, slides) -> None:
    assert load_config(run / "config.yaml", SlideClassificationRun).model.through_encoder
    assert not (run / "embeddings").exists()
    files = sorted((run / "windows").glob("*.npz"))
    assert len(files) == len(list((run / "windows").glob("*.png"))) == 4
    with np.load(files[0]) as file:
        assert file["features"].shape == (len(file["windows"]), 0)
    assert [float(row["epoch"]) for row in csv.DictReader((run / "metrics.csv").open())] == [1, 2]
    # Adam's momenta are of parameters that had gradients.
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    moved = [each["exp_avg"] for each in state["optimizer_states"][0]["state"].values()]
    trained = [name for name, _ in load_slide_classifier(run).named_parameters()]
    assert len(moved) == len(trained)
    assert any(name.startswith("encoder.patch_embed") for name in trained)
    assert sum(bool(each.abs().max() > 0) for each in moved) >= len(moved) - 1
    assert "val/accuracy" in (run / "report.html").read_text()


@pytest.mark.slow
def test_a_run_that_is_resumed_has_the_weights_of_one_that_was_not(run, slides, tmp_path) -> None:
    out = tmp_path / "run"
    assert call(train_args(slides, out, "trainer.max_epochs=1")) == 0
    found = {path.name: path.stat().st_mtime_ns for path in (out / "windows").iterdir()}
    assert call(train_args(slides, out, "resume=true")) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (out / "windows").iterdir()} == found
    expected, resumed = weights(run), weights(out)
    assert all(torch.equal(resumed[name], each) for name, each in expected.items())
    assert call(train_args(slides, out, "resume=true", "model.through_encoder=false")) == 2


def test_a_slide_has_the_same_scores_by_all_ways(run, slides, tmp_path) -> None:
    model = perf_vit.load(run)
    assert not any(module.training for module in model.modules())
    table, scores = tmp_path / "found.csv", tmp_path / "scores.json"
    args = ["--checkpoint", run / "checkpoints" / "best.ckpt", "--input", slides]
    assert call(["predict", *args, "--output", table, "--batch-size", "3"]) == 0
    rows = list(csv.DictReader(table.open()))
    assert len(list((tmp_path / "found_attention").glob("*.geojson"))) == 4
    slide = SlideWindows("", np.empty((0, 4), np.int64), model.spec)
    for row in rows:
        slide.path = row["slide"]
        with closing(model.spec.open(slide.path)) as source:
            windows = tissue_windows(source, 32, 0.2)
        slide.rectangles = np.array([[each.row, each.col, each.height, each.width] for each in windows])
        with torch.no_grad():
            expected = model.classify_windows(lambda: slide.batches(5)).softmax(0)
        assert [float(row["a"]), float(row["b"])] == pytest.approx(expected.tolist(), abs=1e-5)
    assert call(["evaluate", *args, "--labels", slides / "labels.csv", "--json", scores]) == 0
    right = [row["prediction"] == "ab"[number % 2] for number, row in enumerate(rows)]
    assert json.loads(scores.read_text())["accuracy"] == pytest.approx(np.mean(right))
    assert not (run / "embeddings").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.embeddings=features"], "data.embeddings keeps features of a frozen encoder"),
        (["trainer.strategy=fsdp2"], "trainer.strategy must be auto or ddp with model.through_encoder, got fsdp2"),
        (["trainer.num_pictures=2"], "trainer.num_pictures must be 0"),
        (["model.backbone=resnet10t", "model.backbone_kwargs={}"], "resnet10t has batch norms, whose statistics stay"),
        (["data.augment.resolution=[0.5,1]"], "data.augment.resolution is not for slide classification"),
        (["data.augment.stain=2"], "data.augment.stain must lie between 0 and 1"),
        (["data.embed_batch_size=0"], "data.embed_batch_size must be at least 1"),
    ],
)
def test_what_doesnt_go_with_it_is_refused_in_one_line(slides, tmp_path, overrides, message, capsys) -> None:
    assert call(train_args(slides, tmp_path / "run", *overrides)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_slide_that_is_gone_ends_the_run_with_its_name(slides, tmp_path, capsys, monkeypatch) -> None:
    root = tmp_path / "slides"
    shutil.copytree(slides, root, ignore=shutil.ignore_patterns("run"))
    reader = through_encoder.ThroughEncoderTask._reader
    numbers = iter(range(100))

    def lose(task, slide):
        read = reader(task, slide)

        def again():
            # The second pass of the first step.
            if next(numbers) == 1:
                Path(slide.path).unlink()
            yield from read()

        return again

    monkeypatch.setattr(through_encoder.ThroughEncoderTask, "_reader", lose)
    assert call(train_args(root, tmp_path / "run")) == 2
    assert "svs" in capsys.readouterr().err


@pytest.mark.slow
def test_slides_without_tissue_are_left_out_if_asked_for(slides, tmp_path, capsys) -> None:
    root = tmp_path / "slides"
    shutil.copytree(slides, root, ignore=shutil.ignore_patterns("run"))
    make_slide(root / "glass.svs", 320, 300, mpp=0.5, tile_px=64, tissue_share=0)
    with (root / "labels.csv").open("a") as file:
        file.write("glass,a\n")
    files = ["data.val.labels=" + str(slides / "labels.csv"), f"data.val.image={slides}", "trainer.max_epochs=1"]
    assert call(train_args(root, tmp_path / "run", *files)) == 2
    assert "1 of 9 slides have no windows, the first:" in capsys.readouterr().err
    assert call(train_args(root, tmp_path / "run", *files, "data.on_error=skip")) == 0


def test_long_slides_have_a_bar_of_their_own_and_log_lines(slides, tmp_path, monkeypatch, caplog) -> None:
    bar = EpochProgressBar()
    bar.progress = CustomProgress(disable=True)
    trainer = SimpleNamespace(progress_bar_callback=bar, is_global_zero=True)
    with caplog.at_level(logging.INFO, "perf_vit"):
        progress = through_encoder._Progress(trainer, "a[b].svs, pass 1 of 2", 9)
        progress.update(4)
        assert not caplog.messages
        monkeypatch.setattr(through_encoder, "_LOG_SECONDS", 0.0)
        progress.update(8)
    assert caplog.messages == ["a[b].svs, pass 1 of 2: 8 of 9 windows"]
    (task,) = bar.progress.tasks
    assert (task.completed, task.total) == (8, 9)
    assert Text.from_markup(task.description).plain == "a[b].svs, pass 1 of 2"
    progress.close()
    assert not bar.progress.tasks


@pytest.mark.slow
def test_pretrained_encoders_with_batch_norms_keep_their_statistics(slides, tmp_path) -> None:
    encoder = tmp_path / "resnet.safetensors"
    save_file(timm.create_model("resnet10t", num_classes=0).state_dict(), encoder)
    model = ["model.backbone=resnet10t", "model.backbone_kwargs={}", f"model.weights={encoder}"]
    assert call(train_args(slides, tmp_path / "run", *model, "trainer.redraw_every_steps=0")) == 0
    found = weights(tmp_path / "run")
    assert all(float(found[name].abs().max()) == 0 for name in found if name.endswith("running_mean"))
