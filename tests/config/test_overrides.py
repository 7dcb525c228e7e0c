"""Typical overrides do what is meant, and typical mistakes are answered in words."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from perf_vit.config import dump_config, load_config
from perf_vit.errors import ConfigError
from perf_vit.tasks import LossConfig
from perf_vit.workflows.run_config import DetectionRun, SegmentationRun
from perf_vit.workflows.train import read_run

BUILDINGS, TREES = "segmentation/buildings", "detection/trees"
FILES = [f"data.{part}.{key}={part}.tif" for part in ("train", "val") for key in ("image", "labels")] + ["out=run"]


@dataclass
class Small:
    out: str = ""


def value_of(run: Any, key: str) -> Any:
    for name in key.split("."):
        run = getattr(run, name)
    return run


@pytest.mark.parametrize(
    ("config", "override", "key", "expected"),
    [
        (BUILDINGS, "optim.loss=dice", "optim.loss", LossConfig(ce=0, dice=1)),
        (BUILDINGS, "optim.loss=[ce, lovasz]", "optim.loss", LossConfig(ce=1, lovasz=1)),
        (BUILDINGS, "optim.loss={focal: 2}", "optim.loss", LossConfig(ce=1, focal=2)),
        (TREES, "data.classes=building", "data.classes", ["building"]),
        (TREES, "data.classes=oak,beech", "data.classes", ["oak", "beech"]),
        (BUILDINGS, "data.classes=[no, yes]", "data.classes", ["no", "yes"]),
        (TREES, "data.classes=[01, 1.10, 2024-01-01]", "data.classes", ["01", "1.10", "2024-01-01"]),
        (BUILDINGS, "trainer.devices=[0]", "trainer.devices", [0]),
        (BUILDINGS, "trainer.devices=2", "trainer.devices", 2),
        (BUILDINGS, "trainer.devices=auto", "trainer.devices", "auto"),
        (BUILDINGS, "model.backbone_kwargs={}", "model.backbone_kwargs", {}),
        (BUILDINGS, "model.backbone_kwargs={depth: 2}", "model.backbone_kwargs", {"depth": 2}),
        (BUILDINGS, "model.backbone_kwargs.depth=2", "model.backbone_kwargs", {"drop_path_rate": 0.1, "depth": 2}),
        (BUILDINGS, "data.augment={}", "data.augment.gain", 0.0),
        (BUILDINGS, "data.augment=none", "data.augment.flips", False),
        (BUILDINGS, "data.augment.gain=0", "data.augment.offset", 0.8),
        (BUILDINGS, "data.bands=4,3,2", "data.bands", [4, 3, 2]),
        (BUILDINGS, "data.bands=1", "data.bands", [1]),
        (BUILDINGS, "data.bands=none", "data.bands", None),
        (BUILDINGS, "data.ignore_values=255", "data.ignore_values", [255]),
        (BUILDINGS, "data.augment.scale=0.5,2", "data.augment.scale", (0.5, 2.0)),
        (BUILDINGS, "data.tiles_per_epoch=1e3", "data.tiles_per_epoch", 1000),
        (BUILDINGS, "trainer.precision=bf16", "trainer.precision", "bf16-mixed"),
        (BUILDINGS, "trainer.precision=16", "trainer.precision", "16-mixed"),
        (BUILDINGS, "model.lora=true", "model.lora.rank", 8),
        (BUILDINGS, "model.lora.rank=4", "model.lora.rank", 4),
        (BUILDINGS, "optim.lr=1e-6", "optim.lr", 1e-6),
        (BUILDINGS, "optim.schedule_kwargs={lr_min: 1e-6}", "optim.schedule_kwargs", {"lr_min": 1e-6}),
        (BUILDINGS, "resume=yes", "resume", True),
        (BUILDINGS, "out=runs/a #1: b", "out", "runs/a #1: b"),
        (BUILDINGS, "data.train.image=town #2.tif", "data.train.image", "town #2.tif"),
        (BUILDINGS, "model.lora=false", "model.lora", None),
        (BUILDINGS, "data.train={image: [a.tif, b.tif], labels: ab.gpkg}", "data.train.image", ["a.tif", "b.tif"]),
        (BUILDINGS, "trainer={max_epochs: 3}", "trainer.max_epochs", 3),
        (BUILDINGS, "optim={lr: 0.1}", "optim.loss.dice", 1.0),
    ],
)
def test_typical_overrides_do_what_is_meant(config: str, override: str, key: str, expected: Any) -> None:
    found = value_of(read_run(config, [*FILES, override]), key)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=fast", "optim.lr must be a number, got 'fast'"),
        ("data.tile_px=[512,512]", "data.tile_px must be a whole number, got [512, 512]"),
        ("data.tile_px=", "data.tile_px must be a whole number, got null"),
        ("trainer.max_epochs=10.5", "trainer.max_epochs must be a whole number, got 10.5"),
        (
            "optim.loss=dise",
            "optim.loss must be one or more of ce, dice, focal, lovasz, got 'dise'; did you mean 'dice'?",
        ),
        ("lr=0.001", "Key 'lr' not in the config. Did you mean: 'optim.lr'?"),
        ("data.max_epochs=3", "Key 'max_epochs' not in 'data'. Did you mean: 'trainer.max_epochs'?"),
        ("--data.tile_px=512", "overrides have no dashes, got '--data.tile_px=512'; write data.tile_px=512"),
        ("data.tile_px:512", "overrides must be key=value, got 'data.tile_px:512'; write data.tile_px=512"),
        ("data.bands=[1,2", "can't read data.bands=[1,2: expected ',' or ']', but got '<stream end>'; close brackets"),
        ("data.bands=red", "data.bands must be a list of whole numbers as in [1, 2] or null, got 'red'"),
        ("data.augment.scale=1.5", "data.augment.scale must be 2 numbers as in [0.5, 2], got 1.5"),
        ("data.augment=strong", "data.augment must be a mapping as in {flips: true}, got 'strong'"),
        (
            "data.sampler=balance",
            "data.sampler must be one of random, balanced, grid, got 'balance'; did you mean 'balanced'",
        ),
        ("model.freeze_backbone=maybe", "model.freeze_backbone must be true or false, got 'maybe'"),
        ("model.lora=8", "model.lora must be a mapping as in {rank: 1} or null, got 8"),
        ("data.val=none", "data.val must be a mapping as in {image: a}, got 'none'"),
        ("data.train=scene.tif", "give data.train.labels=..."),
        ("optim=adam", "optim must be a mapping as in {lr: 0.5}, got 'adam'"),
        ("data.train.imge=x.tif", "Key 'imge' not in 'data.train'. Did you mean: 'image'?"),
        ("data.tile_px.size=3", "data.tile_px must be a mapping to set data.tile_px.size, got 512"),
        ("model.head_kwargs=[norm]", "model.head_kwargs must be a mapping as in {name: value}, got ['norm']"),
        (
            "optim.class_weights=balance",
            "optim.class_weights must be balanced or a list of numbers as in [0.5, 1] or null",
        ),
    ],
)
def test_typical_mistakes_are_answered_in_one_line_of_words(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_run(BUILDINGS, [*FILES, override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("out", ["runs/a #1", "[b]", "a: b", '"q"', "{x}", "C:\\runs"])
def test_a_run_folder_may_have_any_name(out: str) -> None:
    assert read_run(BUILDINGS, FILES[:-1], out).out == out
    assert read_run(BUILDINGS, [*FILES[:-1], "seed=3"], Path(out)).out == out


def test_mappings_of_a_file_replace_those_of_its_base(tmp_path: Path) -> None:
    base, child = tmp_path / "base.yaml", tmp_path / "child.yaml"
    base.write_text(
        "extends: segmentation/buildings\nmodel: {head: upernet, head_kwargs: {norm: group}}\nout: runs/a\n"
    )
    child.write_text("extends: base.yaml\nmodel: {head: linear, head_kwargs: {}}\noptim: {loss: {dice: 0}}\n")
    run = load_config(child, SegmentationRun, FILES)
    assert (run.model.head, run.model.head_kwargs, run.model.backbone_kwargs) == ("linear", {}, {"drop_path_rate": 0.1})
    # Groups are merged key by key.
    assert (run.optim.loss, run.optim.lr) == (LossConfig(ce=1, dice=0), 0.001)


def test_values_of_yaml_have_the_types_of_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "extends: detection/trees\nout: 2024-01-01\noptim: {lr: 1e-4, schedule_kwargs: {lr_min: 1e-6}}\n"
        "data: {classes: [on, off], val_share: 1e-1, tile_px: 1e2}\n"
    )
    run = load_config(path, DetectionRun, FILES[:4])
    assert run.out == "2024-01-01"
    assert run.optim.lr == 1e-4
    assert run.optim.schedule_kwargs == {"lr_min": 1e-6}
    assert run.data.classes == ["on", "off"]
    assert (run.data.val_share, run.data.tile_px) == (0.1, 100)
    dump_config(run, tmp_path / "dumped.yaml")
    assert load_config(tmp_path / "dumped.yaml", DetectionRun) == run


def test_mappings_from_python_are_converted_alike() -> None:
    given = {item.partition("=")[0]: item.partition("=")[2] for item in FILES}
    run = read_run(BUILDINGS, {**given, "optim.loss": "dice", "data.bands": 1, "trainer": {"max_epochs": 2}})
    assert run.optim.loss == LossConfig(ce=0, dice=1)
    assert (run.data.bands, run.trainer.max_epochs, run.optim.lr) == ([1], 2, 0.001)


def test_overrides_are_read_from_any_iterable_and_one_may_stand_alone() -> None:
    assert read_run(TREES, (each for each in [*FILES, "optim.lr=1e-5"])).optim.lr == 1e-5
    assert load_config({"out": "a"}, Small, "out=b") == Small(out="b")
    with pytest.raises(ConfigError, match=r"^overrides must be a mapping of keys to values, or texts .*, got 3$"):
        load_config({"out": "a"}, Small, 3)
    with pytest.raises(ConfigError, match=r"got \('optim.lr', 3\)"):
        read_run(TREES, [("optim.lr", 3)])
