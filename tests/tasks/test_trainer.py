"""Options of the trainer, on a small scene through the real task."""

import csv
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from perf_vit.data import (
    AugmentConfig,
    SegmentationDataConfig,
    SegmentationSplitConfig,
    build_segmentation_datamodule,
    make_ship_scene,
)
from perf_vit.errors import ConfigError
from perf_vit.models import SegmentationModelConfig, SegmentationSpec, load_segmenter
from perf_vit.tasks import SegmentationOptimConfig, SegmentationTask, TrainerConfig, build_trainer
from perf_vit.tasks.callbacks import EpochProgressBar
from perf_vit.tasks.through_encoder import wait_for_long_steps
from perf_vit.tasks.trainer import _devices

MODEL = SegmentationModelConfig(
    backbone="performer_vit_tiny_patch16_224",
    backbone_kwargs={"depth": 2, "attn_kwargs": {"num_features": 32}},
    out_indices=[0, 1],
)


@pytest.fixture(scope="module")
def data_config(tmp_path_factory) -> SegmentationDataConfig:
    scene = make_ship_scene(tmp_path_factory.mktemp("scene"), seed=0, size_px=128, num_targets=8)
    region = SegmentationSplitConfig(image=str(scene.image), labels=str(scene.labels))
    plain = AugmentConfig(flips=False)
    return SegmentationDataConfig(train=region, val=region, classes=["sea", "ship"], background="sea", tile_px=64,
                      tiles_per_epoch=8, batch_size=2, augment=plain)  # fmt: skip


def _fit(data_config: SegmentationDataConfig, folder, **options) -> tuple[SegmentationTask, object]:
    torch.manual_seed(0)
    data = build_segmentation_datamodule(data_config, seed=0)
    spec = SegmentationSpec(classes=data.classes, normalizer=data.normalizer, tile_px=data.tile_px)
    task = SegmentationTask(MODEL, spec, SegmentationOptimConfig())
    trainer = build_trainer(TrainerConfig(**{"accelerator": "cpu", "devices": "1", "max_epochs": 2, **options}), folder,
                            progress=False)  # fmt: skip
    trainer.fit(task, data)
    return task, trainer


def test_averaged_weights_are_what_a_checkpoint_gives(data_config, tmp_path) -> None:
    task, _ = _fit(data_config, tmp_path / "ema", ema_decay=0.5)
    plain, _ = _fit(data_config, tmp_path / "plain")
    kept = load_segmenter(tmp_path / "ema" / "checkpoints" / "last.ckpt").state_dict()
    last = load_segmenter(tmp_path / "plain" / "checkpoints" / "last.ckpt").state_dict()
    name = "head.classifier.weight"
    # Training itself goes on from the weights, not from their average.
    assert not torch.equal(kept[name], last[name])
    torch.testing.assert_close(task.model.state_dict()[name], kept[name])
    assert torch.equal(plain.model.state_dict()[name], last[name])


