"""Slide classifiers on the command line: train, predict, evaluate."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from perf_vit.cli.console import say, show, windows_progress
from perf_vit.cli.image_reports import image_tables, write_image_report
from perf_vit.cli.run_folder import RunFolder
from perf_vit.cli.schemas import SlideRun
from perf_vit.cli.segmentation_maps import on_device, resolved_precision
from perf_vit.cli.tables import write_rows
from perf_vit.data import (
    EmbeddingStore,
    SlideBagModule,
    SlideFeatures,
    SlideTargets,
    given_normalizer,
    read_slide_table,
    read_slides,
    tissue_windows,
)
from perf_vit.errors import ConfigError, InputError, OutputError
from perf_vit.inference import attention_picture, embed_windows, find_paths
from perf_vit.io import check_outputs, open_input, save_png, write_objects
from perf_vit.models import SlideClassifier, SlideSpec, load_slide_classifier, pretrained_statistics
from perf_vit.tasks import (
    SLIDE_CURVES,
    SLIDE_MONITOR,
    ClassificationScores,
    ImageMetrics,
    RegressionScores,
    SlideTask,
    build_trainer,
)
from perf_vit.transforms import InputBands, InputCheck, Normalizer
from perf_vit.types import GeoImage, InputOptions, Source

__all__ = ["evaluate_slides", "predict_slides", "report_slides", "train_slides"]

_EMBEDDINGS = "embeddings"
"""Folder of a run's features."""

_STATISTICS_PX = 1024
# Slides that stand for all where only the range of colours is measured.
_RANGE_SLIDES = 8


def train_slides(config: SlideRun, *, progress: bool = True) -> Path:
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
    task = SlideTask(config.model, _spec(config, train), config.optim)
    # Before features of other windows are added to the run folder.
    run.check_network(task)
    trainer = build_trainer(
        config.trainer, run.path, progress=progress, monitor=SLIDE_MONITOR, curves=SLIDE_CURVES, seed=config.seed
    )
    store = _store(task.model, config.data.embeddings or run.path / _EMBEDDINGS)
    device = "cpu" if config.trainer.accelerator == "cpu" else "auto"
    embedder = _Embedder(task.model, batch_size=config.data.embed_batch_size, device=device)
    _embed_all(embedder, store, [*train.paths, *val.paths])
    run.fit(trainer, task, SlideBagModule.of(config.data, train, val, store, config.seed))
    return run.best


def predict_slides(
    checkpoint: Path,
    inputs: Sequence[str],
    output: Path,
    *,
    slide_mpp: float | None = None,
    tissue: str | None = None,
    path_column: str = "path",
    skip_errors: bool = False,
    overwrite: bool = False,
    **engine: Any,
) -> None:
    """Write a CSV file with a row a slide, and where the classifier looked.

    Attention goes into the folder `OUTPUT_attention`: for each slide a picture, .png, and its windows as QuPath's
    GeoJSON, with the attention as the measurement "score", 1 where it is highest.

    Args:
        checkpoint: that `perf-vit train` wrote.
        inputs: slides, folders, globs and lists.
        output: the CSV file.
        slide_mpp: micrometres per pixel of level 0, where files don't say.
        tissue: "otsu" or a GeoJSON file of outlines, instead of what the classifier was trained with.
        path_column: of lists.
        skip_errors: leave the row of a slide that can't be read empty but for the column `error`.
        overwrite: replace files that exist.
        **engine: batch_size, num_readers, device and precision.

    Raises:
        InputError: a slide can't be read, or with `skip_errors` none.
        PerfVitError: an input or output that doesn't fit.
    """
    if output.suffix.lower() != ".csv":
        raise OutputError(f"what slides show is written as CSV: --output must end in .csv, got {output}")
    folder = output.with_name(f"{output.stem}_attention")
    paths = find_paths(inputs, path_column=path_column, outputs=folder)
    names = _names(paths)
    lists = [each for each in inputs if Path(each).is_file()]
    attention_files = [path for name in names.values() for path in _attention_files(folder / name)]
    check_outputs([output, *attention_files], [checkpoint, tissue, *lists, *paths], overwrite=overwrite)
    model = load_slide_classifier(checkpoint)
    embedder = _Embedder(model, slide_mpp=slide_mpp, tissue=tissue, **engine)
    rows: dict[str, list[str]] = {}
    errors: dict[str, str] = {}
    for path in paths:
        try:
            with windows_progress(f"predicting {Path(path).name}") as on_window:
                found = embedder(path, on_window)
        except InputError as error:
            if not skip_errors:
                raise
            errors[path] = str(error)
            continue
        probabilities, attention = _classify(model, found)
        predicted = int(probabilities.argmax())
        _write_attention(model.spec, embedder.open(path), found, attention, predicted, folder / names[path])
        scores = [f"{value:.6g}" for value in probabilities]
        rows[path] = [path, model.spec.classes[predicted], *scores, str(len(attention))]
    if not rows:
        raise InputError(f"none of {len(paths)} slides could be read, the first: {next(iter(errors.values()))}")
    header = ["slide", "prediction", *model.spec.classes, "windows", *(["error"] if errors else [])]
    write_rows(output, header, _with_errors(paths, rows, errors, len(header)))
    left_out = f", {len(errors)} could not be read" if errors else ""
    say(f"{len(rows):,} slides{left_out}: {output}", f"attention: {folder}")


