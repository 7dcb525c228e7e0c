"""Slide classification: training and evaluation."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from perf_vit.data import (
    EmbeddingStore,
    SlideClassificationDataModule,
    SlideTargets,
    given_normalizer,
    read_slide_table,
    read_slides,
    warn_of_mixed_mpp,
)
from perf_vit.distributed import started_rank_and_world_size
from perf_vit.errors import ConfigError, DataWarning, InputError, OutputError
from perf_vit.inference import SlideClassificationPredictOptions, SlideClassificationPredictor
from perf_vit.metrics import ClassificationMetrics, ClassificationScores, RegisteredMetrics
from perf_vit.models import (
    InputBands,
    SlideClassificationSpec,
    SlideFeatures,
    check_not_random,
    pretrained_statistics,
)
from perf_vit.models.backbone import is_random
from perf_vit.models.finetune import batch_norms
from perf_vit.models.read_ahead import load_ahead
from perf_vit.reporting import ImageSamples, Sample
from perf_vit.sources import open_input
from perf_vit.sources.slides.tissue import TISSUE_VERSION
from perf_vit.tasks import SlideClassificationTask, ThroughEncoderTask
from perf_vit.transforms import Normalizer
from perf_vit.types import TISSUE_METHODS, GeoImage, InputOptions, Source, Window
from perf_vit.workflows.progress import say_line, windows_progress
from perf_vit.workflows.reports import ClassificationEvaluation
from perf_vit.workflows.run_config import SlideClassificationRun
from perf_vit.workflows.task import EvaluateOptions, TrainedModel

__all__ = [
    "LabelledSlides",
    "SlideClassificationEvaluateOptions",
    "build_slide_data",
    "build_slide_task",
    "evaluate_slide_classification",
    "prepare_slides",
]

FloatArray = npt.NDArray[np.float32]

T = TypeVar("T")

_EMBEDDINGS = "embeddings"
"""Folder of a run's features."""

_WINDOWS = "windows"
"""Folder of the windows of a run that trains through the encoder."""

_STATISTICS_PX = 256
# Slides that stand for all in statistics, and where only the range of colours is measured.
_STATISTICS_SLIDES, _RANGE_SLIDES = 128, 8


@dataclass(frozen=True)
class LabelledSlides:
    """Slides of a run, before their windows and features are known.

    Attributes:
        train: Slides to train on.
        val: Slides to validate on.
    """

    train: SlideTargets
    val: SlideTargets


def build_slide_data(config: SlideClassificationRun) -> LabelledSlides:
    """The slides of a run.

    Raises:
        PerfVitError: A config or table that doesn't fit.
    """
    if config.trainer.num_pictures:
        raise ConfigError("trainer.num_pictures must be 0: a slide is a bag of windows here, which nobody could draw")
    (_check_trained if config.model.through_encoder else _check_frozen)(config)
    return LabelledSlides(*read_slides(config.data, config.seed))


def _check_frozen(config: SlideClassificationRun) -> None:
    """Refuse what changes an encoder whose features are made once, or its windows."""
    trained = "or train the encoder, with model.through_encoder=true"
    if config.trainer.redraw_every_steps:
        raise ConfigError(
            f"trainer.redraw_every_steps would change the encoder that features were made with; use 0, {trained}"
        )
    if (config.optim.layer_decay, config.optim.backbone_lr_scale) != (1.0, 1.0):
        raise ConfigError(
            f"optim.layer_decay and optim.backbone_lr_scale are of trained encoders; leave them out, {trained}"
        )
    if config.data.augment is not None:
        raise ConfigError(f"data.augment would change windows whose features are made once; leave it out, {trained}")


def _check_trained(config: SlideClassificationRun) -> None:
    """Refuse what doesn't go with an encoder that is trained."""
    if config.data.embeddings is not None:
        raise ConfigError(
            "data.embeddings keeps features of a frozen encoder, which model.through_encoder trains; leave one of the "
            "two out"
        )
    strategy = config.trainer.strategy
    if strategy != "auto" and not strategy.startswith("ddp"):
        raise ConfigError(
            f"trainer.strategy must be auto or ddp with model.through_encoder, got {strategy}: sharded weights "
            "aren't there when windows are computed again"
        )


