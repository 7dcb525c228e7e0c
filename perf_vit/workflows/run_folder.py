"""Which files in a folder are those of a training run."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

from perf_vit.config import dump_config, find_config, is_dumped
from perf_vit.distributed import training_precision
from perf_vit.errors import (
    BusyError,
    CheckpointError,
    ConfigError,
    OutputError,
    PerfVitError,
    is_out_of_memory,
    parsing,
    reason_line,
)
from perf_vit.files import atomic_file
from perf_vit.workflows.resume import RUN_KEY, ResumedRun
from perf_vit.writers import check_outputs

__all__ = ["CONFIG", "RUN_FILES", "RunFolder", "check_config_kept", "check_run_files"]

CONFIG = "config.yaml"
"""The resolved config, whose first line says that the folder is a run's."""

RUN_FILES = (CONFIG, "checkpoints", "metrics.csv", "loss_curve.png", "pictures", "report.html", "tensorboard", "wandb")
"""Files and folders that a run writes into its folder."""


def check_config_kept(config: str | Path, run: Any) -> None:
    """Refuse a new run that would write its resolved config over the file that it was made from.

    Args:
        config: that the run was loaded from.
        run: the loaded config, with `out` and `resume`.

    Raises:
        OutputError: it would.
    """
    dumped = Path(run.out) / CONFIG
    if dumped.exists() and not run.resume:
        check_outputs([dumped], [find_config(config)], overwrite=True)


def check_run_files(folder: Path, more: Iterable[str] = ()) -> None:
    """Refuse a folder where a run would write over files that no run has made.

    Args:
        folder: of the run.
        more: names of what this run writes besides `RUN_FILES`.

    Raises:
        OutputError: names the first such file.
    """
    if is_dumped(folder / CONFIG):
        return
    for name in (*RUN_FILES, *more):
        if os.path.lexists(folder / name):
            raise OutputError(
                f"{folder / name} exists already and is not of a run of perf-vit, whose {CONFIG} would say so; move it "
                "away or choose another out="
            )


# What NumPy takes.
_NUM_SEEDS = 2**32

_LOCK = ".perf_vit-run.lock"

# Loaders' worker processes, which may share the lock, end this long after a process that was killed.
_LOCK_SECONDS = 10


