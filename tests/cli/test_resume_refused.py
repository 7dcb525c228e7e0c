"""What a resumed run may not change is refused by name before anything is written; the rest is followed."""

import csv
import functools
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from command_line import call, train_args

from perf_vit.config import load_config
from perf_vit.workflows.registry import TASKS
from perf_vit.workflows.resume import RULES, changes
from perf_vit.workflows.run_config import DistillationRun, SegmentationRun

FILES = {
    "segmentation": ["data.train={image: a.tif, labels: a.geojson}", "data.val={image: b.tif, labels: b.geojson}"],
    "detection": ["data.train={image: a, labels: a.json}", "data.val={image: b, labels: b.json}"],
    "classification": ["data.train={image: a, labels: a.csv}", "data.val={image: b, labels: b.csv}"],
    "regression": ["data.train={image: a, labels: a.csv}", "data.val={image: b, labels: b.csv}"],
    "slide_classification": ["data.train.labels=a.csv", "data.val.labels=b.csv"],
    "distillation": ["data.train.image=[a]", "data.val.image=[b]"],
}
SHIPPED = {
    "segmentation": "configs/segmentation/demo.yaml",
    "detection": "configs/detection/cells_bccd.yaml",
    "classification": "configs/classification/scenes.yaml",
    "regression": "configs/regression/biomass.yaml",
    "slide_classification": "configs/slide_classification/tumour.yaml",
    "distillation": "configs/distillation/vit_small_dinov2.yaml",
}
GIVEN = {
    "segmentation": ["data.classes=[a,b]", "data.extra_train=[{image: c.tif, labels: c.geojson}]"],
    "detection": ["data.classes=[a,b]"],
    "classification": ["data.classes=[a,b]"],
    "regression": ["data.targets=[a,b]"],
    "slide_classification": ["data.classes=[a,b]"],
    "distillation": [],
}
NETWORK = ["model.backbone=resnet34", "model.backbone_kwargs={depth: 3}"]
TILES = ["data.tile_px=80", "data.batch_size=3", "data.bands=[2,1]"]
TUNING = ["model.trainable_blocks=1", "model.lora={rank: 2}"]
TRAINER = [
    "trainer.accumulate_batches=7",
    "trainer.ema_decay=0.25",
    "trainer.redraw_every_steps=7",
    "trainer.strategy=ddp",
]
TRAINING = ["seed=7", *NETWORK, *TILES, *TRAINER, "data.mean=[1,2,4]"]
REFUSED = {
    "segmentation": [
        *TRAINING,
        *TUNING,
        "data.classes=[b,a]",
        "data.classes=[a,b,c]",
        "data.values=[1,0]",
        "data.ignore_values=[9]",
        "data.attribute=kind",
        "data.background=null",
        "data.multilabel=true",
        "data.nodata=7",
        "data.resolution=3",
        "data.mpp=0.3",
        "data.tissue=otsu",
        "data.tiles_per_epoch=17",
        "data.train.region=[0,0,9,9]",
        "data.extra_train.0.region=[0,0,9,9]",
        "data.extra_train=[]",
        "model.head=upernet",
        "model.head_kwargs={channels: 9}",
        "model.out_indices=[1]",
        "model.freeze_backbone=true",
    ],
    "detection": [
        *TRAINING,
        *TUNING,
        "data.classes=[b,a]",
        "data.skip_classes=[z]",
        "data.val=null",
        "data.val_share=0.35",
        "data.train.label_format=csv",
        "data.mpp=0.3",
        "data.slide_mpp=0.3",
        "data.tiles_per_epoch=17",
        "model.head=mask_rcnn",
        "model.strides=[8]",
        "model.channels=48",
        "model.reduce=3",
        "model.freeze_norms=true",
    ],
    "classification": [
        *TRAINING,
        *TUNING,
        "data.classes=[b,a]",
        "data.multilabel=true",
        "data.label_column=kind",
        "data.image_column=file",
        "data.nodata=7",
        "data.resize=true",
        "data.tiles_per_epoch=17",
        "data.train.labels=null",
        "data.val_share=0.35",
        "model.pool=map",
        "model.drop_rate=0.35",
        "model.freeze_backbone=true",
    ],
    "regression": [*TRAINING, *TUNING, "data.targets=[b,a]", "data.image_column=file", "data.val=null"],
    "slide_classification": [
        "seed=7",
        *NETWORK,
        *TILES,
        *TRAINER,
        "data.classes=[b,a]",
        "data.mpp=0.3",
        "data.slide_mpp=0.3",
        "data.tissue=null",
        "data.min_tissue=0.45",
        "data.val=null",
        "data.val_share=0.35",
        "data.image_column=file",
        "model.hidden_dim=8",
        "model.attention_dim=8",
        "model.pool=map",
    ],
    "distillation": [
        "seed=7",
        "model.backbone=vit_base_patch14_dinov2",
        "model.weights=other.pth",
        "model.backbone_kwargs={depth: 3}",
        "model.mixer=performer",
        "model.options={window_size: 3}",
        "model.student=folder",
        "data.tile_px=70",
        "data.bands=[2,1,3]",
        "data.mean=[1,2,4]",
        "data.batch_size=3",
        "data.num_val_tiles=3",
        "optim.trainable=all",
        "trainer.val_every_steps=7",
    ],
}
OPTIM = ["optim.lr=0.5", "optim.layer_decay=0.55", "optim.backbone_lr_scale=0.55", "optim.weight_decay=0.55",
         "optim.warmup_fraction=0.55", "optim.schedule=step", "optim.schedule_kwargs={decay_rate: 0.5}"]  # fmt: skip