def build_slide_task(config: SlideClassificationRun, data: LabelledSlides) -> SlideClassificationTask:
    """The Lightning module of a run.

    Raises:
        PerfVitError: A model that doesn't fit, or a slide that can't be read.
    """
    through = config.model.through_encoder
    if not through:
        check_not_random(config.model)
    if config.data.mpp is None:
        _warn_of_mixed_mpp([*data.train.paths, *data.val.paths], InputOptions.from_config(config.data))
    spec = _spec(config, data.train)
    if not through:
        return SlideClassificationTask(config.model, spec, config.optim)
    if config.data.augment is not None and config.data.augment.stain:
        bands = spec.trained_on
        if bands is None or (len(bands.low), bands.dtype) != (3, "uint8"):
            raise ConfigError(
                "data.augment.stain is for slides of 3 bands of uint8 (red, green, blue); leave it out or choose those "
                "bands with data.bands"
            )
    task = ThroughEncoderTask(config.model, spec, config.optim, batch_size=config.data.embed_batch_size)
    if is_random(config.model) and batch_norms(task.model.encoder):
        raise ConfigError(
            f"model.through_encoder: {config.model.backbone} has batch norms, whose statistics stay as they are and "
            "would be random; give model.pretrained=true or model.weights=FILE, or choose a ViT"
        )
    return task


def prepare_slides(
    config: SlideClassificationRun, data: LabelledSlides, task: SlideClassificationTask, folder: Path
) -> SlideClassificationDataModule:
    """Find the windows of all slides, and compute their features if the encoder is frozen.

    Features lie in the run folder or in `data.embeddings`, windows without features in the run folder. Those that are
    there are used again. All slides are gone through, whatever goes wrong with single ones.

    Raises:
        InputError: Slides have no windows or features, without `data.on_error=skip`; or too few are left.
        OutputError: They can't be written.
    """
    through = config.model.through_encoder
    device = "cpu" if config.trainer.accelerator == "cpu" else "auto"
    options = SlideClassificationPredictOptions(
        batch_size=config.data.embed_batch_size,
        device=device,
        slide_mpp_override=config.data.slide_mpp_override,
        on_error="skip",
    )
    predictor = SlideClassificationPredictor(task.model, options)
    paths = [*data.train.paths, *data.val.paths]
    if through:
        store = _store(predictor, folder / _WINDOWS, of_windows=True)
        failed = _store_all(partial(_found, predictor, is_stored=store.has), store, paths)
    else:
        store = _store(predictor, config.data.embeddings or folder / _EMBEDDINGS)
        failed = _store_all(partial(_embedded, predictor, is_stored=store.has), store, paths)
    if failed:
        data = _without(data, failed, config.data.on_error, store.folder, "windows" if through else "features")
    spec = task.model.spec if through else None
    return SlideClassificationDataModule.of(config.data, data.train, data.val, store, config.seed, spec)


def _without(data: LabelledSlides, failed: Mapping[str, str], on_error: str, folder: Path, what: str) -> LabelledSlides:
    """The slides that have features or windows, `what`; refuses failed ones unless they are to be skipped."""
    num = len(data.train) + len(data.val)
    for reason in failed.values():
        say_line("failed", reason)
    if on_error == "stop":
        raise InputError(
            f"{len(failed)} of {num} slides have no {what}, the first: {next(iter(failed.values()))}; leave them out "
            f"of the table, or set data.on_error=skip. {folder} keeps the features of the others"
        )
    train, val = (
        part.part([i for i, path in enumerate(part.paths) if path not in failed]) for part in (data.train, data.val)
    )
    lost = sorted(set(data.train.labels.tolist()) - set(train.labels.tolist()))
    if lost or not len(val):
        left = f"no training slide of class {train.classes[lost[0]]}" if lost else "no validation slide"
        raise InputError(f"{len(failed)} of {num} slides have no {what}, which leaves {left}; repair or replace them")
    warnings.warn(f"{len(failed)} of {num} slides have no {what} and are left out", DataWarning, stacklevel=2)
    return LabelledSlides(train, val)


@dataclass(frozen=True, kw_only=True)
class SlideClassificationEvaluateOptions(EvaluateOptions):
    """Options of the evaluation of slide classification.

    Attributes:
        slide_mpp: Micrometres per pixel of a slide's level 0 where the file states none, or "objective" for 10 divided
            by the magnification of the objective.
        slide_mpp_override: Micrometres per pixel of a slide's level 0, whatever the file states.
    """

    slide_mpp: float | Literal["objective"] | None = None
    slide_mpp_override: float | None = None


