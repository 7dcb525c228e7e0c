"""`perf-vit fit-tile`: the largest tile that a config can be trained on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from perf_vit.config import config_value, load_config
from perf_vit.data import build_detection_datamodule, build_segmentation_datamodule
from perf_vit.errors import ConfigError
from perf_vit.models import detector_kind
from perf_vit.tasks import TileFit, TrainingSteps, fit_max_tile
from perf_vit.workflows.progress import say
from perf_vit.workflows.run_config import DetectionRun, SegmentationRun

__all__ = ["fit_tile_from_config", "parse_bytes"]

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def fit_tile_from_config(
    config: str, overrides: Sequence[str], *, memory: str | None, batch_size: int | None, max_tile_px: int
) -> TileFit:
    """Try training steps of a config on growing tiles and print what they take.

    Args:
        config: of a segmentation or detection run, whose data must be there: they have the bands and classes.
        overrides: key=value.
        memory: such as 16GB; what is free if None.
        batch_size: tiles a step; the config's if None.
        max_tile_px: the largest side to try.

    Raises:
        PerfVitError: a config or input that doesn't fit, one of another task, or too little memory for any tile.
    """
    limit = None if memory is None else parse_bytes(memory)
    steps = _training_steps(config, overrides)
    steps = steps if batch_size is None else replace(steps, batch_size=batch_size)
    return fit_max_tile(steps, limit, max_tile_px=max_tile_px, on_measured=_print_peak)


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 16GB, 500MB or 1.5GiB.

    Raises:
        ConfigError: no such size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([MGT]I?B)\s*", text.upper())
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"expected memory as 16GB, 500MB or 1.5GiB, got {text}")
    return int(float(match[1]) * _UNITS[match[2]])


def _training_steps(config: str, overrides: Sequence[str]) -> TrainingSteps:
    # Nothing is written, so a run folder is not asked for.
    given = ["out=.", *overrides]
    task = config_value(config, "task", overrides, "segmentation")
    if task not in ("segmentation", "detection"):
        raise ConfigError(f"fit-tile takes configs of segmentation and detection, got one of {task}: {config}")
    if task == "detection":
        run = load_config(config, DetectionRun, given)
        objects = build_detection_datamodule(
            run.data, run.seed, oriented=detector_kind(run.model.head) == "oriented_boxes"
        )
        records = list(objects.train_index)
        pixels = sum(record.extent.height * record.extent.width for record in records)
        return TrainingSteps(
            model=run.model,
            optim=run.optim,
            trainer=run.trainer,
            num_bands=len(objects.normalizer.mean),
            classes=objects.classes,
            batch_size=run.data.batch_size,
            objects_per_mpx=1e6 * sum(len(record.labels) for record in records) / pixels,
        )
    maps = load_config(config, SegmentationRun, given)
    # No tile is read, so no places of them need be found.
    data = build_segmentation_datamodule(replace(maps.data, sampler="random"), maps.seed)
    return TrainingSteps(
        model=maps.model,
        # Weights that are to be measured take no more memory than any others.
        optim=replace(maps.optim, class_weights=None),
        trainer=maps.trainer,
        num_bands=len(data.normalizer.mean),
        classes=data.classes,
        batch_size=maps.data.batch_size,
        multilabel=maps.data.multilabel,
    )


def _print_peak(tile_px: int, peak_bytes: int | None) -> None:
    say(f"{tile_px} px: " + ("out of memory" if peak_bytes is None else f"{peak_bytes / 1e9:.2f} GB"))
