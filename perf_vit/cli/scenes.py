"""Networks that say one thing of a whole image, on the command line: train, predict, evaluate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perf_vit.cli.console import say, show, windows_progress
from perf_vit.cli.image_reports import image_tables, write_image_report
from perf_vit.cli.run_folder import RunFolder
from perf_vit.cli.schemas import ClassificationRun, RegressionRun
from perf_vit.cli.segmentation_maps import on_device, resolved_precision
from perf_vit.cli.tables import write_rows
from perf_vit.data import (
    ClassificationDataConfig,
    ImageSplitConfig,
    RegressionDataConfig,
    SceneDataModule,
    SceneImages,
    SceneViews,
    build_scene_datamodule,
    collate_tiles,
    middle_window,
    read_image_targets,
    scene_tile,
)
from perf_vit.errors import InputError, OutputError
from perf_vit.inference import find_paths
from perf_vit.io import check_outputs
from perf_vit.models import Classifier, ClassifierSpec, load_classifier
from perf_vit.tasks import (
    CLASSIFICATION_CURVES,
    CLASSIFICATION_MONITOR,
    REGRESSION_CURVES,
    REGRESSION_MONITOR,
    ClassificationScores,
    ImageMetrics,
    RegressionScores,
    SceneTask,
    build_trainer,
    draw_scene,
)
from perf_vit.transforms import InputCheck, without_tiny

__all__ = ["evaluate_scenes", "predict_scenes", "report_scenes", "train_scenes"]


def train_scenes(config: ClassificationRun | RegressionRun, *, progress: bool = True) -> Path:
    """Train a classifier of images and leave checkpoints, metrics, curves and the resolved config in the run folder.

    Everything is opened and built before the folder is touched, so a wrong argument leaves nothing behind.

    Returns:
        The best checkpoint: by F1, mean over the classes, or by R2, mean over the numbers.

    Raises:
        PerfVitError: a config, input or output that doesn't fit.
    """
    run = RunFolder(config)
    data = build_scene_datamodule(config.data, config.seed)
    task = SceneTask(config.model, _spec(config, data), config.optim)
    is_regression = isinstance(config, RegressionRun)
    trainer = build_trainer(
        config.trainer,
        run.path,
        progress=progress,
        monitor=REGRESSION_MONITOR if is_regression else CLASSIFICATION_MONITOR,
        curves=REGRESSION_CURVES if is_regression else CLASSIFICATION_CURVES,
        draw=draw_scene,
        seed=config.seed,
    )
    run.fit(trainer, task, data)
    return run.best


def predict_scenes(
    checkpoint: Path,
    inputs: Sequence[str],
    output: Path,
    *,
    path_column: str = "path",
    skip_errors: bool = False,
    overwrite: bool = False,
    batch_size: int = 1,
    device: str = "auto",
    precision: str = "32",
) -> None:
    """Write a CSV file with a row an image: its class and the probability of each, or its numbers.

    Args:
        checkpoint: that `perf-vit train` wrote.
        inputs: images, folders, globs and lists.
        output: the CSV file.
        path_column: of lists.
        skip_errors: leave the row of an image that can't be read empty but for the column `error`.
        overwrite: replace a CSV file that exists.
        batch_size: images a forward pass.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: 32, bf16 or 16.

    Raises:
        InputError: an image can't be read, or with `skip_errors` none.
        PerfVitError: an input or output that doesn't fit.
    """
    if output.suffix.lower() != ".csv":
        raise OutputError(f"what whole images show is written as CSV: --output must end in .csv, got {output}")
    paths = find_paths(inputs, path_column=path_column)
    lists = [each for each in inputs if Path(each).is_file()]
    check_outputs([output], [checkpoint, *lists, *paths], overwrite=overwrite)
    model = load_classifier(checkpoint)
    forward = _Forward(model, device, precision)
    errors: dict[str, str] = {}
    found: dict[str, list[float]] = {}
    with windows_progress("predicting", "images") as on_image:
        for batch in _batches(_tiles(model.spec, paths, errors if skip_errors else None), batch_size):
            names, tiles = zip(*batch, strict=True)
            found.update(zip(names, forward(*collate_tiles(tiles)).tolist(), strict=True))
            on_image(len(found) + len(errors), len(paths))
    if not found:
        raise InputError(f"none of {len(paths)} images could be read, the first: {next(iter(errors.values()))}")
    write_rows(output, _header(model.spec, bool(errors)), _rows(model.spec, paths, found, errors))
    left_out = f", {len(errors)} could not be read" if errors else ""
    say(f"{len(found):,} images{left_out}: {output}")


def report_scenes(checkpoint: Path, images: Path, labels: Path | None, report: Path | None, **options: Any) -> None:
    """Write a network's scores on labelled images, with pictures of confusion and precision, and print them."""
    scores = evaluate_scenes(checkpoint, images, labels, **options)
    if report is not None:
        write_image_report(scores, report)
    show(*image_tables(scores, title=f"{images.name} against {labels.name if labels else 'its folders'}"))


