"""Resumed runs: what may change between two starts of a run, and what may not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import lightning
import torch

from perf_vit.data import (
    BaseDataConfig,
    ClassificationDataConfig,
    ClassificationSplitConfig,
    DetectionDataConfig,
    DetectionSplitConfig,
    SegmentationDataConfig,
    SegmentationSplitConfig,
    SlideClassificationDataConfig,
    SlideClassificationSplitConfig,
    SplitConfig,
    TileDataConfig,
)
from perf_vit.errors import CheckpointError, ConfigError, PerfVitError, is_out_of_memory, parsing, reason_line
from perf_vit.models import CHECKPOINT_KEY
from perf_vit.models.backbone import BackboneConfig
from perf_vit.models.finetune import BackboneTuning
from perf_vit.tasks import (
    ClassificationOptimConfig,
    DistillationOptimConfig,
    DistillationTrainerConfig,
    OptimizerConfig,
    SegmentationOptimConfig,
    TrainerConfig,
)
from perf_vit.workflows.run_config import RunConfig

__all__ = ["RULES", "RUN_KEY", "Change", "ResumedRun", "Rules", "changes", "same"]

Change = tuple[str, Any, Any]
"""A key, the value that the run was trained with, and the value asked for."""


@dataclass(frozen=True)
class Rules:
    """Names of the fields of a config dataclass that may change; all others may not.

    Attributes:
        free: fields that may have any other value.
        moved: paths, which may be others, but not be left out or added.
        measured: fields whose value may be left out or added, as the data then tell it.
    """

    free: frozenset[str]
    moved: frozenset[str]
    measured: frozenset[str]


def _rules(*, free: str = "", moved: str = "", measured: str = "") -> Rules:
    return Rules(*(frozenset(names.split()) for names in (free, moved, measured)))


RULES: dict[type, Rules] = {
    RunConfig: _rules(free="out resume"),
    BackboneConfig: _rules(free="pretrained", moved="weights"),
    BackboneTuning: _rules(free="grad_checkpointing"),
    OptimizerConfig: _rules(
        free="lr backbone_lr_scale layer_decay weight_decay warmup_fraction schedule schedule_kwargs"
    ),
    SegmentationOptimConfig: _rules(free="loss class_weights"),
    ClassificationOptimConfig: _rules(free="label_smoothing class_weights"),
    DistillationOptimConfig: _rules(
        free="block_steps block_lr token_steps token_lr warmup_fraction gradient_clip max_minutes"
    ),
    # The number of processes is checked when it is known; `redraw_every_steps` and `ema_decay` decide what a
    # checkpoint holds, `accumulate_batches` how many steps an epoch has.
    TrainerConfig: _rules(
        free="max_epochs precision accelerator devices gradient_clip val_every_epochs early_stop_epochs "
        "checkpoint_every_steps num_pictures report logger"
    ),
    DistillationTrainerConfig: _rules(free="precision accelerator"),
    SplitConfig: _rules(moved="image"),
    BaseDataConfig: _rules(free="num_workers"),
    TileDataConfig: _rules(free="augment", measured="mean std"),
    SegmentationSplitConfig: _rules(moved="labels"),
    SegmentationDataConfig: _rules(free="sampler"),
    DetectionSplitConfig: _rules(moved="labels names"),
    DetectionDataConfig: _rules(free="sampler random_share min_visible"),
    ClassificationSplitConfig: _rules(moved="labels"),
    ClassificationDataConfig: _rules(free="sampler", measured="classes"),
    SlideClassificationSplitConfig: _rules(free="image", moved="labels"),
    SlideClassificationDataConfig: _rules(
        free="max_windows embeddings embed_batch_size augment on_error", measured="classes mean std"
    ),
}
"""Rules by the class that declares the fields; those of base classes hold for their subclasses, too."""


def changes(config: Any, before: Mapping[str, Any], prefix: str = "") -> Iterator[Change]:
    """Changes that a resumed run may not make.

    Args:
        config: a dataclass, nested ones included.
        before: the same as `dataclasses.asdict` gave it when the run was trained.
        prefix: of the keys.
    """
    for field in fields(config):
        value, old = getattr(config, field.name), before.get(field.name)
        if not _may_change(type(config), field.name, old, value):
            yield from _differences(f"{prefix}{field.name}", old, value)


def same(first: Any, second: Any) -> bool:
    """Whether two values of configs or checkpoints mean the same.

    Lists equal tuples; numbers may differ by rounding, as measured statistics do from machine to machine.
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, float) and isinstance(second, int | float):
        return math.isclose(first, second, rel_tol=1e-6) or (math.isnan(first) and math.isnan(second))
    return bool(first == second)


def _may_change(owner: type, name: str, old: Any, value: Any) -> bool:
    rules = [RULES[each] for each in owner.__mro__ if each in RULES]
    if any(name in each.free for each in rules):
        return True
    if any(name in each.moved for each in rules):
        return (old is None) == (value is None)
    return any(name in each.measured for each in rules) and (old is None or value is None)


def _differences(key: str, old: Any, value: Any) -> Iterator[Change]:
    if is_dataclass(value) and isinstance(old, Mapping):
        yield from changes(value, old, f"{key}.")
    elif isinstance(value, list) and isinstance(old, list) and len(value) == len(old) and any(map(is_dataclass, value)):
        for number, pair in enumerate(zip(old, value, strict=True)):
            yield from _differences(f"{key}.{number}", *pair)
    else:
        plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        if not same(old, plain):
            yield key, old, plain


RUN_KEY = "perf_vit_run"
"""Where the run lies inside a Lightning checkpoint."""

# Training decides it.
_LEARNT = {"score_threshold"}


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
            self._run = dict(content[RUN_KEY])
            self._config = dict(self._run["config"])
            self._spec = content.get(CHECKPOINT_KEY, {}).get("spec")
            self._num_steps = int(content["global_step"])
            self._num_epochs = int(content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])

    @property
    def precision(self) -> str:
        """The precision that the run was trained in.

        Raises:
            CheckpointError: the config has none.
        """
        with parsing(self.path, "the checkpoint of a run", CheckpointError):
            return str(self._config["trainer"]["precision"])

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
        except PerfVitError:
            raise
        except Exception as error:
            # Too little memory is no fault of the checkpoint.
            if batches.any_done or is_out_of_memory(error):
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
    if not isinstance(content, dict) or RUN_KEY not in content:
        raise CheckpointError(
            f"{path} doesn't hold the config that it was trained with, so it can't be resumed; train in another out="
        )
    return content