WHERE = ["trainer.max_epochs=777", "trainer.precision=64-true", "trainer.accelerator=gpu", "trainer.devices=3",
         "trainer.gradient_clip=0.55", "trainer.val_every_epochs=7", "trainer.early_stop_epochs=7",
         "trainer.checkpoint_every_steps=7", "trainer.num_pictures=7", "trainer.report=false", "trainer.logger=wandb",
         "data.num_workers=7",
         "model.pretrained=true", "out=elsewhere", "resume=true"]  # fmt: skip
PATHS = ["data.train.image=moved", "data.train.labels=moved", "data.val.image=moved", "data.val.labels=moved"]
ALLOWED = {
    "segmentation": [
        *OPTIM,
        *WHERE,
        "data.train.image=moved.tif",
        "data.extra_train.0.labels=moved.json",
        "data.sampler=grid",
        "data.augment.gain=0.35",
        "optim.loss.dice=3",
        "optim.class_weights=[1,2]",
        "model.grad_checkpointing=true",
        "data.mean=null",
    ],
    "detection": [*OPTIM, *WHERE, *PATHS, "data.sampler=random", "data.min_visible=0.45", "data.random_share=0.45"],
    "classification": [*OPTIM, *WHERE, *PATHS, "data.sampler=balanced", "optim.label_smoothing=0.35"],
    "regression": [*OPTIM, *WHERE, *PATHS, "data.augment={flips: false}"],
    "slide_classification": [
        *OPTIM,
        *WHERE,
        "data.train.labels=moved.csv",
        "data.train.image=moved",
        "data.max_windows=7",
        "data.classes=null",
    ],
    "distillation": [
        "data.train.image=[moved]",
        "optim.block_steps=777",
        "optim.token_steps=777",
        "optim.block_lr=0.5",
        "optim.token_lr=0.5",
        "optim.max_minutes=7",
        "optim.warmup_fraction=0.55",
        "optim.gradient_clip=7",
        "trainer.precision=64-true",
        "trainer.accelerator=gpu",
    ],
}
BASE = ["out=run", "data.mean=[1,2,3]", "data.std=[1,1,1]"]


