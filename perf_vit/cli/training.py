"""`perf-vit train`: from a config to a run folder."""

from __future__ import annotations

from pathlib import Path

from perf_vit.cli.class_weights import with_measured_weights
from perf_vit.cli.console import windows_progress
from perf_vit.cli.run_folder import RunFolder
from perf_vit.cli.schemas import SegmentationRun
from perf_vit.data import SegmentationDataModule, build_segmentation_datamodule, label_options
from perf_vit.io import unit_of
from perf_vit.models import SegmentationSpec
from perf_vit.tasks import SegmentationTask, build_trainer, draw_segmentation

__all__ = ["train_segmenter"]


def train_segmenter(config: SegmentationRun, *, progress: bool = True) -> Path:
    """Train a segmenter and leave checkpoints, metrics, curves and the resolved config in the run folder.

    Everything is opened and built before the folder is touched, so a wrong argument leaves nothing behind.

    Returns:
        The best checkpoint by mean validation IoU.

    Raises:
        PerfVitError: a config, input or output that doesn't fit.
    """
    run = RunFolder(config)
    data = _build_data(config)
    optim = with_measured_weights(config.optim, data, multilabel=config.data.multilabel)
    task = SegmentationTask(config.model, _spec(config, data), optim)
    trainer = build_trainer(config.trainer, run.path, progress=progress, draw=draw_segmentation, seed=config.seed)
    run.fit(trainer, task, data)
    return run.best


def _build_data(config: SegmentationRun) -> SegmentationDataModule:
    if config.data.sampler != "balanced":
        return build_segmentation_datamodule(config.data, config.seed)
    with windows_progress("looking for pixels of the classes") as on_window:
        return build_segmentation_datamodule(config.data, config.seed, on_window)


def _spec(config: SegmentationRun, data: SegmentationDataModule) -> SegmentationSpec:
    return SegmentationSpec.from_data_config(
        config.data,
        data,
        resolution_unit=None if config.data.resolution is None else unit_of(data.train.sources[0].source.crs),
        # Outlines are those of one slide.
        tissue="otsu" if config.data.tissue == "otsu" else None,
        label_options=label_options(config.data),
    )
