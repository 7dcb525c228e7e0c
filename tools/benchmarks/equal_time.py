"""Train a detector for a given CPU time of training steps, validation apart, and score it on whole test images.

    python tools/benchmarks/equal_time.py configs/detection/cells_bccd.yaml --minutes 3 --out runs/vit \
        --test-images BCCD/JPEGImages --test-labels BCCD/Annotations --test-names splits/cells/test.txt \
        data.train.image=BCCD/JPEGImages ... model.backbone=dinov2_linear model.patch_size=16

A few steps on a network that is thrown away tell the time of a tile, and with it how many tiles fit the budget; then
the run is that of `perf-vit train` with `data.tiles_per_epoch` set to that number. The time that training took is
measured and stored with the scores in `row.json`: from the start of each epoch to its validation, loading and
augmentation included. With `--minutes 0`, only the time of a tile is printed. The last epoch alone is validated unless
`trainer.val_every_epochs` says otherwise.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from perf_vit.config import load_config
from perf_vit.tasks import DetectionTask
from perf_vit.workflows.detection import build_detection_data, build_detection_task
from perf_vit.workflows.evaluate import evaluate
from perf_vit.workflows.registry import TASKS, register_task
from perf_vit.workflows.run_config import DetectionRun
from perf_vit.workflows.train import train_run

NUM_PROBED = 5
TIMED = "timed_detection"


def main(
    config: Annotated[str, typer.Argument(help="A detection config.")],
    out: Annotated[Path, typer.Option(help="Run folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Of the config, as key=value.")] = None,
    minutes: Annotated[float, typer.Option(help="CPU time of training, 0 to time a tile only.")] = 3.0,
    test_images: Annotated[list[Path] | None, typer.Option(help="Test images; repeatable.")] = None,
    test_labels: Annotated[list[Path] | None, typer.Option(help="Labels of each.")] = None,
    test_names: Annotated[Path | None, typer.Option(help="Names of the test images; all by default.")] = None,
    window_size: Annotated[int | None, typer.Option(help="Window of the test images.")] = None,
) -> None:
    """Train within the budget and print the row."""
    fixed = ["trainer.val_every_epochs=1000", "trainer.report=false", "trainer.num_pictures=0"]
    given = [*fixed, *(overrides or []), f"out={out}"]
    run = load_config(config, DetectionRun, given)
    seconds = seconds_per_tile(run)
    print(f"{seconds:.3f} s a tile", flush=True)
    if not minutes:
        return
    tiles = max(run.data.batch_size, round(60 * minutes / seconds / run.trainer.max_epochs))
    more = [f"data.tiles_per_epoch={tiles}", f"task={TIMED}"]
    task = register_timed()
    train_run(load_config(config, DetectionRun, [*given, *more]), progress=False)
    row: dict[str, Any] = {"overrides": overrides, "tiles": tiles * run.trainer.max_epochs, "train_s": task.seconds}
    (out / "row.json").write_text(json.dumps(row, indent=2) + "\n")
    for images, labels in zip(test_images or [], test_labels or [], strict=True):
        start = time.process_time()
        model, options = out / "checkpoints" / "best.ckpt", {"names": test_names, "window_size": window_size}
        found: Any = evaluate(model, images, labels, progress=False, device="cpu", precision="bf16", **options)
        row[labels.stem] = {**found.scores.to_dict(), "test_s": time.process_time() - start}
        (out / "row.json").write_text(json.dumps(row, indent=2) + "\n")
        print(f"{labels.stem}: AP50 {found.scores.ap50:.3f}, AP {found.scores.ap:.3f}")
    print(f"{row['tiles']:,} tiles in {row['train_s']:.0f} s")


def seconds_per_tile(run: DetectionRun) -> float:
    """CPU time of loading and training a tile, without the optimizer's step."""
    torch.manual_seed(run.seed)
    data = build_detection_data(run)
    model = build_detection_task(run, data).model.train()
    times = [time.process_time()]
    for images, labels, valid in islice(data.train_dataloader(), NUM_PROBED):
        with torch.autocast("cpu", torch.bfloat16, enabled=run.trainer.precision.startswith("bf16")):
            losses = model.losses(images, labels, valid)
        torch.stack(list(losses.values())).sum().backward()
        times.append(time.process_time())
    # The first step also chooses algorithms.
    return (times[-1] - times[1]) / (NUM_PROBED - 1) / run.data.batch_size


class Stopwatch:
    """CPU time between the start of each epoch and its validation."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start: float | None = None

    def start(self) -> None:
        self._start = time.process_time()

    def stop(self) -> None:
        if self._start is not None:
            self.seconds += time.process_time() - self._start
        self._start = None


def register_timed() -> Stopwatch:
    """Register the task `timed_detection`, whose training steps run by the stopwatch."""
    watch = Stopwatch()

    def build(config: DetectionRun, data: Any) -> DetectionTask:
        module: Any = build_detection_task(config, data)
        module.on_train_epoch_start = watch.start
        module.on_validation_start = watch.stop
        module.on_train_epoch_end = watch.stop
        return module

    register_task(replace(TASKS["detection"], name=TIMED, build_module=build))
    return watch


if __name__ == "__main__":
    typer.run(main)