def config_of(task: str, *overrides: str):
    schema = DistillationRun if task == "distillation" else TASKS[task].run_config
    base = BASE if task in ("segmentation", "detection", "classification", "regression") else BASE[:1]
    return load_config(SHIPPED[task], schema, [*base, *FILES[task], *GIVEN[task], *overrides])


@functools.cache
def config_before(task: str):
    """The config that changes are held against, which nothing changes."""
    return config_of(task)


def key_of(override: str) -> str:
    return override.split("=")[0]


@pytest.mark.parametrize(("task", "override"), [(task, each) for task in REFUSED for each in REFUSED[task]])
def test_what_the_network_is_and_sees_may_not_change(task, override) -> None:
    before = config_before(task)
    [(key, old, new)] = changes(config_of(task, override), asdict(before))
    assert key.startswith(key_of(override)) or key_of(override).startswith(key)
    assert old != new


@pytest.mark.parametrize(("task", "override"), [(task, each) for task in ALLOWED for each in ALLOWED[task]])
def test_how_long_how_fast_and_where_it_is_trained_may_change(task, override) -> None:
    before, after = config_before(task), config_of(task, override)
    assert after != before
    assert list(changes(after, asdict(before))) == []


def test_rules_name_fields_that_there_are() -> None:
    for owner, rules in RULES.items():
        names = {field.name for field in fields(owner)}
        assert rules.free | rules.moved | rules.measured <= names, owner