class KeepRun(lightning.Callback):
    """Adds to each checkpoint the config it was trained with, and the samples and processes of an epoch.

    Args:
        config: of the run.
        num_samples: training samples an epoch.
    """

    def __init__(self, config: Any, num_samples: int) -> None:
        self._run = {"config": asdict(config), "num_samples": num_samples}

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add them."""
        checkpoint[RUN_KEY] = {**self._run, "num_processes": trainer.world_size}


class _Run(Protocol):
    out: str
    seed: int
    resume: bool
    trainer: Any


class RunFolder:
    """Where a run leaves checkpoints, metrics, curves and its resolved config; nothing is written before `fit`.

    Args:
        config: of the run, with its folder, seed and whether to resume.
        more: names of what is written into the folder besides `RUN_FILES`.

    Attributes:
        config: the config, with the precision that `auto` stands for: that of the machine where the run began.
        path: the folder.
        best: the best checkpoint, once it is there.

    Raises:
        CheckpointError: the checkpoint to resume from can't be read, or the best one that is there.
        ConfigError: a run to resume that there isn't, one in the way, or a config that changes what a resumed run
            can't change.
        OutputError: the folder can't be written, or holds files of these names that are not of a run.
    """

    def __init__(self, config: _Run, more: Sequence[str] = ()) -> None:
        self.path = Path(config.out)
        self.best = self.path / "checkpoints" / "best.ckpt"
        self._last = self.path / "checkpoints" / "last.ckpt"
        _check_run_folder(self.path, self._last, resume=config.resume)
        if not config.resume:
            check_run_files(self.path, more)
            _check_best(self.best)
        self._resumed = ResumedRun(self._last) if config.resume else None
        if self._resumed is not None:
            self._resumed.check_config(config)
        self.config = _with_precision(config, self._resumed)
        if not 0 <= config.seed < _NUM_SEEDS:
            raise ConfigError(f"seed must be from 0 to {_NUM_SEEDS - 1}, got {config.seed}")
        _quieten()
        lightning.seed_everything(config.seed, workers=True, verbose=False)

    def check_network(self, task: Any) -> None:
        """Refuse to resume a run with a network that means something else; `fit` does so by itself.

        Raises:
            ConfigError: in what.
        """
        if self._resumed is not None:
            self._resumed.check_network(task)

    def fit(self, trainer: lightning.Trainer, task: Any, data: Any) -> None:
        """Train, from the last checkpoint on if the run is resumed.

        Raises:
            CheckpointError: the run can't go on from its last checkpoint.
            ConfigError: a resumed run with another network, or another number of steps an epoch.
            OutputError: the folder can't be made.
            MemoryError: the network or its batches need more, also of a GPU.
            PerfVitError: of the data or the task; without a checkpoint, nothing of the run is left then.
            BusyError: another process trains in the folder.
            KeyboardInterrupt: somebody stopped the run; the last checkpoint is there to resume from.
        """
        self.check_network(task)
        num_samples = len(data.train)
        if self._resumed is not None:
            self._resumed.check_length(trainer, num_samples)
        trainer.callbacks.append(KeepRun(self.config, num_samples))
        # Processes that train together share the folder.
        if rank_zero_only.rank != 0:
            _make_run_folder(self.path)
            self._fit(trainer, task, data)
            return
        with _locked(self.path):
            # Another process may have trained here since.
            _check_run_folder(self.path, self._last, resume=self.config.resume)
            self._fit(trainer, task, data)

    def _fit(self, trainer: lightning.Trainer, task: Any, data: Any) -> None:
        new = [self.path / name for name in RUN_FILES if not (self.path / name).exists()]
        if rank_zero_only.rank == 0:
            with atomic_file(self.path / CONFIG) as unfinished:
                dump_config(self.config, unfinished)
        going_on = contextlib.nullcontext() if self._resumed is None else self._resumed.going_on(trainer)
        try:
            with going_on, _interrupts():
                trainer.fit(task, data, ckpt_path=self._last if self.config.resume else None, weights_only=True)
        except PerfVitError:
            if not self._last.exists():
                _remove(new)
            raise
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(reason_line(error)) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder and keep other processes from training in it; remove it again if nothing is left in it.

    The system drops the lock with the process that holds it, however that ends.

    Raises:
        BusyError: another process trains there.
        OutputError: the folder can't be made.
    """
    was_there = folder.exists()
    _make_run_folder(folder)
    lock = FileLock(folder / _LOCK, timeout=_LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout as error:
        raise BusyError(f"another process trains in {folder}; wait for it, or choose another out=") from error
    except (OSError, NotImplementedError):
        # Some network file systems have no locks.
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
        if not was_there:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt, and have its effect afterwards.

    Lightning ignores further ones from then on, and ends an interrupted run as a failed one.
    """
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if is_main else None
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)


def _with_precision(config: Any, resumed: ResumedRun | None) -> Any:
    """Resolve `trainer.precision=auto`, so that the dumped config and checkpoints hold the precision itself."""
    if config.trainer.precision != "auto":
        return config
    new = training_precision("auto", config.trainer.accelerator)
    precision = new if resumed is None else resumed.precision
    return replace(config, trainer=replace(config.trainer, precision=precision))


def _check_run_folder(folder: Path, last: Path, *, resume: bool) -> None:
    """Refuse a folder that a run can't be started or resumed in.

    Raises:
        ConfigError: a run to resume that there isn't, or one in the way.
        OutputError: the folder can't be written.
    """
    if resume and not last.is_file():
        raise ConfigError(f"resume=true needs {last}, which doesn't exist; leave it out to start anew")
    if last.is_file() and not resume:
        raise ConfigError(f"{folder} already holds a run; pass resume=true to continue it, or another out=")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise OutputError(
            f"can't write the run folder {folder}: {nearest} is not a writable folder; choose another out="
        )


def _check_best(best: Path) -> None:
    """Refuse to train over the best weights of a run whose last checkpoint was removed.

    The last one is written right after the best one, so after a kill in between that is of the first epoch.

    Raises:
        CheckpointError: the checkpoint can't be read.
        ConfigError: it is of a later epoch.
    """
    if not best.is_file():
        return
    with parsing(best, "a checkpoint", CheckpointError):
        epoch = int(torch.load(best, map_location="cpu", weights_only=True, mmap=True)["epoch"])
    if epoch > 0:
        raise ConfigError(
            f"{best} is of a run that reached epoch {epoch + 1}, and its last.ckpt is gone; move it away to train here "
            "anew, or choose another out="
        )


def _make_run_folder(folder: Path) -> None:
    """Make the folder.

    Raises:
        OutputError: it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"can't make the run folder {folder}: {error.strerror}; choose another out=") from error


def _remove(paths: Sequence[Path]) -> None:
    """Remove files and folders of a run."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _quieten() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
