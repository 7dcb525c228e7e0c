"""Which keys of a config may change when its run is resumed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

from perf_vit.cli.schemas import (
    RunConfig,
)
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
from perf_vit.models.backbone_config import BackboneConfig
from perf_vit.models.finetune import BackboneTuning
from perf_vit.tasks import (
    ClassificationOptimConfig,
    DistillationOptimConfig,
    DistillationTrainerConfig,
    OptimizerConfig,
    SegmentationOptimConfig,
    TrainerConfig,
)

__all__ = ["RULES", "Change", "Rules", "changes", "same"]

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
    BackboneConfig: _rules(free="pretrained"),
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
        "checkpoint_every_steps num_pictures logger"
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
    SlideClassificationSplitConfig: _rules(moved="labels"),
    SlideClassificationDataConfig: _rules(free="max_windows embeddings embed_batch_size", measured="classes mean std"),
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
