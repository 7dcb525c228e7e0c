"""First configs of classification and regression of images, and of slides."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from perf_vit.config import build_config
from perf_vit.data import (
    ClassificationDataConfig,
    ClassificationSplitConfig,
    RegressionDataConfig,
    SlideClassificationDataConfig,
    build_classification_datamodule,
    read_image_targets,
)
from perf_vit.data.bags import read_slide_table
from perf_vit.data.classification import ImageDataConfig
from perf_vit.data.slide_classification import read_slides
from perf_vit.errors import InputError, reason_line
from perf_vit.labels.tables import ImageTargets, read_csv_rows
from perf_vit.models.input_spec import accepts_bands
from perf_vit.sources import open_source
from perf_vit.workflows.first_config.draft import (
    Draft,
    Files,
    augmentation_for,
    bands_note,
    data_values,
    image_fact,
    shares_fact,
    split_indices,
)
from perf_vit.workflows.progress import working

__all__ = ["draft_images", "draft_slides"]

_IMAGE_COLUMNS = ("image", "image_path", "filename", "file", "path", "slide", "name")
_CLASS_COLUMNS = ("label", "class", "category", "diagnosis", "type")
_IMBALANCE = 5
_BATCH_SIZE = 16
# Larger images are resized to the second size; tiles of whole images are a multiple of the third.
_WHOLE_PX, _RESIZED_PX, _MULTIPLE = 256, 224, 32


def draft_images(files: Files) -> Draft:
    """Draft a config of image classification or regression.

    Raises:
        InputError: Files can't be read or don't fit each other.
        OptionError: Labels are missing.
    """
    draft = Draft(values={"task": files.task, "out": files.run, "data.train.image": files.image}, facts=[])
    is_regression = files.task == "regression"
    if is_regression:
        files.required_labels("a CSV file with a column of image names and columns of numbers")
    columns = _columns_of(files)
    if is_regression:
        columns[1:] = _number_columns(files, columns)
    labelled = _read_images(files, columns, files.image, files.labels)
    names, kinds = labelled.names, [0] * len(labelled) if is_regression else labelled.targets.astype(int).tolist()
    num_train = _set_apart(files, draft, columns, _table(files, columns, labelled), kinds)
    values = draft.values
    if is_regression:
        values["data.targets"] = list(names)
        draft.facts.append(f"targets of {len(labelled):,} images: {', '.join(names)}")
    else:
        values["data.classes"] = list(names)
        _count(draft, names, [names[kind] for kind in kinds])
        values["data.label_column"] = columns[1]
    values["data.image_column"] = columns[0]
    _choose_tiles(files, draft, columns, labelled)
    values["data.batch_size"] = min(_BATCH_SIZE, num_train)
    with data_values(draft) as data, working("opening the images"):
        kind = RegressionDataConfig if is_regression else ClassificationDataConfig
        build_classification_datamodule(build_config(kind, data), 0)
    values |= {"model.backbone": "resnet18", "optim.lr": 0.0005, "trainer.max_epochs": 20, "trainer.precision": "auto"}
    draft.notes["model.backbone"] = "Any timm model; with model.pretrained=true, timm's weights are loaded."
    inputs = files.images if files.val_image is None else [files.val_image]
    draft.predict = [*(part for each in inputs for part in ("--input", each)), "--output"]
    draft.predict.append(f"{files.run}/predictions.csv")
    return draft


def draft_slides(files: Files) -> Draft:
    """Draft a config of slide classification.

    Raises:
        InputError: Files can't be read or don't fit each other.
        OptionError: Labels are missing.
    """
    files.required_labels("a CSV file with the columns slide and label")
    columns = _columns_of(files)
    rows = [[row[column] for column in columns] for row in _rows(files, columns)]
    labels = [row[1] for row in rows]
    classes = sorted(set(labels))
    given = {"image_column": columns[0], "label_column": columns[1]}
    with open_source(read_slide_table(str(files.labels), files.first_image, **given).paths[0]) as source:
        facts = [f"slides  {len(rows)}, the first {image_fact(source)}"]
    draft = Draft(values={"task": files.task, "out": files.run, "data.train.image": files.image}, facts=facts)
    _set_apart(files, draft, columns, rows, [classes.index(each) for each in labels])
    _count(draft, classes, labels)
    draft.values.pop("data.sampler", None)
    draft.values |= {"data.classes": classes, "data.image_column": columns[0], "data.label_column": columns[1]}
    draft.values |= {"data.mpp": 0.5, "data.tile_px": 224, "data.tissue": "auto", "data.max_windows": 4096}
    with data_values(draft) as data:
        read_slides(build_config(SlideClassificationDataConfig, data), 0)
    draft.values |= {"model.backbone": "vit_small_patch14_dinov2", "model.pretrained": True}
    draft.values |= {"optim.lr": 0.0002, "trainer.max_epochs": 50, "trainer.accumulate_batches": 4}
    draft.notes["model.backbone"] = (
        "The encoder of windows, which is not trained; a folder of `perf-vit convert` is faster."
    )
    draft.predict = ["--input", files.first_image, "--output", f"{files.run}/predictions.csv"]
    return draft


def _columns_of(files: Files) -> list[str]:
    """Return the columns of image names and of classes, or the names that a table of folders by class gets."""
    if files.labels is None:
        return ["image", "label"]
    try:
        with Path(files.labels).open(newline="", encoding="utf-8-sig") as file:
            names = next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"can't read {files.labels} as CSV: {reason_line(error)}; save it as UTF-8") from error
    image = next((name for name in _IMAGE_COLUMNS if name in names), None)
    label = files.attribute or next((name for name in _CLASS_COLUMNS if name in names), None)
    if image is None or (label is None and files.task != "regression"):
        raise InputError(
            f"{files.labels} must have a column of images ({', '.join(_IMAGE_COLUMNS)}) and one of classes "
            f"({', '.join(_CLASS_COLUMNS)}, or `attribute`), got {', '.join(names) or 'none'}"
        )
    return [image, *([] if label is None else [label])] if files.task != "regression" else [image, *names]


def _rows(files: Files, columns: Sequence[str]) -> list[Mapping[str, str]]:
    return [row.values for row in read_csv_rows(str(files.labels), list(dict.fromkeys(columns)))]


def _read_images(files: Files, columns: Sequence[str], image: str | list[str], labels: str | None) -> ImageTargets:
    """Read the labels of images as training does."""
    split = ClassificationSplitConfig(image=image, labels=labels)
    config: ImageDataConfig
    if files.task == "regression":
        config = RegressionDataConfig(train=split, targets=list(columns[1:]), image_column=columns[0])
    else:
        config = ClassificationDataConfig(train=split, image_column=columns[0], label_column=columns[1])
    return read_image_targets(config, split)


def _table(files: Files, columns: Sequence[str], labelled: ImageTargets) -> list[list[str]]:
    """Return the rows of a table of images, whose names are clear where there are several folders."""
    names = [files.name(path) for path in labelled.paths]
    if files.labels is None:
        return [[name, labelled.names[kind]] for name, kind in zip(names, labelled.targets.astype(int), strict=True)]
    rows = [[row[column] for column in columns] for row in _rows(files, columns)]
    return rows if len(files.images) == 1 else [[name, *row[1:]] for name, row in zip(names, rows, strict=True)]


def _number_columns(files: Files, columns: Sequence[str]) -> list[str]:
    if files.attribute is not None:
        return [files.attribute]
    image, *others = columns
    rows = _rows(files, [image])
    targets = []
    for name in dict.fromkeys(others):
        try:
            numbers = [float(row[name]) for row in _rows(files, [name])]
        except (ValueError, InputError):
            continue
        if name != image and len(numbers) == len(rows) and np.isfinite(numbers).all():
            targets.append(name)
    if not targets:
        raise InputError(f"{files.labels} has no column of numbers for all images; give one, as biomass")
    return targets


def _set_apart(
    files: Files, draft: Draft, columns: Sequence[str], rows: Sequence[Sequence[str]], kinds: Sequence[int]
) -> int:
    """Write tables of training and validation images; return the number of training images."""
    if files.val_image is not None:
        draft.values["data.train.labels"] = files.labels
        draft.values |= {"data.val.image": files.val_image, "data.val.labels": files.val_labels or files.labels}
        labels = draft.values["data.val.labels"]
        draft.evaluate = ["--input", files.val_image, *([] if labels is None else ["--labels", str(labels)])]
        return len(rows)
    chosen = set(split_indices(kinds))
    if not chosen:
        raise InputError("expected two or more images of a class, of which one validates; give more images")
    for part, is_val in (("train", False), ("val", True)):
        name = files.beside(f"_{part}.csv")
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(row for place, row in enumerate(rows) if (place in chosen) is is_val)
        draft.files[name] = table.getvalue()
        draft.values |= {f"data.{part}.image": files.image, f"data.{part}.labels": name}
    draft.notes["data.val.labels"] = f"{len(chosen)} of {len(rows)} images, a quarter of each class, drawn at random."
    draft.evaluate = ["--input", files.all_images, "--labels", files.beside("_val.csv")]
    return len(rows) - len(chosen)


def _count(draft: Draft, classes: Sequence[str], labels: Sequence[str]) -> None:
    counts = [list(labels).count(name) for name in classes]
    draft.facts += [f"labels of {len(labels):,}:", *shares_fact(classes, counts, "images")]
    is_rare = max(counts) > _IMBALANCE * min(counts)
    draft.values["data.sampler"] = "balanced" if is_rare else "random"
    rarest = classes[int(np.argmin(counts))]
    draft.notes["data.sampler"] = (
        f"{rarest} is rare ({min(counts):,} of {sum(counts):,}): classes are drawn equally often."
        if is_rare
        else "Each image once an epoch, as no class is rare."
    )


def _choose_tiles(files: Files, draft: Draft, columns: Sequence[str], labelled: ImageTargets) -> None:
    paths = labelled.paths
    if files.val_image is not None and files.task == "regression":
        paths += _read_images(files, columns, files.val_image, files.val_labels or files.labels).paths
    sides: set[int] = set()
    numbers: set[int] = set()
    with working("reading the sizes of the images"):
        for path in paths:
            with open_source(path) as source:
                sides.update(source.size)
                numbers.add(source.num_bands)
    with open_source(paths[0]) as source:
        draft.facts.insert(0, f"images  {len(labelled)}, the first {image_fact(source)}")
        fewest, most = min(numbers), max(numbers)
        # Grey images are taken where three bands are expected; of others, the bands that all have are common.
        is_grey_too = fewest != most and accepts_bands(fewest, most)
        draft.values["data.bands"] = None if is_grey_too else list(range(1, fewest + 1))
        augment = augmentation_for(source)
        draft.notes |= bands_note(source.band_names)
    smallest, largest = min(sides), max(sides)
    is_whole = largest <= _WHOLE_PX and largest <= 1.25 * smallest
    if files.task == "regression" and not is_whole:
        # A zoom would cut images whose targets are those of the whole.
        augment.pop("scale", None)
    tile_px = max(64, -(-largest // _MULTIPLE) * _MULTIPLE) if is_whole else _RESIZED_PX
    draft.values |= {"data.augment": augment, "data.tile_px": tile_px, "data.resize": not is_whole}
    draft.notes["data.resize"] = f"Images have sides from {smallest} to {largest} px."