def report_slides(checkpoint: Path, slides: Path, labels: Path, report: Path | None, **options: Any) -> None:
    """Write a classifier's scores on labelled slides, with pictures of confusion and precision, and print them."""
    scores = evaluate_slides(checkpoint, slides, labels, **options)
    if report is not None:
        write_image_report(scores, report)
    show(*image_tables(scores, title=f"{slides.name} against {labels.name}"))


def evaluate_slides(
    checkpoint: Path, slides: Path, labels: Path, **engine: Any
) -> ClassificationScores | RegressionScores:
    """Score a classifier on labelled slides; features that its run made are used again.

    Args:
        checkpoint: that `perf-vit train` wrote.
        slides: folder that the names of the CSV are relative to.
        labels: a CSV file with the columns slide and label.
        **engine: batch_size, num_readers, device and precision.

    Raises:
        PerfVitError: labels or slides that can't be read or don't fit.
    """
    model = load_slide_classifier(checkpoint)
    columns = model.spec.label_options
    targets = read_slide_table(labels, slides, model.spec.classes, **columns)
    store = _store(model, checkpoint.absolute().parents[1] / _EMBEDDINGS)
    embedder = _Embedder(model, **engine)
    metrics = ImageMetrics(model.spec.classes, "single_label")
    for number, (path, label) in enumerate(zip(targets.paths, targets.labels.tolist(), strict=True), 1):
        if store.has(path):
            found = store.read(path)
        else:
            with windows_progress(f"slide {number} of {len(targets)}") as on_window:
                found = embedder(path, on_window)
        probabilities, _ = _classify(model, found)
        metrics.update(torch.from_numpy(probabilities)[None], torch.tensor([label]))
    return metrics.summary(with_curves=True)


