"""Memory of training steps, measured in a separate process by `main`."""

from __future__ import annotations

import gc
import math
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor

from perf_vit.distributed import training_precision
from perf_vit.errors import ConfigError, PerfVitError, is_out_of_memory
from perf_vit.models import DetectionModelConfig, DetectionSpec, SegmentationModelConfig, SegmentationSpec
from perf_vit.tasks.detection import DetectionOptimConfig, DetectionTask
from perf_vit.tasks.optim import TrainingTask, WeightAverage
from perf_vit.tasks.segmentation import SegmentationOptimConfig, SegmentationTask
from perf_vit.tasks.trainer import TrainerConfig
from perf_vit.transforms import Normalizer
from perf_vit.types import ObjectLabels

__all__ = [
    "TileFit",
    "TrainingSteps",
    "available_memory",
    "fit_max_tile",
    "largest_fitting",
    "main",
    "make_task",
    "training_peak",
]

# The first step creates the optimizer states; the second one holds them in addition to activations.
_NUM_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class TrainingSteps:
    """Training setup whose memory is measured.

    Attributes:
        model: Network config.
        trainer: Precision, accelerator and weight averaging.
        num_bands: Number of bands of a tile.
        classes: Class names.
        optim: Optimizer and loss; None for the defaults.
        tile_px: Tile size in pixels.
        batch_size: Number of tiles per step.
        multilabel: Whether a pixel may have several classes.
        objects_per_mpx: Labelled objects per million pixels, for detectors.
    """

    model: SegmentationModelConfig | DetectionModelConfig
    trainer: TrainerConfig
    num_bands: int
    classes: tuple[str, ...]
    optim: SegmentationOptimConfig | DetectionOptimConfig | None = None
    tile_px: int = 224
    batch_size: int = 1
    multilabel: bool = False
    objects_per_mpx: float = 100.0


def make_task(steps: TrainingSteps) -> TrainingTask:
    """Build the task with random weights."""
    statistics = Normalizer((0.0,) * steps.num_bands, (1.0,) * steps.num_bands)
    spec: dict[str, Any] = {"classes": steps.classes, "normalizer": statistics, "tile_px": steps.tile_px}
    model: Any = replace(steps.model, pretrained=False)
    optim: Any = steps.optim
    if isinstance(model, DetectionModelConfig):
        return DetectionTask(model, DetectionSpec(**spec), optim or DetectionOptimConfig())
    return SegmentationTask(
        model, SegmentationSpec(**spec, multilabel=steps.multilabel), optim or SegmentationOptimConfig()
    )


