"""What a run was trained with, in its checkpoints, and what of it a resumed run must have too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch

from perf_vit.cli.resume_rules import Change, changes, same
from perf_vit.errors import CheckpointError, ConfigError, PerfVitError, parsing, reason_line
from perf_vit.models import CHECKPOINT_KEY

__all__ = ["KeepRun", "ResumedRun"]

_KEY = "perf_vit_run"
"""Where the run lies inside a Lightning checkpoint."""

# Training decides it.
_LEARNT = {"score_threshold"}


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
        checkpoint[_KEY] = {**self._run, "num_processes": trainer.world_size}


class _Batches(lightning.Callback):
    """Whether a training batch is done."""

    any_done = False

    def on_train_batch_end(self, *arguments: Any) -> None:
        """It is."""
        self.any_done = True


class ResumedRun:
    """The run that a checkpoint is of.

    Args:
        path: the checkpoint.

    Raises:
        CheckpointError: it can't be read, or holds no run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = _read(path)
        with parsing(path, "the checkpoint of a run", CheckpointError):
            self._run = dict(content[_KEY])
            self._config = dict(self._run["config"])
            self._spec = content.get(CHECKPOINT_KEY, {}).get("spec")
            self._num_steps = int(content["global_step"])
            self._num_epochs = int(content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])

    def check_config(self, config: Any) -> None:
        """Refuse a config that changes what can't be changed.

        Raises:
            ConfigError: which keys, with both values.
        """
        before = self._config
        tasks = [_task(each) for each in (before, asdict(config))]
        # Of another task, all keys differ.
        with parsing(self.path, "the checkpoint of a run", CheckpointError):
            found: list[Change] = (
                [("task", tasks[0], tasks[1])] if tasks[0] != tasks[1] else list(changes(config, before))
            )
        self._refuse(found)

    def check_network(self, task: Any) -> None:
        """Refuse a network that means something else than the one trained, because the data tell other classes.

        Raises:
            ConfigError: in what, with both values.
        """
        if self._spec is None:
            return
        spec = task.model.spec.to_dict()
        with parsing(self.path, "the checkpoint of a run", CheckpointError):
            old = dict(self._spec)
            names = [name for name in spec if name not in _LEARNT and not same(old.get(name), spec[name])]
        self._refuse([(f"{name} of the training data", old.get(name), spec[name]) for name in names])

    def check_length(self, trainer: Any, num_samples: int) -> None:
        """Refuse another number of steps an epoch, and an end that the run has passed.

        Args:
            trainer: of the resumed run.
            num_samples: training samples an epoch.

        Raises:
            ConfigError: what is expected.
        """
        run = self._run
        processes = ("the processes of trainer.devices", run.get("num_processes"), trainer.world_size)
        samples = ("the training samples of an epoch", run.get("num_samples"), num_samples)
        self._refuse([each for each in (processes, samples) if each[1] != each[2]])
        if trainer.max_epochs < self._num_epochs:
            raise ConfigError(
                f"{self.path} was trained for {self._num_epochs} epochs ({self._num_steps} steps), and the config ends "
                f"after {trainer.max_epochs}; ask for at least as many, or use the checkpoint as it is"
            )

    @contextmanager
    def going_on(self, trainer: lightning.Trainer) -> Iterator[None]:
        """Report what goes wrong before the first batch is done as a fault of the checkpoint.

        Lightning and optimizers take up whatever the checkpoint holds, and fail on it anywhere.

        Raises:
            CheckpointError: the run can't go on from it.
        """
        batches = _Batches()
        trainer.callbacks.append(batches)
        try:
            yield
        # Too little memory is no fault of the checkpoint.
        except (PerfVitError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if batches.any_done:
                raise
            raise CheckpointError(
                f"can't go on from {self.path}: {reason_line(error)}; it may be damaged: train in another out="
            ) from error

    def _refuse(self, found: Sequence[Change]) -> None:
        if found:
            listed = ", ".join(f"{key} from {_shown(old)} to {_shown(new)}" for key, old, new in found)
            raise ConfigError(
                f"resume=true can't change {listed}; give the values that {self.path} was trained with, or train in "
                "another out="
            )


def _task(config: dict[str, Any]) -> str:
    return str(config.get("task", "distillation"))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _read(path: Path) -> dict[str, Any]:
    with parsing(path, "a checkpoint", CheckpointError):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, dict) or _KEY not in content:
        raise CheckpointError(
            f"{path} doesn't hold the config that it was trained with, so it can't be resumed; train in another out="
        )
    return content
