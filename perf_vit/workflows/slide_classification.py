"""Slide classifiers on the command line: train, predict, evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from perf_vit.data import (
    EmbeddingStore,
    SlideClassificationDataModule,
    SlideTargets,
    given_normalizer,
    read_slide_table,
    read_slides,
)
from perf_vit.errors import ConfigError
from perf_vit.inference import SlideClassificationPredictOptions, SlideClassificationPredictor
from perf_vit.metrics import ClassificationMetrics, ClassificationScores, RegressionScores
from perf_vit.models import SlideClassificationSpec, SlideClassifier, pretrained_statistics
from perf_vit.sources import open_input
from perf_vit.tasks import SLIDE_CURVES, SLIDE_MONITOR, SlideClassificationTask, build_trainer
from perf_vit.transforms import InputBands, Normalizer
from perf_vit.types import GeoImage, InputOptions
from perf_vit.workflows.progress import show, windows_progress
from perf_vit.workflows.reports import image_tables, write_image_report
from perf_vit.workflows.run_config import SlideClassificationRun
from perf_vit.workflows.run_folder import RunFolder

__all__ = ["evaluate_slide_classifier", "report_slide_classifier", "train_slide_classifier"]

_EMBEDDINGS = "embeddings"
"""Folder of a run's features."""

_STATISTICS_PX = 1024
# Slides that stand for all where only the range of colours is measured.
_RANGE_SLIDES = 8


def train_slide_classifier(config: SlideClassificationRun, *, progress: bool = True) -> Path:
    """Embed all slides, train a classifier of bags, and leave both in the run folder.

    Tables, slides' names and network are checked before the folder is touched. Features that are there already, of an
    interrupted run or in `data.embeddings`, are not computed again.

    Returns:
        The best checkpoint by validation loss.

    Raises:
        PerfVitError: a config, input or output that doesn't fit.
    """
    if config.trainer.redraw_every_steps:
        raise ConfigError("trainer.redraw_every_steps would change the encoder that features were made with; use 0")
    if config.trainer.num_pictures:
        raise ConfigError("trainer.num_pictures must be 0: a slide is a bag of features here, which nobody could draw")
    if (config.optim.layer_decay, config.optim.backbone_lr_scale) != (1.0, 1.0):
        raise ConfigError("optim.layer_decay and optim.backbone_lr_scale are of trained encoders; leave them out")
    run = RunFolder(config)
    train, val = read_slides(config.data, config.seed)
    task = SlideClassificationTask(config.model, _spec(config, train), config.optim)
    # Before features of other windows are added to the run folder.
    run.check_network(task)
    trainer = build_trainer(
        config.trainer, run.path, progress=progress, monitor=SLIDE_MONITOR, curves=SLIDE_CURVES, seed=config.seed
    )
    store = _store(task.model, config.data.embeddings or run.path / _EMBEDDINGS)
    device = "cpu" if config.trainer.accelerator == "cpu" else "auto"
    options = SlideClassificationPredictOptions(batch_size=config.data.embed_batch_size, device=device)
    _embed_all(SlideClassificationPredictor(task.model, options), store, [*train.paths, *val.paths])
    run.fit(trainer, task, SlideClassificationDataModule.of(config.data, train, val, store, config.seed))
    return run.best


def report_slide_classifier(
    checkpoint: Path, slides: Path, labels: Path, report: Path | None, options: SlideClassificationPredictOptions
) -> None:
    """Write a classifier's scores on labelled slides, with pictures of confusion and precision, and print them."""
    scores = evaluate_slide_classifier(checkpoint, slides, labels, options)
    if report is not None:
        write_image_report(scores, report)
    show(*image_tables(scores, title=f"{slides.name} against {labels.name}"))


def evaluate_slide_classifier(
    checkpoint: Path, slides: Path, labels: Path, options: SlideClassificationPredictOptions | None = None
) -> ClassificationScores | RegressionScores:
    """Score a classifier on labelled slides; features that its run made are used again.

    Args:
        checkpoint: that `perf-vit train` wrote.
        slides: folder that the names of the CSV are relative to.
        labels: a CSV file with the columns slide and label.
        options: of the prediction.

    Raises:
        PerfVitError: labels or slides that can't be read or don't fit.
    """
    predictor = SlideClassificationPredictor(checkpoint, options or SlideClassificationPredictOptions())
    model = predictor.model
    columns = model.spec.label_options
    targets = read_slide_table(labels, slides, model.spec.classes, **columns)
    store = _store(model, checkpoint.absolute().parents[1] / _EMBEDDINGS)
    metrics = ClassificationMetrics(model.spec.classes, "single_label")
    for number, (path, label) in enumerate(zip(targets.paths, targets.labels.tolist(), strict=True), 1):
        if store.has(path):
            found = store.read(path)
        else:
            with windows_progress(f"slide {number} of {len(targets)}") as on_window:
                found = predictor.embed(path, on_window)
        probabilities, _ = predictor.classify(found)
        metrics.update(torch.from_numpy(probabilities)[None], torch.tensor([label]))
    return metrics.summary(with_curves=True)


def _store(model: SlideClassifier, folder: str | Path) -> EmbeddingStore:
    spec = model.spec
    names = ("tile_px", "mpp", "bands", "tissue", "min_tissue", "slide_mpp")
    return EmbeddingStore(folder, model.encoder_id(), {name: getattr(spec, name) for name in names})


def _embed_all(predictor: SlideClassificationPredictor, store: EmbeddingStore, paths: Sequence[str]) -> None:
    missing = [path for path in paths if not store.has(path)]
    for number, path in enumerate(missing, 1):
        with windows_progress(f"embedding {Path(path).name}, {number} of {len(missing)}") as on_window:
            found = predictor.embed(path, on_window)
        store.write(path, found.features, found.windows)


def _spec(config: SlideClassificationRun, train: SlideTargets) -> SlideClassificationSpec:
    data, options = config.data, InputOptions.from_config(config.data)
    first = open_input(train.paths[0], options)
    given = given_normalizer(data.mean, data.std, first.num_bands)
    if first.num_bands == 3 and first.dtype == np.uint8:
        # Those that the encoder knows: they don't depend on the slides, so features stay valid when there are more.
        normalizer = pretrained_statistics(config.model.backbone)
        images = [_reduced(path, options) for path in train.paths[:_RANGE_SLIDES]]
    else:
        images = [_reduced(path, options) for path in train.paths]
        normalizer = Normalizer.from_images(images, first.band_names)
    first.close()
    return SlideClassificationSpec.from_data_config(
        data,
        train,
        normalizer=given or normalizer,
        trained_on=InputBands.measured(images, first.band_names),
        label_options={"image_column": data.image_column, "label_column": data.label_column},
    )


def _reduced(path: str, options: InputOptions) -> GeoImage:
    source = open_input(path, options)
    image = source.read_reduced(_STATISTICS_PX)
    source.close()
    return image