def test_training_is_deterministic_without_writing_nan_to_new_tensors(data_config, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    _fit(data_config, tmp_path, max_epochs=1)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_accumulated_batches_make_fewer_steps(data_config, tmp_path) -> None:
    _, trainer = _fit(data_config, tmp_path, accumulate_batches=2, max_epochs=1)
    assert trainer.global_step == 2


def test_training_stops_early_without_progress(data_config, tmp_path) -> None:
    data = build_segmentation_datamodule(data_config, seed=0)
    spec = SegmentationSpec(classes=data.classes, normalizer=data.normalizer, tile_px=data.tile_px)
    task = SegmentationTask(MODEL, spec, SegmentationOptimConfig())
    task.on_validation_epoch_end = lambda: task.log("val/iou", 0.5)
    config = TrainerConfig(accelerator="cpu", devices="1", max_epochs=9, early_stop_epochs=2)
    trainer = build_trainer(config, tmp_path, progress=False)
    trainer.fit(task, data)
    assert trainer.current_epoch == 3


@pytest.mark.parametrize("change", [{"ema_decay": 1.0}, {"accumulate_batches": 0}, {"early_stop_epochs": -1}])
def test_values_out_of_range_are_one_line(tmp_path, change) -> None:
    with pytest.raises(ConfigError, match=r"expected trainer\.ema_decay"):
        build_trainer(TrainerConfig(**change), tmp_path)


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_norm_to_clip_to_that_is_none_is_one_line(tmp_path, value) -> None:
    with pytest.raises(ConfigError, match=r"^trainer\.gradient_clip must be a number of at least 0, got"):
        build_trainer(TrainerConfig(gradient_clip=value), tmp_path)


def test_an_unknown_strategy_is_one_line(tmp_path) -> None:
    with pytest.raises(ConfigError, match="trainer: "):
        build_trainer(TrainerConfig(strategy="no_such_strategy"), tmp_path)


@pytest.mark.parametrize(("every", "validated"), [(2, [False, True, True]), (9, [False, False, True])])
def test_epochs_without_a_validation_have_no_scores_and_the_last_one_has(
    data_config, tmp_path, every, validated
) -> None:
    _fit(data_config, tmp_path, max_epochs=3, val_every_epochs=every)
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["val/iou"]) for row in rows if int(row["epoch"]) > 0] == validated
    assert all(row["train/loss"] for row in rows if int(row["epoch"]) > 0)


@pytest.mark.parametrize("options", [{"devices": "0"}, {"devices": "x"}, {"accelerator": "abacus"}])
def test_values_that_lightning_refuses_are_one_line(tmp_path, options) -> None:
    with pytest.raises(ConfigError, match=r"^trainer: ") as error:
        build_trainer(TrainerConfig(**{"accelerator": "cpu", **options}), tmp_path, progress=False)
    assert "\n" not in str(error.value)


def test_the_progress_bar_counts_epochs_from_one() -> None:
    bar = EpochProgressBar()
    bar._trainer = SimpleNamespace(max_epochs=10)
    assert [bar._get_train_description(epoch).rstrip() for epoch in (0, 9)] == ["Epoch 1 of 10", "Epoch 10 of 10"]


def test_a_list_of_devices_is_a_number_of_processes_on_a_cpu(tmp_path) -> None:
    config = TrainerConfig(accelerator="cpu", devices=[0], max_epochs=1)
    assert build_trainer(config, tmp_path, progress=False).num_devices == 1


@pytest.mark.parametrize("accelerator", ["cpu", "gpu", "auto"])
def test_devices_are_the_processes_of_torchrun(tmp_path, monkeypatch, accelerator: str) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for given in ("auto", 2, "2"):
        assert str(_devices(given, accelerator)) == "2"
    assert _devices([0, 3], "gpu") == [0, 3]
    for other in (1, "1", [0]):
        config = TrainerConfig(accelerator=accelerator, devices=other)
        with pytest.raises(
            ConfigError, match=r"torchrun started on this machine, 2, got .*; pass trainer\.devices=auto$"
        ):
            build_trainer(config, tmp_path, progress=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert _devices("auto", accelerator) == "auto"


@pytest.mark.parametrize(("short", "name"), [("bf16", "bf16-mixed"), ("16", "16-mixed"), ("auto", "auto")])
def test_precisions_have_short_names(short: str, name: str) -> None:
    assert TrainerConfig(precision=short).precision == name


def test_processes_wait_for_one_whose_slide_takes_days(tmp_path, monkeypatch) -> None:
    config = TrainerConfig(accelerator="cpu", devices="2", strategy="ddp", max_epochs=1)
    trainer, given = build_trainer(config, tmp_path, progress=False), []
    wait_for_long_steps(trainer)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **options: given.append(options["timeout"]))
    trainer.strategy.setup_distributed()
    assert given == [timedelta(weeks=1)]
