"""Every command, with names of classes, bands, files and folders that break what parses text."""

import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import rasterio
import timm
import torch
import yaml
from command_line import call
from encoder_weights import save_encoder
from nasty_names import NASTY_NAMES, UNSEEN_NAMES
from safetensors.torch import save_file
from synthetic_slide import make_slide

CLASSES = [*NASTY_NAMES, *UNSEEN_NAMES]
FILES = [name for name in NASTY_NAMES if "/" not in name]
FOLDER = "-[red]a,b $x_1$ {x} %s [bold] 漢 🌳 "
BACKBONE = {
    "backbone": "performer_vit_tiny_patch16_224",
    "backbone_kwargs": {"depth": 1, "embed_dim": 64, "num_heads": 2, "attn_kwargs": {"num_features": 16}},
}
TRAINER = {"max_epochs": 1, "accelerator": "cpu", "num_pictures": 1, "report": False}
TILES = {"tile_px": 64, "tiles_per_epoch": 2, "batch_size": 2}
SIDE = 64


@dataclass
class Case:
    """A run that was trained, and what the other commands take."""

    run: Path
    evaluate: list
    predict: list
    names: list[str]
    in_scores: Callable[[dict], list[str]]
    # Maps and objects of half of the names each: an image takes most of the time.
    files: list[str] = field(default_factory=list)


def shown(name: str) -> str:
    return UNSEEN_NAMES.get(name, name)


