"""What a failed run leaves in its folder."""

import sys
from types import SimpleNamespace

import pytest

from perf_vit.cli.run_folder import RunFolder
from perf_vit.cli.schemas import ClassificationRun
from perf_vit.data import ClassificationDataConfig, ImageSplitConfig
from perf_vit.errors import InputError

DATA = SimpleNamespace(train=range(8))


def test_a_run_that_fails_before_its_first_checkpoint_leaves_only_what_was_there(tmp_path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").touch()
    data = ClassificationDataConfig(train=ImageSplitConfig(images="x"))

    def fit(*_, **__) -> None:
        for name in ("checkpoints", "pictures", "tensorboard", "wandb"):
            (out / name).mkdir()
        raise InputError("unreadable")

    trainer = SimpleNamespace(fit=fit, callbacks=[])
    with pytest.raises(InputError):
        RunFolder(ClassificationRun(out=str(out), data=data)).fit(trainer, None, DATA)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_an_interrupted_run_ends_as_shells_say(tmp_path) -> None:
    data = ClassificationDataConfig(train=ImageSplitConfig(images="x"))

    def trainer_that_ends(interrupted: bool) -> SimpleNamespace:
        # As Lightning ends a run, after a Ctrl-C too.
        return SimpleNamespace(interrupted=interrupted, callbacks=[], fit=lambda *_, **__: sys.exit(1))

    for interrupted, code in ((True, 130), (False, 1)):
        with pytest.raises(SystemExit) as ended:
            RunFolder(ClassificationRun(out=str(tmp_path), data=data)).fit(trainer_that_ends(interrupted), None, DATA)
        assert ended.value.code == code
