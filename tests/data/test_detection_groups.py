"""Groups of images in detection: patients or places that are never divided."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perf_vit.data import DetectionDataConfig, DetectionSplitConfig, build_detection_datamodule
from perf_vit.errors import ConfigError, InputError


def split(folder: Path, names: list[str]) -> DetectionSplitConfig:
    """Images with a box each."""
    rows = ["image_path,xmin,ymin,xmax,ymax,label"]
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)).save(path)
        rows.append(f"{name},5,6,20,22,cell")
    (folder / "boxes.csv").write_text("\n".join(rows) + "\n")
    return DetectionSplitConfig(image=str(folder), labels=str(folder / "boxes.csv"), label_format="csv")


def config(train: DetectionSplitConfig, table: Path, rows: list[str], **keys) -> DetectionDataConfig:
    table.write_text("\n".join(["image,group", *rows]) + "\n")
    given = {
        "classes": ["cell"],
        "tile_px": 32,
        "batch_size": 1,
        "tiles_per_epoch": 4,
        "mean": [0.0] * 3,
        "std": [1.0] * 3,
    }
    return DetectionDataConfig(train=train, groups=str(table), **{**given, **keys})


def test_images_of_a_group_are_on_one_side_also_where_names_repeat(tmp_path) -> None:
    train = split(tmp_path / "images", ["a/1.png", "a/2.png", "b/1.png", "b/2.png"])
    rows = ["a/1.png,P1", "a/2.png,P1", "b/1.png,P2", "b/2,P2"]
    for fold in (0, 1):
        data = build_detection_datamodule(config(train, tmp_path / "g.csv", rows, num_folds=2, fold=fold), seed=0)
        held = {Path(record.path).parent.name for record in data.val.images.records}
        assert len(held) == 1
        assert {Path(record.path).parent.name for record in data.train.images.records} == {"a", "b"} - held


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["1.png,P1"], r"has no row for .*2\.png"),
        (["1.png,P1", "1.png,P2", "2.png,P1"], r"has 2 groups for .*1\.png"),
    ],
)
def test_images_without_one_group_are_named(tmp_path, rows, message) -> None:
    train = split(tmp_path / "images", ["1.png", "2.png"])
    with pytest.raises(InputError, match=message):
        build_detection_datamodule(config(train, tmp_path / "g.csv", rows), seed=0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, r"^data\.groups .*g\.csv has 1 groups, none of which can be held out"),
        ({"num_folds": 2}, r"^data\.num_folds 2 needs at least as many groups of data\.groups .*g\.csv, got 1"),
    ],
)
def test_too_few_groups_are_refused_with_the_key_that_gave_them(tmp_path, keys, message) -> None:
    train = split(tmp_path / "images", ["1.png", "2.png"])
    with pytest.raises(ConfigError, match=message):
        build_detection_datamodule(config(train, tmp_path / "g.csv", ["1.png,P1", "2.png,P1"], **keys), seed=0)


def test_a_group_in_both_splits_is_refused(tmp_path) -> None:
    train, val = split(tmp_path / "train", ["1.png"]), split(tmp_path / "val", ["2.png"])
    with pytest.raises(ConfigError, match="group P1 is in both"):
        build_detection_datamodule(config(train, tmp_path / "g.csv", ["1.png,P1", "2.png,P1"], val=val), seed=0)