class _Embedder:
    """A classifier's encoder on its device, as a maker of slides' features."""

    def __init__(
        self,
        model: SlideClassifier,
        *,
        batch_size: int = 1,
        num_readers: int = 2,
        device: str = "auto",
        precision: str = "32",
        slide_mpp: float | None = None,
        tissue: str | None = None,
    ) -> None:
        self._model = model
        self._engine: dict[str, Any] = {
            "batch_size": batch_size,
            "num_readers": num_readers,
            "precision": resolved_precision(precision),
            "device": on_device(model, device),
        }
        self._check = InputCheck(model.spec.trained_on)
        self._slide_mpp, self._tissue = slide_mpp, tissue

    def open(self, path: str) -> Source:
        """A slide as the encoder sees it: the glass in a window of tissue is part of what it knows."""
        spec = replace(self._model.spec, tissue=None)
        return spec.open(path, check=InputCheck(None), slide_mpp=self._slide_mpp)

    def __call__(self, path: str, on_window: Any) -> SlideFeatures:
        """Windows of tissue and their features.

        Raises:
            InputError: the slide can't be read, has no tissue, or other channels than those of training.
        """
        spec = self._model.spec
        with_tissue = spec.open(path, check=self._check, slide_mpp=self._slide_mpp, tissue=self._tissue)
        windows = tissue_windows(with_tissue, spec.tile_px, spec.min_tissue)
        with_tissue.close()
        source = self.open(path)
        features = embed_windows(
            self._model.embed, source, spec.normalizer, windows, on_window=on_window, **self._engine
        )
        source.close()
        return SlideFeatures(features, tuple(windows))


def _store(model: SlideClassifier, folder: str | Path) -> EmbeddingStore:
    spec = model.spec
    names = ("tile_px", "mpp", "bands", "tissue", "min_tissue", "slide_mpp")
    return EmbeddingStore(folder, model.encoder_id(), {name: getattr(spec, name) for name in names})


def _embed_all(embedder: _Embedder, store: EmbeddingStore, paths: Sequence[str]) -> None:
    missing = [path for path in paths if not store.has(path)]
    for number, path in enumerate(missing, 1):
        with windows_progress(f"embedding {Path(path).name}, {number} of {len(missing)}") as on_window:
            found = embedder(path, on_window)
        store.write(path, found.features, found.windows)


def _classify(model: SlideClassifier, found: SlideFeatures) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Probabilities [K] and attention [N]."""
    device = next(model.parameters()).device
    bag = torch.from_numpy(found.features)[None].to(device)
    with torch.inference_mode():
        logits, attention = model(bag, torch.ones(bag.shape[:2], dtype=torch.bool, device=device))
    return logits[0].float().softmax(0).cpu().numpy(), attention[0].cpu().numpy()


def _write_attention(
    spec: SlideSpec,
    source: Source,
    found: SlideFeatures,
    attention: npt.NDArray[np.float32],
    predicted: int,
    stem: Path,
) -> None:
    weights = attention / attention.max()
    boxes = np.array([[w.col, w.row, w.col_stop, w.row_stop] for w in found.windows], np.float32)
    labels = np.full(len(boxes), predicted)
    objects, picture = _attention_files(stem)
    write_objects(objects, boxes, weights, labels, spec.classes, source=source)
    save_png(picture, attention_picture(source, found.windows, weights))
    source.close()


def _attention_files(stem: Path) -> tuple[Path, Path]:
    """Windows with their attention, and the picture of it."""
    # Slides' names may hold dots, so no suffix is replaced.
    return Path(f"{stem}.geojson"), Path(f"{stem}.png")


def _names(paths: Sequence[str]) -> dict[str, str]:
    """A file name for each slide; those of one name in several folders get a number."""
    stems = Counter(Path(path).stem for path in paths)
    taken: set[str] = set()
    names = {}
    for path in paths:
        stem = Path(path).stem
        # A number that makes it the name of another slide is passed over.
        numbered = (f"{stem}-{number}" for number in itertools.count(2))
        name = stem if stem not in taken else next(each for each in numbered if each not in taken and each not in stems)
        taken.add(name)
        names[path] = name
    return names


def _with_errors(
    paths: Sequence[str], rows: Mapping[str, list[str]], errors: Mapping[str, str], width: int
) -> Iterator[list[str]]:
    for path in paths:
        if path in errors:
            yield [path, *[""] * (width - 2), errors[path]]
        else:
            yield [*rows[path], *([""] if errors else [])]


def _spec(config: SlideRun, train: SlideTargets) -> SlideSpec:
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
    return SlideSpec.from_data_config(
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