def evaluate_scenes(
    checkpoint: Path,
    images: Path,
    labels: Path | None,
    *,
    batch_size: int = 1,
    device: str = "auto",
    precision: str = "32",
) -> ClassificationScores | RegressionScores:
    """Score a network on labelled images.

    Args:
        checkpoint: that `perf-vit train` wrote.
        images: a folder.
        labels: a CSV file as in training; None for folders by class.
        batch_size: images a forward pass.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: 32, bf16 or 16.

    Raises:
        PerfVitError: labels or images that can't be read or don't fit.
    """
    model = load_classifier(checkpoint)
    spec = model.spec
    split = ImageSplitConfig(image=str(images), labels=None if labels is None else str(labels))
    columns = dict(spec.label_options)
    if spec.kind == "regression":
        config: Any = RegressionDataConfig(train=split, targets=list(spec.classes), **columns)
        labelled = read_image_targets(config, split)
    else:
        config = ClassificationDataConfig(train=split, multilabel=spec.kind == "multilabel", **columns)
        labelled = read_image_targets(config, split, names=spec.classes, allow_missing=True)
    images_seen = SceneImages(labelled, partial(spec.open, check=InputCheck(spec.trained_on)))
    views = SceneViews(images_seen, spec.normalizer, tile_px=spec.tile_px, resize=spec.resize)
    metrics = ImageMetrics(spec.classes, spec.kind)
    forward = _Forward(model, device, precision)
    done = 0
    with windows_progress(f"evaluating {images.name}", "images") as on_image:
        for batch in _batches((views[index] for index in range(len(views))), batch_size):
            tiles, targets, valid = collate_tiles(batch)
            metrics.update(forward(tiles, valid), targets)
            done += len(batch)
            on_image(done, len(views))
    return metrics.summary(with_curves=True)


class _Forward:
    """Tiles through a network on its device, to probabilities or numbers on the CPU."""

    def __init__(self, model: Classifier, device: str, precision: str) -> None:
        self._model = model
        self._dtype = resolved_precision(precision)
        self._device = torch.device(on_device(model, device))

    def __call__(self, tiles: Tensor, valid: Tensor | None) -> Tensor:
        """Scores [B, K] of tiles [B, C, tile_px, tile_px] and their valid pixels [B, tile_px, tile_px]."""
        autocast = torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32)
        with torch.inference_mode(), autocast:
            logits = self._model(tiles.to(self._device), None if valid is None else valid.to(self._device))
        return self._model.scores(logits).cpu()


def _tiles(
    spec: ClassifierSpec, paths: Sequence[str], errors: dict[str, str] | None
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Images as the network sees them, with their valid pixels; those that can't be read go to `errors`, if given."""
    check = InputCheck(spec.trained_on)
    for path in paths:
        try:
            source = spec.open(path, check=check)
            window = None if spec.resize else middle_window(source, spec.tile_px)
            tile = scene_tile(source, spec.normalizer, spec.tile_px, window)
            source.close()
        except InputError as error:
            if errors is None:
                raise
            errors[path] = str(error)
            continue
        yield path, (torch.from_numpy(tile[0]), torch.from_numpy(tile[1]))


def _batches(items: Iterable[Any], batch_size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, batch_size)):
        yield batch


def _header(spec: ClassifierSpec, with_errors: bool) -> list[str]:
    leading = {"single_label": ["prediction"], "multilabel": ["predictions"], "regression": []}[spec.kind]
    return ["image", *leading, *spec.classes, *(["error"] if with_errors else [])]


def _rows(
    spec: ClassifierSpec, paths: Sequence[str], found: Mapping[str, list[float]], errors: Mapping[str, str]
) -> Iterator[list[str]]:
    width = len(_header(spec, with_errors=False))
    for path in paths:
        if path in errors:
            yield [path, *[""] * (width - 1), errors[path]]
            continue
        scores = found[path]
        leading = []
        if spec.kind == "single_label":
            leading = [spec.classes[max(range(len(scores)), key=scores.__getitem__)]]
        elif spec.kind == "multilabel":
            leading = [" ".join(name for name, score in zip(spec.classes, scores, strict=True) if score > 0.5)]
        yield [path, *leading, *(f"{score:.6g}" for score in scores), *([""] if errors else [])]


def _spec(config: ClassificationRun | RegressionRun, data: SceneDataModule) -> ClassifierSpec:
    given = config.data
    if isinstance(given, RegressionDataConfig):
        numbers = torch.as_tensor(data.train.images.labelled.targets)
        std = numbers.std(0, correction=0)
        floor = numbers.abs().amax(0) * torch.finfo(torch.float32).eps
        return ClassifierSpec.from_data_config(
            given,
            data,
            classes=data.names,
            kind="regression",
            target_mean=tuple(numbers.mean(0).tolist()),
            target_std=without_tiny(std.tolist(), floor.tolist(), [f"the number {name}" for name in data.names]),
            label_options={"image_column": given.image_column},
        )
    return ClassifierSpec.from_data_config(
        given,
        data,
        classes=data.names,
        kind="multilabel" if given.multilabel else "single_label",
        label_options={"image_column": given.image_column, "label_column": given.label_column},
    )
