"""What a failed run leaves in its folder."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch

from perf_vit.config import dump_config
from perf_vit.data import ClassificationDataConfig, ClassificationSplitConfig
from perf_vit.errors import CheckpointError, ConfigError, InputError, OutputError
from perf_vit.workflows.run_config import ClassificationRun
from perf_vit.workflows.run_folder import RUN_FILES, RunFolder, check_config_kept
from perf_vit.workflows.train import Run

DATA = SimpleNamespace(train=range(8))


def test_a_run_that_fails_before_its_first_checkpoint_leaves_only_what_was_there(tmp_path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").touch()
    data = ClassificationDataConfig(train=ClassificationSplitConfig(image="x"))

    def fit(*_, **__) -> None:
        for name in ("checkpoints", "pictures", "tensorboard", "wandb"):
            (out / name).mkdir()
        raise InputError("unreadable")

    trainer = SimpleNamespace(fit=fit, callbacks=[])
    with pytest.raises(InputError):
        RunFolder(ClassificationRun(out=str(out), data=data)).fit(trainer, None, DATA)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_an_interrupted_run_ends_as_shells_say(tmp_path) -> None:
    data = ClassificationDataConfig(train=ClassificationSplitConfig(image="x"))

    def trainer_that_ends(interrupted: bool) -> SimpleNamespace:
        # As Lightning ends a run, after a Ctrl-C too.
        return SimpleNamespace(interrupted=interrupted, callbacks=[], fit=lambda *_, **__: sys.exit(1))

    for interrupted, code in ((True, 130), (False, 1)):
        with pytest.raises(SystemExit) as ended:
            RunFolder(ClassificationRun(out=str(tmp_path), data=data)).fit(trainer_that_ends(interrupted), None, DATA)
        assert ended.value.code == code


def _config(out, **options) -> ClassificationRun:
    return ClassificationRun(
        out=str(out), data=ClassificationDataConfig(train=ClassificationSplitConfig(image="x")), **options
    )


@pytest.mark.parametrize("name", [*RUN_FILES, "student"])
def test_files_of_a_run_that_no_run_has_made_are_kept(tmp_path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=f"{name} exists already and is not of a run"):
        RunFolder(_config(tmp_path), more=["student"])
    assert (tmp_path / name).read_text() == "mine"


def test_a_run_that_was_killed_before_its_first_checkpoint_is_begun_again(tmp_path) -> None:
    dump_config(_config(tmp_path), tmp_path / "config.yaml")
    for name in ("metrics.csv", "loss_curve.png"):
        (tmp_path / name).touch()
    assert RunFolder(_config(tmp_path)).path == tmp_path


def test_a_new_run_does_not_write_over_the_config_that_it_was_made_from(tmp_path) -> None:
    config = tmp_path / "config.yaml"
    dump_config(_config(tmp_path), config)
    (tmp_path / "linked.yaml").symlink_to(config)
    for given in (config, tmp_path / "linked.yaml"):
        with pytest.raises(OutputError, match=r"config\.yaml would replace the input"):
            check_config_kept(given, _config(tmp_path))
    # A run that is resumed wrote it.
    check_config_kept(config, _config(tmp_path, resume=True))
    check_config_kept(config, _config(tmp_path / "other"))


@pytest.mark.parametrize("epoch", [0, 1])
def test_best_weights_of_a_run_whose_last_checkpoint_is_gone_are_not_trained_over(tmp_path, epoch) -> None:
    dump_config(_config(tmp_path), tmp_path / "config.yaml")
    best = tmp_path / "checkpoints" / "best.ckpt"
    best.parent.mkdir()
    torch.save({"epoch": epoch, "state_dict": {}}, best)
    before = best.read_bytes()
    # A process may be killed between both checkpoints of the first epoch: that run is begun again.
    with pytest.raises(ConfigError, match="reached epoch 2") if epoch else contextlib.nullcontext():
        RunFolder(_config(tmp_path))
    assert best.read_bytes() == before
    best.write_bytes(before[:100])
    with pytest.raises(CheckpointError, match=r"best\.ckpt"):
        RunFolder(_config(tmp_path))


def test_damaged_metrics_are_named(tmp_path) -> None:
    run = Run(tmp_path)
    with pytest.raises(InputError, match=r"can't read .*metrics\.csv as CSV of numbers: No such file"):
        _ = run.metrics
    (tmp_path / "metrics.csv").write_text("epoch,loss\n0,0.5\n1,\n")
    assert run.metrics == [{"epoch": 0.0, "loss": 0.5}, {"epoch": 1.0}]
    (tmp_path / "metrics.csv").write_text("epoch,loss\n0,half\n")
    with pytest.raises(InputError, match=r"metrics\.csv as CSV of numbers: could not convert"):
        _ = run.metrics
