"""One way to read the labels of objects, whatever their format."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from perf_vit.errors import DataWarning, InputError
from perf_vit.labels.image_folder import ImageFolder

# Importing a module of a format registers it.
from perf_vit.labels.objects import coco, csv, dota, instances, vector, voc, yolo  # noqa: F401
from perf_vit.labels.objects.coco import ids_of_classes
from perf_vit.labels.objects.records import ObjectIndex, RawLabels
from perf_vit.labels.objects.registry import LABEL_FORMATS, LabelOptions
from perf_vit.labels.objects.validate import finish_index
from perf_vit.sources import open_source, split_layer
from perf_vit.types import InputPath, OpenInput

__all__ = ["read_object_labels"]


def read_object_labels(
    labels: str | Path,
    images: InputPath,
    *,
    label_format: str,
    classes: Sequence[str] | None = None,
    skip_classes: Collection[str] = (),
    attribute: str | None = None,
    names: Sequence[str] | None = None,
    open_input: OpenInput = open_source,
    oriented: bool = False,
) -> ObjectIndex:
    """Read the labels of a set of images and check them against the images.

    Args:
        labels: a file for coco and csv; a folder for voc, yolo, dota and instances, with one file an image; either for
            polygons.
        images: a folder, searched with its subfolders, one image, a glob, or several of these.
        label_format: coco, voc, yolo, dota, instances, polygons (GeoJSON, GeoPackage, shapefile), csv or a registered
            one.
        classes: class names, in the order of their indices; by default those of the label files.
        skip_classes: names of objects to leave out, as if they were background.
        attribute: of polygons, the column that holds class names; without it all objects are of the one class.
        names: the images to use, with or without ending; all labelled ones by default.
        open_input: opens an image by its path, with the options of a model or a config. Labels of slides are in pixels
            of level 0, whatever size they are read at.
        oriented: objects are oriented boxes: an outline, as YOLO's four corners are, gives the smallest around it.

    Raises:
        ConfigError: no such format, or several classes and no attribute for polygons.
        InputError: files that can't be read or don't fit each other; see `finish_index` for bad objects.
    """
    reader = LABEL_FORMATS[label_format]
    place = Path(labels)
    if not Path(split_layer(str(place))[0]).exists():
        raise InputError(f"no labels at {place}; check the path")
    if reader.one_file and place.is_dir():
        raise InputError(f"labels of the format {label_format} are one file, got the folder {place}")
    folder = ImageFolder(images, names)
    raw = reader.read(place, folder, LabelOptions(classes=classes, attribute=attribute))
    if reader.one_file:
        folder.check_named(Path(image.path) for image in raw.images)
    _check_unique(raw)
    _warn_of_unlabelled(raw, folder, place)
    index = finish_index(
        raw.images,
        classes=classes or _own_classes(raw, skip_classes),
        skip_classes=skip_classes,
        open_input=open_input,
        oriented=oriented,
    )
    if raw.category_ids is not None:
        index = replace(index, category_ids=tuple(ids_of_classes(raw.category_ids, index.classes)))
    if classes:
        _warn_of_absent(index, place)
    return index


def _check_unique(raw: RawLabels) -> None:
    """Refuse an image that is labelled twice: nobody knows whose objects count."""
    path, number = Counter(image.path for image in raw.images).most_common(1)[0] if raw.images else ("", 0)
    if number > 1:
        files = [image.labels for image in raw.images if image.path == path]
        raise InputError(f"{path} is labelled {number} times, by {' and '.join(files[:2])}; keep the labels once")


def _own_classes(raw: RawLabels, skip_classes: Collection[str]) -> tuple[str, ...]:
    found = raw.classes or sorted({item.name for image in raw.images for item in image.objects})
    return tuple(name for name in found if name not in skip_classes)


def _warn_of_absent(index: ObjectIndex, labels: Path) -> None:
    counts = index.class_counts()
    absent = [name for name, number in counts.items() if number == 0]
    if absent:
        warnings.warn(
            f"{len(absent)} of {len(counts)} classes have no objects in {labels}, the first {absent[0]}",
            DataWarning,
            stacklevel=3,
        )


def _warn_of_unlabelled(raw: RawLabels, folder: ImageFolder, labels: Path) -> None:
    missing = folder.unlabelled(Path(image.path) for image in raw.images)
    if missing:
        warnings.warn(
            f"{len(missing)} of {len(folder.paths)} images have no labels in {labels} and are left out, the first "
            f"{missing[0]}",
            DataWarning,
            stacklevel=3,
        )