def evaluate_slide_classification(
    model: TrainedModel, slides: Path, labels: Path, options: SlideClassificationEvaluateOptions
) -> ClassificationEvaluation:
    """Score a classifier on labelled slides; features that the run of its checkpoint made are used again.

    Args:
        model: A slide classifier or its checkpoint.
        slides: Folder that the names of the CSV file are relative to.
        labels: A CSV file with the columns slide and label.
        options: Options of the evaluation.

    Raises:
        PerfVitError: Labels or slides can't be read or don't fit.
    """
    given = options.for_prediction(SlideClassificationPredictOptions, {"on_error": "skip"})
    predictor = SlideClassificationPredictor(model, given)  # type: ignore[arg-type]
    spec = predictor.model.spec
    targets = read_slide_table(labels, slides, spec.classes, **spec.label_options)
    checkpoint = predictor.checkpoint
    store = None if checkpoint is None else _store(predictor, checkpoint.absolute().parent.parent / _EMBEDDINGS)
    kept = None if store is None or not store.folder.is_dir() else store
    metrics = ClassificationMetrics(spec.classes, "single_label")
    registered = RegisteredMetrics("slide_classification", spec)
    stored = [store is not None and store.has(path) for path in targets.paths]
    missing = [path for path, is_stored in zip(targets.paths, stored, strict=True) if not is_stored]
    samples = ImageSamples()
    failed: dict[str, str] = {}
    with closing(_embedded(predictor, missing)) as embedded:
        for path, label, is_stored in zip(targets.paths, targets.labels.tolist(), stored, strict=True):
            found = store.read(path) if store is not None and is_stored else next(embedded)
            assert found is not None
            if isinstance(found, InputError):
                failed[path] = str(found)
                continue
            if kept is not None and not is_stored:
                kept = kept if _is_kept(kept, path, found) else None
            probabilities, attention = predictor.classify(found)
            for each in (metrics, registered):
                each.update(torch.from_numpy(probabilities)[None], torch.tensor([label]))
            sample = _sample(predictor, path, label, probabilities, found.windows, attention)
            samples.offer(float(probabilities[label]), sample)
    if failed:
        raise InputError(
            f"{len(failed)} of {len(targets)} slides can't be scored, the first: {next(iter(failed.values()))}; repair "
            "them or leave them out of the table"
        )
    scores = metrics.summary(with_curves=True)
    assert isinstance(scores, ClassificationScores)
    evaluation = ClassificationEvaluation(scores, title=f"{slides.name} against {labels.name}", registered=registered)
    evaluation.samples = samples
    return evaluation


def _is_kept(store: EmbeddingStore, path: str, found: SlideFeatures) -> bool:
    """Store the features of a slide for other evaluations; warn and return False where they can't be written."""
    try:
        store.write(path, found.features, found.windows, found.picture)
    except OutputError as error:
        warnings.warn(
            f"features are not kept, the next evaluation makes them again: {error}", DataWarning, stacklevel=2
        )
        return False
    return True


def _sample(
    predictor: SlideClassificationPredictor,
    path: str,
    label: int,
    probabilities: FloatArray,
    windows: Sequence[Window],
    attention: FloatArray,
) -> Sample:
    """A slide with its attention, and its true and predicted class."""
    classes, best = predictor.model.spec.classes, int(probabilities.argmax())
    said = f"{classes[best]} {probabilities[best]:.2f}, true {classes[label]} {probabilities[label]:.2f}"

    def draw() -> dict[str, Any]:
        with closing(predictor.open_with_glass(path)) as source:
            return {"attention": predictor.attention_figure(source, windows, attention, said)}

    return Sample(title=f"{said}: {Path(path).name}", draw=draw)


def _store(predictor: SlideClassificationPredictor, folder: str | Path, *, of_windows: bool = False) -> EmbeddingStore:
    """The folder of features of the predictor's encoder, or of windows without features."""
    names = ("tile_px", "mpp", "bands", "tissue", "min_tissue", "slide_mpp")
    options = {name: getattr(predictor.model.spec, name) for name in names} | predictor.options.input_options
    if options["tissue"] in TISSUE_METHODS:
        options["tissue_version"] = TISSUE_VERSION
    if of_windows:
        return EmbeddingStore(folder, _WINDOWS, options)
    if predictor.options.dtype != torch.float32:
        # Features of float32 keep their names.
        options["dtype"] = str(predictor.options.dtype)
    return EmbeddingStore(folder, predictor.model.encoder_id(), options)


FoundSlides = Generator[SlideFeatures | InputError | None, None, None]
"""What is found of each slide, or why there is nothing; None where another process has stored it meanwhile."""


def _store_all(
    find: Callable[[Sequence[str]], FoundSlides], store: EmbeddingStore, paths: Sequence[str]
) -> dict[str, str]:
    """Store what is found of slides that aren't stored yet, each as it is known; the reasons of those that failed.

    Processes that train together share the slides.
    """
    # Dealt before the stored ones are left out: processes that start later find more of them.
    order = [path for path in _dealt(paths, *started_rank_and_world_size()) if not store.has(path)]
    failed = {}
    with closing(find(order)) as results:
        for path, found in zip(order, results, strict=True):
            if isinstance(found, InputError):
                failed[path] = str(found)
            elif found is not None:
                store.write(path, found.features, found.windows, found.picture)
    # Another process may have read what this one couldn't.
    return {path: failed[path] for path in paths if path in failed and not store.has(path)}


