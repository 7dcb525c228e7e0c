"""What a failed run leaves in its folder."""

import contextlib
import errno
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from perf_vit.config import dump_config
from perf_vit.data import ClassificationDataConfig, ClassificationSplitConfig
from perf_vit.errors import BusyError, CheckpointError, ConfigError, InputError, OutputError
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


def _interrupted(*_, **__) -> None:
    """End a run as Lightning does after Ctrl-C."""
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(1)


def test_an_interrupted_run_raises_keyboard_interrupt_and_leaves_the_signal_as_it_was(tmp_path) -> None:
    before = signal.getsignal(signal.SIGINT)
    for fit, error in ((_interrupted, KeyboardInterrupt), (lambda *_, **__: sys.exit(3), SystemExit)):
        with pytest.raises(error):
            RunFolder(_config(tmp_path)).fit(SimpleNamespace(callbacks=[], fit=fit), None, DATA)
        assert signal.getsignal(signal.SIGINT) is before


def test_a_run_in_another_thread_touches_no_signal(tmp_path) -> None:
    def fit() -> None:
        RunFolder(_config(tmp_path)).fit(SimpleNamespace(callbacks=[], fit=lambda *_, **__: None), None, DATA)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(fit).result()
    assert (tmp_path / "config.yaml").exists()


def test_a_folder_is_trained_in_by_one_process_at_a_time(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("perf_vit.workflows.run_folder._LOCK_SECONDS", 0)
    out = tmp_path / "run"
    config = _config(out)

    def fit(*_, **__) -> None:
        before = sorted(out.iterdir())
        with pytest.raises(BusyError, match=r"^another process trains in .*run; wait for it, or choose another out=$"):
            RunFolder(config).fit(SimpleNamespace(callbacks=[], fit=None), None, DATA)
        assert sorted(out.iterdir()) == before

    late = RunFolder(config)
    RunFolder(config).fit(SimpleNamespace(callbacks=[], fit=fit), None, DATA)
    assert [path.name for path in out.iterdir()] == ["config.yaml"]
    (out / "checkpoints").mkdir()
    (out / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(ConfigError, match="already holds a run"):
        late.fit(SimpleNamespace(callbacks=[], fit=None), None, DATA)


def test_a_lock_that_a_killed_run_left_and_file_systems_without_locks_keep_no_run_away(tmp_path, monkeypatch) -> None:
    lock = tmp_path / ".perf_vit-run.lock"
    lock.touch()
    trainer = SimpleNamespace(callbacks=[], fit=lambda *_, **__: None)
    RunFolder(_config(tmp_path)).fit(trainer, None, DATA)
    assert not lock.exists()

    def refuse(self) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("perf_vit.workflows.run_folder.FileLock.acquire", refuse)
    RunFolder(_config(tmp_path)).fit(trainer, None, DATA)


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