def run_in(encoding: str, args: list, monkeypatch) -> tuple[int, str, str]:
    """Run a command whose output goes to pipes of an encoding: exit code, stdout and stderr."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        code = call(args)
        for stream in streams:
            stream.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    return code, out, err


def write_raster(path: Path, pixels: np.ndarray, names: list[str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "dtype": pixels.dtype, "crs": "EPSG:32637", "count": len(pixels)}
    transform = rasterio.Affine(2, 0, 401_000, 0, -2, 4_510_000)
    with rasterio.open(path, "w", height=SIDE, width=SIDE, transform=transform, **profile) as file:
        file.write(pixels)
        for band, name in enumerate(names or [], 1):
            file.set_band_description(band, name)
    return path


def train(root: Path, config: dict) -> Path:
    path = root / "[/] config.yaml".replace("/", "")
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    assert call(["train", path]) == 0
    return Path(config["out"])


def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "best.ckpt"


def bands(seed: int, num_bands: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 255, (num_bands, SIDE, SIDE)).astype(np.uint8)


def segmentation(root: Path) -> Case:
    names = FILES[::2]
    files = [
        write_raster(root / "images" / f"{name}.tif", bands(i), ["[/]", "$x_1$", "漢"]) for i, name in enumerate(names)
    ]
    labels = (np.arange(SIDE * SIDE).reshape(1, SIDE, SIDE) // 97 % len(CLASSES)).astype(np.uint8)
    mask = write_raster(root / "masks" / f"{names[0]}.tif", labels)
    split = {"image": str(files[0]), "labels": str(mask)}
    run = train(
        root,
        {
            "out": str(root / "run[/b]".replace("/", "")),
            "data": {
                "train": split,
                "val": split,
                "classes": CLASSES,
                "tile_px": 64,
                "tiles_per_epoch": 2,
                "batch_size": 2,
            },
            "model": {**BACKBONE, "out_indices": [0], "head_kwargs": {"channels": [8, 8, 16, 16]}},
            "trainer": {**TRAINER, "report": True},
        },
    )
    evaluate = ["--input", files[0], "--labels", mask]
    predict = ["--input", root / "images"]
    return Case(run, evaluate, predict, CLASSES, lambda scores: [each["name"] for each in scores["classes"]], names)


def detection(root: Path) -> Case:
    files = FILES[1::2]
    for number, name in enumerate(files):
        write_raster(root / "images" / f"{name}.tif", bands(number))
    rows = [
        [
            f"{files[number % 3]}.tif",
            7 * (number % 7),
            15 * (number // 7),
            7 * (number % 7) + 6,
            15 * (number // 7) + 13,
            name,
        ]
        for number, name in enumerate(CLASSES)
    ]
    with (root / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["image", "xmin", "ymin", "xmax", "ymax", "label"], *rows])
    split = {"image": str(root / "images"), "labels": str(root / "labels.csv"), "label_format": "csv"}
    head = {"head": "fcos", "head_kwargs": {"num_convs": 1, "detections_per_tile": 20}}
    run = train(
        root,
        {
            "out": str(root / "run[/b]".replace("/", "")),
            "task": "detection",
            "data": {
                "train": split,
                "val": split,
                "classes": CLASSES,
                "tile_px": 64,
                "tiles_per_epoch": 2,
                "batch_size": 2,
            },
            "model": {"backbone": "test_resnet", "pretrained": False, "strides": [8, 16], "channels": 64, **head},
            "trainer": TRAINER,
        },
    )
    return Case(
        run,
        ["--input", root / "images", "--labels", root / "labels.csv"],
        ["--input", root / "images", "--score-threshold", "0"],
        CLASSES,
        lambda scores: [each["name"] for each in scores["classes"]],
        files,
    )


def classification(root: Path) -> Case:
    # A class is a folder, a file's name is no class.
    for number, name in enumerate(2 * FILES):
        write_raster(root / "images" / name / f"{FILES[number % 7]}{number}.tif", bands(number))
    run = train(
        root,
        {
            "out": str(root / "run[/b]".replace("/", "")),
            "task": "classification",
            "data": {"train": {"image": str(root / "images")}, "tile_px": 32, "batch_size": 2, "val_share": 0.3},
            "model": {**BACKBONE, "pool": "avg"},
            "trainer": TRAINER,
        },
    )
    predict = ["--input", root / "images"]
    return Case(run, predict, predict, FILES, lambda scores: [each["name"] for each in scores["classes"]])


def regression(root: Path) -> Case:
    names = [name for name in CLASSES if name == name.strip()]
    for number, name in enumerate(FILES):
        write_raster(root / "images" / f"{name}.tif", bands(number))
    with (root / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [[f"{name}.tif", *range(number, number + len(names))] for number, name in enumerate(FILES)]
        csv.writer(file).writerows([["image", *names], *rows])
    run = train(
        root,
        {
            "out": str(root / "run[/b]".replace("/", "")),
            "task": "regression",
            "data": {
                "train": {"image": str(root / "images"), "labels": str(root / "labels.csv")},
                "tile_px": 32,
                "batch_size": 2,
                "val_share": 0.3,
                "targets": names,
                "crop": True,
            },
            "model": {**BACKBONE, "pool": "avg"},
            "trainer": TRAINER,
        },
    )
    return Case(
        run,
        ["--input", root / "images", "--labels", root / "labels.csv"],
        ["--input", root / "images"],
        names,
        lambda scores: [each["name"] for each in scores["targets"]],
    )


def slide(root: Path) -> Case:
    names = FILES[:4]
    slides = root / "images"
    slides.mkdir(parents=True)
    weights = save_encoder(root / "encoder.safetensors")
    for number, name in enumerate(2 * names):
        make_slide(slides / f"{name}{number}.svs", 320, 300, mpp=0.5, tile_px=64, tissue_share=0.6, seed=number)
    with (root / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [[f"{name}{number}.svs", name] for number, name in enumerate(2 * names)]
        csv.writer(file).writerows([["slide", "label"], *rows])
    run = train(
        root,
        {
            "out": str(root / "run[/b]".replace("/", "")),
            "task": "slide_classification",
            "data": {
                "train": {"image": str(slides), "labels": str(root / "labels.csv")},
                "mpp": 1.0,
                "tile_px": 32,
                "max_windows": 4,
                "batch_size": 2,
                "val_share": 0.4,
            },
            "model": {**BACKBONE, "weights": str(weights), "pool": "avg", "hidden_dim": 16, "attention_dim": 8},
            "trainer": {**TRAINER, "num_pictures": 0},
        },
    )
    return Case(
        run,
        ["--input", slides, "--labels", root / "labels.csv"],
        ["--input", slides],
        names,
        lambda scores: [each["name"] for each in scores["classes"]],
    )


TASKS = {each.__name__: each for each in (segmentation, detection, classification, regression, slide)}


@pytest.fixture(scope="module", params=TASKS)
def case(request, tmp_path_factory) -> Case:
    root = tmp_path_factory.mktemp(request.param) / FOLDER
    root.mkdir()
    return TASKS[request.param](root)


# Where text is ASCII, the fast suite prints the scores of one task.
ENCODINGS = ["utf-8", pytest.param("ascii", marks=pytest.mark.slow)]


def test_scores_of_a_task_are_shown_where_text_is_ascii(tmp_path, monkeypatch) -> None:
    root = tmp_path / FOLDER
    root.mkdir()
    test_scores_are_written_and_shown_with_the_names_as_they_are(regression(root), "ascii", tmp_path, monkeypatch)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_scores_are_written_and_shown_with_the_names_as_they_are(case, encoding, tmp_path, monkeypatch) -> None:
    report = tmp_path / FOLDER / "[bold]scores.json"
    args = ["evaluate", "--checkpoint", checkpoint(case.run), *case.evaluate, "--json", report, "--device", "cpu"]
    code, out, err = run_in(encoding, args, monkeypatch)
    assert code == 0, err
    assert "Traceback" not in err
    scores = json.loads(report.read_bytes(), parse_constant=pytest.fail)
    assert sorted(case.in_scores(scores)) == sorted(case.names)
    assert report.with_suffix(".png").exists() or "targets" in scores
    for name in case.names:
        assert shown(name).encode(encoding, errors="backslashreplace").decode(encoding) in out


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_predictions_hold_the_names_as_they_are(case, encoding, tmp_path, monkeypatch) -> None:
    folder = tmp_path / FOLDER
    is_table = any(word in str(case.run) for word in ("classification", "regression", "slide"))
    output = folder / "[bold],out.csv" if is_table else folder
    args = ["predict", "--checkpoint", checkpoint(case.run), *case.predict, "--output", output, "--device", "cpu"]
    if not is_table:
        args += ["--polygons", "geojson"]
    code, out, err = run_in(encoding, args, monkeypatch)
    assert code == 0, err
    assert "Traceback" not in err
    assert str(output).encode(encoding, errors="backslashreplace").decode(encoding) in out
    if is_table:
        with output.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        assert [name for name in header if name in case.names] == [name for name in header if name in set(case.names)]
        assert set(case.names) <= set(header)
        images = [str(path) for path in sorted((case.run.parent / "images").rglob("*.*")) if path.is_file()]
        assert sorted(row[0] for row in rows) == sorted(images)
        return
    report = json.loads((folder / "report.json").read_bytes(), parse_constant=pytest.fail)
    assert {Path(item["input"]).stem for item in report["inputs"]} == set(case.files)
    found = set()
    for name in case.files:
        content = json.loads((folder / f"{name}.geojson").read_bytes(), parse_constant=pytest.fail)
        found |= {feature["properties"]["class"] for feature in content["features"]}
    assert found <= set(CLASSES)
    assert len(found) > 1


def test_a_run_folder_holds_the_names_as_they_are(case) -> None:
    with (case.run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file))
    assert "epoch" in header
    logged = {column.split("/", 2)[2] for column in header if column.startswith(("val/iou/", "val/f1/"))}
    # Those without a pixel or an image in validation have no score.
    assert logged <= set(case.names)
    assert (case.run / "loss_curve.png").exists()
    assert (case.run / "report.html").exists() == ("segmentation" in str(case.run))
    config = yaml.safe_load((case.run / "config.yaml").read_text(encoding="utf-8"))
    assert config["out"] == str(case.run)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", FILES)
def test_info_shows_names_of_file_and_bands(name, encoding, tmp_path, monkeypatch) -> None:
    names = [*NASTY_NAMES][:12]
    path = write_raster(tmp_path / FOLDER / f"{name}.tif", bands(0, len(names)), names)
    code, out, err = run_in(encoding, ["info", path], monkeypatch)
    assert (code, err) == (0, "")
    for each in (f"{name}.tif", *names):
        assert each.encode(encoding, errors="backslashreplace").decode(encoding) in out
    code, out, err = run_in(encoding, ["info", path, "--json"], monkeypatch)
    content = json.loads(out, parse_constant=pytest.fail)
    assert (content["path"], content["band_names"]) == (str(path), names)


@pytest.mark.parametrize("command", ["info", "train", "predict", "evaluate", "convert"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_missing_file_is_one_line_with_its_name(command, encoding, tmp_path, monkeypatch) -> None:
    # Four names a command, all for the one that takes the least time.
    start = ["info", "train", "predict", "evaluate", "convert"].index(command)
    for name in FILES if command == "info" else FILES[start::5]:
        path = tmp_path / f"{name}.tif"
        args = {
            "info": ["info", path],
            "train": ["train", path.with_suffix(".yaml")],
            "predict": ["predict", "--checkpoint", path, "--input", path, "--output", tmp_path / "o.tif"],
            "evaluate": ["evaluate", "--checkpoint", path, "--input", path, "--labels", path],
            "convert": ["convert", path, "--out", tmp_path / "o"],
        }[command]
        code, out, err = run_in(encoding, args, monkeypatch)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("Error: ")
        # Blanks are joined in one line.
        assert " ".join(name.split()).encode(encoding, errors="backslashreplace").decode(encoding) in err


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_model_is_converted_into_a_folder_of_any_name(encoding, tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    root = tmp_path / FOLDER
    root.mkdir()
    weights = root / "[/]weights.safetensors".replace("/", "")
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), weights)
    out = root / "[bold]out"
    small = ["--img-size", "64", "--window-size", "2", "--max-exact-tokens", "0", "--layers", "0", "--num-classes", "0"]
    args = ["convert", "test_vit", "--weights", weights, "--out", out, *small]
    code, printed, err = run_in(encoding, args, monkeypatch)
    assert code == 0, err
    assert "Traceback" not in err
    assert str(out / "fidelity.html").encode(encoding, errors="backslashreplace").decode(encoding) in printed
    assert json.loads((out / "config.json").read_bytes(), parse_constant=pytest.fail)


def test_a_name_that_is_not_utf8_is_one_failed_input_of_a_batch(case, tmp_path, monkeypatch) -> None:
    if "slide" in str(case.run):
        pytest.skip("its inputs are slides, which GDAL does not open")
    images = tmp_path / "images"
    write_raster(images / "a.tif", bands(0))
    odd = images / os.fsdecode(b"caf\xe9.tif")
    shutil.copyfile(images / "a.tif", odd)
    is_table = any(word in str(case.run) for word in ("classification", "regression"))
    output = tmp_path / ("out.csv" if is_table else "out")
    args = ["predict", "--checkpoint", checkpoint(case.run), "--input", images, "--output", output, "--device", "cpu"]
    code, out, err = run_in("utf-8", [*args, "--on-error", "skip"], monkeypatch)
    assert "Traceback" not in err
    assert (output if is_table else output / "report.json").exists()
    if is_table:
        assert code == 0
        with output.open(newline="", encoding="utf-8") as file:
            rows = {Path(row["image"]).name: row["error"] for row in csv.DictReader(file)}
        assert rows["a.tif"] == ""
        assert "its name is not UTF-8" in rows[r"caf\udce9.tif"]
    else:
        assert code == 2
        report = json.loads((output / "report.json").read_bytes())
        found = {Path(item["input"]).name: (item["status"], item["error"]) for item in report["inputs"]}
        assert found["a.tif"] == ("done", None)
        assert found[odd.name][0] == "failed"
        assert "its name is not UTF-8" in found[odd.name][1]
    code, out, err = run_in("utf-8", ["info", odd], monkeypatch)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "its name is not UTF-8" in err