def _dealt(paths: Sequence[str], rank: int, world_size: int) -> list[str]:
    """The order in which a process goes through slides: its share, then those of the others from their ends."""
    order = list(paths[rank::world_size])
    for other in range(rank + 1, rank + world_size):
        order += reversed(paths[other % world_size :: world_size])
    return order


def _never(path: str) -> bool:
    return False


def _found(
    predictor: SlideClassificationPredictor, paths: Sequence[str], *, is_stored: Callable[[str], bool] = _never
) -> FoundSlides:
    """Yield the windows of slides, with features of length 0, or why they have none."""
    read = _unless(is_stored, partial(predictor.attempted, predictor.read_input))
    with (
        closing(load_ahead(paths, read, num_threads=1, depth=2)) as found,
        windows_progress("finding tissue", "slides") as on_slide,
    ):
        for number, tissue in enumerate(found, 1):
            on_slide(number, len(paths))
            if tissue is None or isinstance(tissue, InputError):
                yield tissue
            else:
                features = np.zeros((len(tissue.windows), 0), np.float32)
                yield SlideFeatures(features, tissue.windows, tissue.picture)


def _embedded(
    predictor: SlideClassificationPredictor, paths: Sequence[str], *, is_stored: Callable[[str], bool] = _never
) -> FoundSlides:
    """Yield the features of slides or why they have none; the tissue of the next slide is looked for meanwhile."""
    read = _unless(is_stored, partial(predictor.attempted, predictor.read_input))
    with closing(load_ahead(paths, read, num_threads=1, depth=1)) as found:
        for number, (path, tissue) in enumerate(zip(paths, found, strict=True), 1):
            if isinstance(tissue, InputError):
                yield tissue
                continue
            if tissue is None or is_stored(path):
                yield None
                continue
            with windows_progress(f"embedding {Path(path).name}, {number} of {len(paths)}") as on_window:
                yield predictor.attempted(partial(predictor.embed, on_window=on_window, tissue=tissue), path)


def _unless(is_done: Callable[[str], bool], call: Callable[[str], T]) -> Callable[[str], T | None]:
    """Return a function that calls another one for paths that aren't done."""
    return lambda path: None if is_done(path) else call(path)


def _spec(config: SlideClassificationRun, train: SlideTargets) -> SlideClassificationSpec:
    data, options = config.data, InputOptions.from_config(config.data)
    first, images = _reduced(train.paths[:_RANGE_SLIDES], options)
    given = given_normalizer(data.mean, data.std, first.num_bands)
    if first.num_bands == 3 and first.dtype == np.uint8:
        # Those that the encoder knows: they don't depend on the slides, so features stay valid when there are more.
        normalizer = pretrained_statistics(config.model.backbone)
    else:
        first, images = _reduced(train.paths[:: -(-len(train) // _STATISTICS_SLIDES)], options)
        normalizer = Normalizer.from_images(images, first.band_names)
    return SlideClassificationSpec.from_data_config(
        data,
        train,
        normalizer=given or normalizer,
        trained_on=InputBands.measure(images, first.band_names),
        label_options={"image_column": data.image_column, "label_column": data.label_column},
    )


def _warn_of_mixed_mpp(paths: Sequence[str], options: InputOptions) -> None:
    sources = []
    for path in paths:
        # What can't be opened is said when features are made.
        with suppress(InputError):
            sources.append(open_input(path, replace(options, tissue=None)))
            sources[-1].close()
    warn_of_mixed_mpp(sources)


def _reduced(paths: Sequence[str], options: InputOptions) -> tuple[Source, list[GeoImage]]:
    """The first slide, closed, and overviews of all, without those that can't be read or have other bands than most.

    Embedding reports these.
    """
    found: list[tuple[Source, GeoImage]] = []
    errors: list[Exception] = []
    for path in paths:
        try:
            with closing(open_input(path, options)) as source:
                found.append((source, source.read_reduced(_STATISTICS_PX)))
        except Exception as error:
            errors.append(error)
    if not found:
        raise errors[0]
    num_bands = Counter(source.num_bands for source, _ in found).most_common(1)[0][0]
    alike = [(source, image) for source, image in found if source.num_bands == num_bands]
    return alike[0][0], [image for _, image in alike]