@pytest.mark.parametrize("task", SHIPPED)
def test_every_command_refuses_before_it_reads_or_writes_anything(task, tmp_path, capsys) -> None:
    config = config_of(task)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("as it was")
    loops = {"fit_loop": {"epoch_progress": {"current": {"processed": 1}}}}
    held = {"config": asdict(config), "num_samples": 1, "num_processes": 1}
    torch.save({"perf_vit_run": held, "global_step": 1, "loops": loops}, run / "checkpoints" / "last.ckpt")
    before = contents(run)
    command = "distill" if task == "distillation" else "train"
    base = BASE if task in ("segmentation", "detection", "classification", "regression") else []
    args = [command, SHIPPED[task], *base, *FILES[task], *GIVEN[task], f"out={run}", "resume=true"]
    assert call([*args, "seed=7"]) == 2
    assert "resume=true can't change seed from 0 to 7; give the values" in one_line(capsys)
    assert contents(run) == before
    if task != "segmentation":
        other = ["train", SHIPPED["segmentation"], *FILES["segmentation"], "data.classes=[a,b]", f"out={run}"]
        assert call([*other, "resume=true"]) == 2
        assert f"can't change task from {task} to segmentation" in one_line(capsys)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(capsys) -> str:
    """What was said, without the warning that these runs validate on what they train on."""
    lines = capsys.readouterr().err.splitlines()
    return " ".join(" ".join(line for line in lines if "is also in data.train" not in line).split())


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of a run of two epochs."""
    shutil.copytree(trained.folder, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.classes=[ship,water_or_land]", "data.classes from ['water_or_land', 'ship'] to ['ship', 'water_or_la"),
        (
            "data.classes=[water_or_land,ship,cloud]",
            "data.classes from ['water_or_land', 'ship'] to ['water_or_land',",
        ),
        ("model.head=linear", "model.head from None to linear"),
        ("model.backbone_kwargs.depth=3", "model.backbone_kwargs from {'depth': 2"),
        ("data.bands=[3,2,1]", "data.bands from None to [3, 2, 1]"),
        ("data.tile_px=128", "data.tile_px from 64 to 128"),
        ("data.nodata=7", "data.nodata from None to 7.0"),
        ("trainer.devices=2", "the processes of trainer.devices from 1 to 2"),
        ("trainer.max_epochs=1", "was trained for 2 epochs (4 steps), and the config ends after 1"),
        ("data.mean=[1,2,3,4] data.std=[1,1,1,1]", "normalizer of the training data from {'mean': ["),
    ],
)
def test_a_refused_change_leaves_the_run_as_it_was(trained, run, capsys, override, message) -> None:
    before = contents(run)
    assert call(train_args(trained.scene, run, "resume=true", *override.split())) == 2
    assert message in one_line(capsys)
    assert contents(run) == before


def test_all_changes_are_named_at_once(trained, run, capsys) -> None:
    assert call(train_args(trained.scene, run, "resume=true", "seed=7", "data.tile_px=128")) == 2
    message = one_line(capsys)
    assert "data.tile_px from 64 to 128" in message
    assert "seed from 0 to 7" in message


def test_a_config_that_was_edited_in_the_run_folder_is_held_against_the_checkpoint(trained, run, capsys) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("tile_px: 64", "tile_px: 128"))
    assert call(["train", path, f"out={run}", "resume=true"]) == 2
    assert "data.tile_px from 64 to 128" in one_line(capsys)


def test_what_may_change_is_followed_and_kept_in_the_config(trained, run, tmp_path) -> None:
    moved = shutil.copytree(trained.scene.image.parent, tmp_path / "moved")
    files = [f"data.train.image={moved / trained.scene.image.name}", "optim.lr=0.003", "trainer.max_epochs=3"]
    assert call(train_args(trained.scene, run, "resume=true", *files)) == 0
    config = load_config(run / "config.yaml", SegmentationRun)
    assert (config.optim.lr, config.trainer.max_epochs) == (0.003, 3)
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    # Now that is what the run was trained with.
    assert call(["train", run / "config.yaml", "resume=true", "trainer.max_epochs=4"]) == 0
    assert len(list(csv.DictReader((run / "metrics.csv").open()))) == 4


@pytest.mark.parametrize("content", [b"", b"half a file", None], ids=["empty", "broken", "of another program"])
def test_a_checkpoint_that_cant_be_resumed_is_one_line(trained, run, capsys, content) -> None:
    last = run / "checkpoints" / "last.ckpt"
    if content is None:
        torch.save({"state_dict": {}}, last)
    else:
        last.write_bytes(content)
    before = contents(run)
    assert call(train_args(trained.scene, run, "resume=true")) == 2
    message = one_line(capsys)
    assert ("as a checkpoint: " in message) == (content is not None)
    assert "Traceback" not in message
    assert contents(run) == before


def _without_moments(content: dict) -> None:
    for state in content["optimizer_states"][0]["state"].values():
        del state["exp_avg_sq"]


def _of_another_shape(content: dict) -> None:
    content["state_dict"] = {name: value.reshape(-1)[:1] for name, value in content["state_dict"].items()}


def _without_progress(content: dict) -> None:
    content["loops"]["fit_loop"]["epoch_loop.batch_progress"] = 7


def _without_config(content: dict) -> None:
    content["perf_vit_run"] = ["config"]


def _of_odd_paths(content: dict) -> None:
    content["perf_vit_run"]["config"]["data"] = [3]


DAMAGE = [_without_moments, _of_another_shape, _without_progress, _without_config, _of_odd_paths]


@pytest.mark.parametrize("damage", DAMAGE)
def test_values_that_no_run_wrote_are_one_line_about_the_checkpoint(trained, run, capsys, damage) -> None:
    last = run / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    damage(content)
    torch.save(content, last)
    assert call(train_args(trained.scene, run, "resume=true", "trainer.max_epochs=3")) == 2
    message = one_line(capsys)
    assert "Traceback" not in message
    assert str(last) in message
    assert message.startswith("Error: ")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no memory")])
def test_a_resume_that_lacks_memory_is_no_fault_of_the_checkpoint(trained, run, capsys, monkeypatch, error) -> None:
    def forward(*_, **__) -> None:
        raise error

    monkeypatch.setattr("perf_vit.tasks.SegmentationTask.training_step", forward)
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    assert call(train_args(trained.scene, run, "resume=true", "trainer.max_epochs=3")) == 2
    assert f"Error: MemoryError: {error}" in capsys.readouterr().err
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before