def training_peak(steps: TrainingSteps) -> int | None:
    """Return the peak memory in bytes of this process after a few training steps, None if it ran out of memory.

    On a GPU this is the memory that PyTorch reserved, else resident memory including Python and its packages.
    """
    config = steps.trainer
    trainer = lightning.Trainer(
        accelerator=config.accelerator,
        devices=1,
        precision=training_precision(config.precision, config.accelerator),
        gradient_clip_val=config.gradient_clip or None,
        callbacks=[WeightAverage(decay=config.ema_decay)] if config.ema_decay else [],
        max_steps=_NUM_STEPS,
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(make_task(steps), _Batches(steps))
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return None
        raise
    device = trainer.strategy.root_device
    gc.collect()
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _resident_peak()


class _Batches:
    """Identical batches, one per step."""

    def __init__(self, steps: TrainingSteps) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return _NUM_STEPS

    def __iter__(self) -> Any:
        yield from (self._batch() for _ in range(_NUM_STEPS))

    def _batch(self) -> tuple[Tensor | list[Tensor], Any, Tensor | list[Tensor]]:
        steps, size = self.steps, self.steps.tile_px
        images = torch.randn(steps.batch_size, steps.num_bands, size, size)
        # Attention takes at least as much memory with a mask as without.
        valid = torch.ones(steps.batch_size, size, size, dtype=torch.bool)
        valid[:, :, size // 2 :] = False
        if isinstance(steps.model, DetectionModelConfig):
            with_masks = steps.model.head == "mask_rcnn"
            labels = [_objects(size, steps.objects_per_mpx, with_masks=with_masks) for _ in range(steps.batch_size)]
            return list(images), labels, list(valid)
        num_classes = len(steps.classes)
        if steps.multilabel:
            return images, torch.randint(0, 2, (steps.batch_size, num_classes, size, size)), valid
        return images, torch.randint(0, num_classes, (steps.batch_size, size, size)), valid


def _objects(size: int, per_mpx: float, *, with_masks: bool) -> ObjectLabels:
    number = max(1, round(per_mpx * size**2 / 1e6))
    rng = np.random.default_rng(0)
    side = min(24, size // 2)
    corners = rng.integers(0, size - side, (number, 2))
    masks = None
    if with_masks:
        masks = np.zeros((number, size, size), bool)
        for mask, (x, y) in zip(masks, corners, strict=True):
            mask[y : y + side, x : x + side] = True
    centers = corners + side / 2
    oriented = np.concatenate([centers, np.full((number, 2), side), np.zeros((number, 1))], axis=1)
    return ObjectLabels(
        labels=np.zeros(number, np.int64),
        boxes_xyxy=np.concatenate([corners, corners + side], axis=1).astype(np.float32),
        oriented_boxes=oriented.astype(np.float32),
        ignored=np.zeros(number, bool),
        masks=masks,
    )


def _resident_peak() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        # `ru_maxrss` starts at the resident memory of the parent process.
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    # Not available on every system.
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Measure the pickled steps from stdin and write the peak to the file given as argument."""
    steps = pickle.load(sys.stdin.buffer)
    Path(sys.argv[1]).write_text(str(training_peak(steps)), encoding="utf-8")


_FIRST_PX = 224

_MAX_MEASUREMENTS = 12


@dataclass(frozen=True, kw_only=True)
class TileFit:
    """Largest tile that fits, and all measurements.

    Attributes:
        tile_px: Tile size in pixels.
        peak_bytes: Peak memory of training on this tile, in bytes.
        memory_bytes: Memory limit in bytes.
        peaks: Peak memory in bytes by tile size; None where memory ran out.
    """

    tile_px: int
    peak_bytes: int
    memory_bytes: int
    peaks: dict[int, int | None]


def fit_max_tile(
    steps: TrainingSteps,
    memory_bytes: int | None = None,
    *,
    max_tile_px: int = 8192,
    on_measured: Callable[[int, int | None], None] | None = None,
) -> TileFit:
    """Find the largest tile, a multiple of the patch size, on which training steps fit into memory.

    Each size is tried in a separate process with random weights, tiles and labels, and with the configured precision,
    weight averaging and activation checkpointing. As the memory of linear attention grows with the number of pixels,
    two sizes predict the next one to try; the result itself was tried. Loader processes take additional memory.

    Args:
        steps: Training setup; its tile size is not used.
        memory_bytes: Memory limit in bytes, of the GPU or of resident memory with Python and its packages; None for the
            free memory.
        max_tile_px: Maximum tile size in pixels.
        on_measured: Function called with each tile size and its peak in bytes, None if memory ran out.

    Raises:
        ConfigError: Not even the smallest tile fits, or the network can't be built.
        PerfVitError: The steps fail for another reason.
    """
    multiple = int(make_task(replace(steps, tile_px=_FIRST_PX)).model.size_multiple)
    memory_bytes = available_memory(steps.trainer.accelerator) if memory_bytes is None else memory_bytes

    def measure(tile_px: int) -> int | None:
        peak = _peak_in_process(replace(steps, tile_px=tile_px))
        if on_measured is not None:
            on_measured(tile_px, peak)
        return peak

    return largest_fitting(measure, memory_bytes, multiple, max_tile_px)


def largest_fitting(
    measure: Callable[[int], int | None], memory_bytes: int, multiple: int, max_tile_px: int
) -> TileFit:
    """Find the largest tile size whose measured peak fits; the search assumes a peak linear in the number of pixels.

    Args:
        measure: Function that returns the peak of a tile size in bytes, None if memory ran out.
        memory_bytes: Memory limit in bytes.
        multiple: Tile sizes are multiples of this number of pixels.
        max_tile_px: Maximum tile size in pixels.

    Raises:
        ConfigError: No size fits.
    """
    peaks: dict[int, int | None] = {}
    most = max(1, max_tile_px // multiple)
    count: int | None = min(most, max(1, _FIRST_PX // multiple))
    while count is not None and len(peaks) < _MAX_MEASUREMENTS:
        peaks[count] = measure(count * multiple)
        count = _next_count(peaks, memory_bytes, most)
    fitting = [count for count, peak in peaks.items() if _fits(peak, memory_bytes)]
    if not fitting:
        raise ConfigError(
            f"training on tiles of {min(peaks) * multiple} px takes more than {memory_bytes / 1e9:.2f} GB; choose a "
            "smaller model or batch, model.grad_checkpointing=true, or more memory"
        )
    best = max(fitting)
    return TileFit(
        tile_px=best * multiple,
        peak_bytes=peaks[best] or 0,
        memory_bytes=memory_bytes,
        peaks={count * multiple: peak for count, peak in sorted(peaks.items())},
    )


def available_memory(accelerator: str) -> int:
    """Return the free memory in bytes of an accelerator's device.

    Raises:
        ConfigError: The system doesn't report it.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration) as error:
        raise ConfigError("this system doesn't say how much memory is free; give it with `memory=16GB`") from error


def _fits(peak: int | None, memory_bytes: int) -> bool:
    return peak is not None and peak <= memory_bytes


def _next_count(peaks: dict[int, int | None], memory_bytes: int, most: int) -> int | None:
    """Return the next tile size to try in patches; None if the result is known."""
    low = max((count for count, peak in peaks.items() if _fits(peak, memory_bytes)), default=0)
    high = min((count for count, peak in peaks.items() if not _fits(peak, memory_bytes)), default=most + 1)
    if high - low <= 1:
        return None
    if low == 0:
        return high // 2
    foretold = _foretold_count(peaks, memory_bytes)
    if foretold is None:
        foretold = (low + high) // 2 if high <= most else 2 * low
    elif foretold <= low:
        return None
    # Twice the size takes four times the memory, so predictions from small tiles aren't trusted any further.
    return min(max(foretold, low + 1), 2 * low, high - 1)


def _foretold_count(peaks: dict[int, int | None], memory_bytes: int) -> int | None:
    """Predict the largest size in patches that fits, by linear extrapolation of the two largest measured peaks."""
    measured = sorted((count, peak) for count, peak in peaks.items() if peak is not None)[-2:]
    ran_out = any(peak is None for peak in peaks.values())
    if len(measured) < 2 or ran_out:
        return None
    (first, first_peak), (second, second_peak) = measured
    slope = (second_peak - first_peak) / (second**2 - first**2)
    if slope <= 0:
        return None
    return math.isqrt(max(0, int((memory_bytes - first_peak) / slope + first**2)))


def _peak_in_process(steps: TrainingSteps) -> int | None:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "peak")
        done = subprocess.run(
            [sys.executable, "-c", "from perf_vit.tasks.memory import main; main()", str(answer)],
            input=pickle.dumps(steps),
            capture_output=True,
            check=False,
            # The same modules as here, not those of the current folder, which may hold someone else's data.
            env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        )
        # The system kills a process that runs out of memory.
        if done.returncode == -9:
            return None
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            raise PerfVitError(f"training on tiles of {steps.tile_px} px fails: {lines[-1] if lines else 'no message'}")
        text = answer.read_text(encoding="utf-8")
    return None if text == "None" else int(text)
