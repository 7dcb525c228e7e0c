"""Distillation through the real entry point."""

import csv
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from command_line import call
from PIL import Image
from safetensors.torch import load_file, save_file

import perf_vit
from perf_vit.config import load_config
from perf_vit.workflows.run_config import DistillationRun

KWARGS = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 64, "num_classes": 0}
OPTIONS = {"max_exact_tokens": 0, "window_size": 2, "num_sinks": 0, "num_clusters": 3}


def _yaml(values: dict) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}"


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **KWARGS)
    # Sharp attention, as pretrained models have it.
    state = {name: value * 8 if name.endswith("qkv.weight") else value for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.fixture
def scenes(make_scene):
    """Smooth blobs of colour: an image to train on, another to validate on."""
    made = []
    for seed in range(2):
        coarse = np.random.default_rng(seed).integers(1, 255, (16, 20, 3), dtype=np.uint8)
        pixels = np.asarray(Image.fromarray(coarse).resize((200, 160), Image.Resampling.BILINEAR))
        made.append(make_scene(pixels=np.ascontiguousarray(pixels.transpose(2, 0, 1))))
    return made


@pytest.fixture
def args(weights, scenes):
    def _args(out, *extra: str) -> list[str]:
        return [
            "distill",
            "configs/distillation/vit_small_dinov2.yaml",
            f"out={out}",
            "model.backbone=vit_tiny_patch16_224",
            f"model.weights={weights}",
            f"model.backbone_kwargs={_yaml(KWARGS)}",
            f"model.options={_yaml(OPTIONS)}",
            f"data.train.image=[{scenes[0]}]",
            f"data.val.image=[{scenes[1]}]",
            "data.tile_px=64",
            "data.batch_size=2",
            "data.num_val_tiles=4",
            "optim.block_steps=20",
            "optim.block_lr=0.001",
            "optim.token_steps=6",
            "optim.max_minutes=null",
            "trainer.val_every_steps=6",
            *extra,
        ]

    return _args


def _rows(folder) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").open()))


def _last(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def _best(folder) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("student."): value for name, value in state.items()}


def test_a_run_leaves_a_student_that_is_nearer_to_its_teacher(args, weights, tmp_path) -> None:
    out = tmp_path / "run"
    assert call(args(out)) == 0
    assert load_config(out / "config.yaml", DistillationRun).model.options == OPTIONS
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert Image.open(out / "loss_curve.png").size[0] > 500
    rows = _rows(out)
    # 26 steps: before any, after 6, 12, 18, 24 and at the end.
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    wrong = [1 - float(row["val/patch_cosine"]) for row in rows]
    assert wrong[-1] < 0.9 * wrong[0]
    assert float(rows[3]["train/block_loss"]) < float(rows[1]["train/block_loss"])
    assert rows[1]["train/token_loss"] == ""
    assert rows[-1]["train/block_loss"] == ""
    assert float(rows[-1]["train/token_loss"]) > 0
    assert all("val/class_cosine" in row for row in rows)
    student = perf_vit.conversion.load_converted(out / "student")
    assert student.blocks[0].attn.options.num_clusters == 3
    state = student.state_dict()
    assert all(torch.equal(state[name], value) for name, value in _best(out).items())
    teacher = timm.create_model("vit_tiny_patch16_224", **KWARGS)
    teacher.load_state_dict(load_file(weights))
    # Only attention has trained.
    changed = {name for name, value in teacher.state_dict().items() if not torch.equal(value, state[name])}
    assert {"blocks.0.attn.qkv.weight", "blocks.1.attn.proj.weight", "blocks.1.norm1.weight"} <= changed
    assert all(name.split(".")[2] in ("attn", "norm1") for name in changed)


@pytest.mark.slow
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(args, tmp_path) -> None:
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    assert call(args(whole)) == 0
    script = (
        "import lightning, sys; from perf_vit.cli.main import run\n"
        "class Stop(lightning.Callback):\n"
        "    def on_train_batch_start(self, trainer, module, batch, batch_idx):\n"
        "        if trainer.global_step == 15: raise KeyboardInterrupt\n"
        "import perf_vit.tasks.distillation as t; kept = t.best_and_last\n"
        "t.best_and_last = lambda *a, **k: [*kept(*a, **k), Stop()]\n"
        "run(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, *args(interrupted)]
    subprocess.run(command, capture_output=True, check=False)
    assert len(_rows(interrupted)) == 3
    assert not (interrupted / "student").exists()
    assert call(args(interrupted, "resume=true")) == 0
    first, second = _last(whole), _last(interrupted)
    assert first.keys() == second.keys()
    assert all(name.startswith("student.") for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (whole / "metrics.csv").read_text() == (interrupted / "metrics.csv").read_text()


def test_a_saved_student_can_be_trained_on(args, weights, tmp_path, capsys) -> None:
    teacher = timm.create_model("vit_tiny_patch16_224", **KWARGS)
    teacher.load_state_dict(load_file(weights))
    perf_vit.save_converted(perf_vit.linearize(teacher, **{**OPTIONS, "num_sinks": 3}), tmp_path / "converted")
    start = f"model.student={tmp_path / 'converted'}"
    assert call(args(tmp_path / "run", start, "optim.block_steps=6", "optim.token_steps=0")) == 0
    student = perf_vit.conversion.load_converted(tmp_path / "run" / "student")
    assert student.blocks[0].attn.options.num_sinks == 3
    assert not torch.equal(student.blocks[0].attn.qkv.weight, teacher.blocks[0].attn.qkv.weight)
    assert call(args(tmp_path / "other", f"model.student={tmp_path / 'run'}")) == 2
    assert "config.json" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_run_that_is_short_of_time_still_ends_its_schedule(args, tmp_path) -> None:
    out = tmp_path / "run"
    assert call(args(out, "optim.block_steps=100000", "optim.token_steps=100000", "optim.max_minutes=0.05")) == 0
    rows = _rows(out)
    # Both stages had their share of the time, and the rate has come down.
    assert rows[1]["train/block_loss"]
    assert rows[-1]["train/token_loss"]
    assert float(rows[-1]["lr"]) < 0.2 * 1e-5
    assert (out / "student" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.train.image=[]", "image must be a file"),
        ("data.train.image=[nowhere]", "no image file or folder nowhere"),
        ("data.tile_px=60", "multiple of the patch size 8, got 60; try 64"),
        ("data.tile_px=192", "160 x 200"),
        ("data.mean=[0,0,0]", "go together"),
        ("model.backbone=vit_tinny", "timm has no model vit_tinny"),
        ("model.weights=nowhere.pth", "no weights file nowhere.pth"),
        ("model.backbone_kwargs.embed_dim=32", "doesn't fit vit_tiny_patch16_224"),
        ("model.options.windows=3", "window"),
        ("model.options.max_exact_tokens=64", "data.tile_px must be above 64, up to which the student's attention is"),
        ("model.mixer=softmax", "is an option of mixer='clustered', got mixer='softmax'"),
        ("optim.trainable=mlp", "attention, all"),
        ("optim.lr=1", "Key 'lr' not in 'optim'"),
        ("trainer.precision=8", "32-true"),
        ("resume=true", "doesn't exist"),
    ],
)
def test_what_a_user_can_do_wrong_is_one_line(args, tmp_path, capsys, change: str, message: str) -> None:
    assert call(args(tmp_path / "out", change)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert [line for line in lines if line.startswith("Error: ")] == lines[-1:]
    assert message in lines[-1]
    assert not (tmp_path / "out").exists()


def test_images_of_sixteen_bits_need_their_own_statistics(args, make_scene, tmp_path, capsys) -> None:
    image = make_scene(dtype="uint16", height=100, width=100)
    files = [f"data.train.image=[{image}]", f"data.val.image=[{image}]", "optim.block_steps=2", "optim.token_steps=0"]
    assert call(args(tmp_path / "out", *files)) == 2
    assert "8-bit images" in capsys.readouterr().err
    statistics = ["data.mean=[15000,15000,15000]", "data.std=[8000,8000,8000]"]
    assert call(args(tmp_path / "out", *files, *statistics)) == 0
