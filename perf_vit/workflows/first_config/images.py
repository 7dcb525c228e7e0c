"""First configs of classification and regression of images, and of slides."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from perf_vit.data.bags import read_slide_table
from perf_vit.errors import InputError, OptionError, reason_line
from perf_vit.labels.tables import read_class_folders, read_csv_rows
from perf_vit.sources import find_images, open_source
from perf_vit.sources.image_search import image_root
from perf_vit.workflows.first_config.draft import (
    Draft,
    Files,
    augmentation_for,
    bands_note,
    image_fact,
    shares_fact,
    split_indices,
    tile_size,
)

__all__ = ["draft_images", "draft_slides"]

_IMAGE_COLUMNS = ("image", "image_path", "filename", "file", "path", "slide", "name")
_CLASS_COLUMNS = ("label", "class", "category", "diagnosis", "type")
_IMBALANCE = 5
_IMAGES_MEASURED = 32


def draft_images(files: Files) -> Draft:
    """Draft a config of image classification or regression.

    Raises:
        InputError: Files can't be read or don't fit each other.
        OptionError: Labels are missing.
    """
    draft = Draft(values={"task": files.task, "out": files.run, "data.train.image": files.image}, facts=[])
    if files.task == "regression":
        files.required_labels("a CSV file with a column of image names and columns of numbers")
    columns = _columns_of(files)
    values = draft.values
    if files.task == "regression":
        targets = _number_columns(files, columns)
        rows = [[row[name] for name in (columns[0], *targets)] for row in _rows(files, [columns[0], *targets])]
        _set_apart(files, draft, [columns[0], *targets], rows, [0] * len(rows))
        values["data.targets"] = targets
        draft.facts.append(f"targets of {len(rows):,} images: {', '.join(targets)}")
    else:
        names, labels = _labelled(files, columns)
        classes = sorted(set(labels))
        _set_apart(
            files, draft, columns, list(zip(names, labels, strict=True)), [classes.index(each) for each in labels]
        )
        values["data.classes"] = classes
        _count(draft, classes, labels)
        draft.values["data.label_column"] = columns[1]
    values["data.image_column"] = columns[0]
    _choose_tiles(files, draft)
    values |= {"model.backbone": "resnet18", "optim.lr": 0.0005, "trainer.max_epochs": 20, "trainer.precision": "auto"}
    draft.notes["model.backbone"] = "Any timm model; with model.pretrained=true, timm's weights are loaded."
    draft.predict = ["--input", files.val_image or files.first_image, "--output", f"{files.run}/predictions.csv"]
    return draft


def draft_slides(files: Files) -> Draft:
    """Draft a config of slide classification.

    Raises:
        InputError: Files can't be read or don't fit each other.
        OptionError: Labels are missing.
    """
    files.required_labels("a CSV file with the columns slide and label")
    columns = _columns_of(files)
    names, labels = _labelled(files, columns)
    classes = sorted(set(labels))
    given = {"image_column": columns[0], "label_column": columns[1]}
    with open_source(read_slide_table(str(files.labels), files.first_image, **given).paths[0]) as source:
        facts = [f"slides  {len(names)}, the first {image_fact(source)}"]
    draft = Draft(values={"task": files.task, "out": files.run, "data.train.image": files.image}, facts=facts)
    _set_apart(files, draft, columns, list(zip(names, labels, strict=True)), [classes.index(each) for each in labels])
    _count(draft, classes, labels)
    draft.values.pop("data.sampler", None)
    draft.values |= {"data.classes": classes, "data.image_column": columns[0], "data.label_column": columns[1]}
    draft.values |= {"data.mpp": 0.5, "data.tile_px": 224, "data.tissue": "auto", "data.max_windows": 4096}
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


def _labelled(files: Files, columns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return names of images and their classes."""
    if files.labels is not None:
        rows = _rows(files, columns)
        return [row[columns[0]] for row in rows], [row[columns[1]] for row in rows]
    if files.task == "slide_classification":
        raise OptionError("labels must be given: a CSV file with the columns slide and label")
    found = read_class_folders(files.image)
    root = image_root(files.first_image)
    names = [Path(path).relative_to(root).as_posix() for path in found.paths]
    return names, [found.names[index] for index in found.targets.astype(int).tolist()]


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
    files: Files, draft: Draft, columns: Sequence[str], rows: Sequence[Sequence[str]], groups: Sequence[int]
) -> None:
    """Write tables of training and validation images."""
    if files.val_image is not None:
        draft.values["data.train.labels"] = files.labels
        draft.values |= {"data.val.image": files.val_image, "data.val.labels": files.val_labels or files.labels}
        labels = draft.values["data.val.labels"]
        draft.evaluate = ["--input", files.val_image, *([] if labels is None else ["--labels", str(labels)])]
        return
    chosen = set(split_indices(groups))
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
    draft.evaluate = ["--input", files.first_image, "--labels", files.beside("_val.csv")]


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


def _choose_tiles(files: Files, draft: Draft) -> None:
    paths = find_images([files.image] if isinstance(files.image, str) else files.image)
    sizes: list[tuple[int, int]] = []
    for path in paths[:: max(1, len(paths) // _IMAGES_MEASURED)]:
        with open_source(path) as source:
            sizes.append((source.height, source.width))
            if len(sizes) == 1:
                draft.facts.insert(0, f"images  {len(paths)}, the first {image_fact(source)}")
                draft.values["data.bands"] = list(range(1, source.num_bands + 1))
                draft.values["data.augment"] = augmentation_for(source)
                draft.notes |= bands_note(source.band_names)
    sides = [side for size in sizes for side in size]
    is_whole = max(sides) <= 256 and max(sides) <= 1.25 * min(sides)
    draft.values |= {"data.tile_px": tile_size(sides, 32, 256) if is_whole else 224, "data.resize": not is_whole}
    draft.notes["data.resize"] = f"Images have sides from {min(sides)} to {max(sides)} px."
    draft.values["data.batch_size"] = 16
