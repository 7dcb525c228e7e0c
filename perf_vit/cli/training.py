"""`perf-vit train`: from a config to a run folder."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import lightning

from perf_vit.cli.console import console
from perf_vit.cli.schemas import SegmentationRun
from perf_vit.config import dump_config
from perf_vit.data import WindowDataModule, build_datamodule, label_options
from perf_vit.errors import ConfigError, OutputError
from perf_vit.models import SegmenterSpec
from perf_vit.tasks import SegmentationTask, build_trainer

__all__ = ["check_run_folder", "make_run_folder", "set_up_logging", "train_segmentation"]


def train_segmentation(config: SegmentationRun, *, progress: bool = True) -> Path:
    """Train a segmenter and leave checkpoints, metrics, curves and the resolved config in the run folder.

    Everything is opened and built before the folder is touched, so a wrong argument leaves nothing behind.

    Returns:
        The best checkpoint by mean validation IoU.

    Raises:
        PerfVitError: a config, input or output that doesn't fit.
    """
    folder = Path(config.out)
    last = folder / "checkpoints" / "last.ckpt"
    check_run_folder(folder, last, resume=config.resume)
    set_up_logging()
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    data = build_datamodule(config.data, config.seed)
    task = SegmentationTask(config.model, _spec(config, data), config.optim)
    trainer = build_trainer(config.trainer, folder, progress=progress)
    make_run_folder(folder)
    dump_config(config, folder / "config.yaml")
    trainer.fit(task, data, ckpt_path=last if config.resume else None, weights_only=True)
    return folder / "checkpoints" / "best.ckpt"


def _spec(config: SegmentationRun, data: WindowDataModule) -> SegmenterSpec:
    return SegmenterSpec(
        classes=data.classes,
        normalizer=data.normalizer,
        tile_px=data.tile_px,
        bands=None if config.data.bands is None else tuple(config.data.bands),
        nodata=config.data.nodata,
        resolution=config.data.resolution,
        label_options=label_options(config.data),
    )


def check_run_folder(folder: Path, last: Path, *, resume: bool) -> None:
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


def make_run_folder(folder: Path) -> None:
    """Make the folder.

    Raises:
        OutputError: it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"can't make the run folder {folder}: {error.strerror}; choose another out=") from error


def set_up_logging() -> None:
    """Show what matters of a run, on a terminal and in a log file."""
    # A terminal has the progress bar; a log file gets a line an epoch.
    if not console.is_terminal:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("perf_vit").setLevel(logging.INFO)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
