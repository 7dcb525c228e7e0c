"""What maps are trained on, by the command line."""

import json

import numpy as np
import pytest
from command_line import SMALL, call, train_args
from PIL import Image

SIZES = [(96, 80), (64, 64), (30, 50)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photos of three sizes, without georeference, whose bright parts are things."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES):
        truth = np.zeros((height, width), np.uint8)
        truth[10 : 10 + 8 * number + 8, 12:40] = 1
        pixels = rng.normal(70 + 120 * truth[..., None], 10, (height, width, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"p{number}.png")
        Image.fromarray(truth).save(folder / "masks" / f"p{number}.png")
    return folder


def train_on(folder, out, *extra: str) -> int:
    files = [f"data.{part}={{image: {folder / 'images'}, labels: {folder / 'masks'}}}" for part in ("train", "val")]
    options = [
        "data.classes=[rest,thing]",
        "data.background=rest",
        "trainer.max_epochs=3",
        "data.tiles_per_epoch=32",
        "optim.lr=0.005",
    ]
    return call(["train", "configs/segmentation/demo.yaml", *files, f"out={out}", *SMALL, *options, *extra])


@pytest.fixture(scope="module")
def run(photos):
    assert train_on(photos, photos / "run", "data.sampler=balanced", "optim.class_weights=balanced") == 0
    return photos / "run" / "checkpoints" / "best.ckpt"


def evaluate(run, images, labels, out, *extra: str) -> int:
    return call(["evaluate", "--checkpoint", run, "--input", images, "--labels", labels, "--json", out, *extra])


def test_one_table_over_all_images_of_a_folder(photos, run, tmp_path, capsys) -> None:
    assert evaluate(run, photos / "images", photos / "masks", tmp_path / "all.json") == 0
    assert "images against masks" in capsys.readouterr().out
    scores = json.loads((tmp_path / "all.json").read_text())
    assert (tmp_path / "all.png").is_file()
    assert np.sum(scores["confusion"]) == sum(height * width for height, width in SIZES)
    confusion = np.zeros((2, 2), int)
    for number in range(len(SIZES)):
        name = f"p{number}.png"
        assert (
            evaluate(run, photos / "images" / name, photos / "masks" / name, tmp_path / "one.json", "--overwrite") == 0
        )
        confusion += np.array(json.loads((tmp_path / "one.json").read_text())["confusion"])
    assert scores["confusion"] == confusion.tolist()
    assert scores["classes"][1]["iou"] > 0.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "masks" / "p0.png").rename(folder / "masks" / "q0.png"), "1 of 3 label files"),
        (lambda folder: [file.unlink() for file in (folder / "masks").iterdir()], "no label files in"),
        (lambda folder: Image.new("L", (64, 64)).save(folder / "images" / "p1.png"), "has 1"),
        (lambda folder: Image.new("L", (9, 9)).save(folder / "masks" / "p2.png"), "must have the raster's size"),
    ],
)
def test_folders_that_do_not_fit_are_told_in_one_line(photos, run, tmp_path, capsys, change, message) -> None:
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
        for file in (photos / part).iterdir():
            (tmp_path / part / file.name).write_bytes(file.read_bytes())
    change(tmp_path)
    capsys.readouterr()
    assert train_on(tmp_path, tmp_path / "run") == 2
    trained = capsys.readouterr().err.strip()
    assert evaluate(run, tmp_path / "images", tmp_path / "masks", tmp_path / "s.json") == 2
    scored = capsys.readouterr().err.strip()
    for told in (trained, scored):
        assert message in told
        assert len(told.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_region_of_a_folder_is_refused(photos, run, tmp_path, capsys) -> None:
    region = ["--region", "0", "0", "9", "9"]
    assert evaluate(run, photos / "images", photos / "masks", tmp_path / "s.json", *region) == 2
    assert "--region is a part of one raster" in capsys.readouterr().err


@pytest.mark.parametrize("sampler", ["balanced", "grid"])
def test_training_takes_each_sampler(trained, tmp_path, capsys, sampler) -> None:
    args = train_args(trained.scene, tmp_path / "run", f"data.sampler={sampler}", "trainer.max_epochs=1")
    assert call(args) == 0
    assert ("looking for labelled pixels" in capsys.readouterr().err) == (sampler == "balanced")
    assert f"sampler: {sampler}" in (tmp_path / "run" / "config.yaml").read_text()


def test_options_of_slides_are_refused_for_a_model_of_rasters(photos, run, tmp_path, capsys) -> None:
    for option in (["--slide-mpp", "0.5"], ["--tissue", "otsu"]):
        assert evaluate(run, photos / "images", photos / "masks", tmp_path / "s.json", *option) == 2
        assert f"{option[0]} is for slides, and this model is one of rasters" in capsys.readouterr().err
