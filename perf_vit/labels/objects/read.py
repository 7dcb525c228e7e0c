"""Reader of object labels of any registered format."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from perf_vit.errors import DataWarning, InputError
from perf_vit.labels.image_folder import ImageFolder
from perf_vit.labels.objects.coco import ids_of_classes
from perf_vit.labels.objects.records import LABEL_FORMATS, LabelOptions, ObjectIndex, RawLabels
from perf_vit.labels.objects.validate import validate_labels
from perf_vit.sources import open_source, split_layer
from perf_vit.sources._qupath import is_ignored_class
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
        labels: File (coco, csv), folder with one file per image (voc, yolo, dota, instances), or either (polygons).
        images: Folder (searched recursively), image file, glob, or several of these.
        label_format: Format: coco, voc, yolo, dota, instances, polygons (GeoJSON, GeoPackage, shapefile), csv or a
            registered one.
        classes: Class names in the order of their indices; None for those of the label files.
        skip_classes: Names of objects to leave out, as if they were background.
        attribute: Column with class names of polygons; None if all objects have the same class.
        names: Names of the images to use, with or without suffix; None for all labelled images.
        open_input: Function that opens an image by path. Labels of slides are in pixels of level 0 (polygons: in
            QuPath's coordinates), whatever the resolution they are read at.
        oriented: Whether objects are oriented boxes; outlines, such as YOLO's four corners, become the smallest
            oriented boxes around them.

    Raises:
        ConfigError: The format is unknown, or polygons have several classes but no attribute.
        InputError: Files can't be read or are inconsistent; see `validate_labels` for invalid objects.
    """
    reader = LABEL_FORMATS[label_format]
    place = Path(labels)
    if not Path(split_layer(str(place))[0]).exists():
        raise InputError(f"no labels at {place}; check the path")
    if reader.one_file and place.is_dir():
        raise InputError(f"labels of the format {label_format} are a single file, got the folder {place}")
    folder = ImageFolder(images, names)
    raw = reader.read(place, folder, LabelOptions(classes=classes, attribute=attribute))
    if reader.one_file:
        folder.check_named(Path(image.path) for image in raw.images)
    _check_unique(raw)
    _warn_of_unlabelled(raw, folder, place)
    index = validate_labels(
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
    """Check that no image is labelled twice, which would be ambiguous."""
    path, number = Counter(image.path for image in raw.images).most_common(1)[0] if raw.images else ("", 0)
    if number > 1:
        files = [image.labels for image in raw.images if image.path == path]
        raise InputError(f"{path} is labelled {number} times, by {' and '.join(files[:2])}; keep the labels once")


def _own_classes(raw: RawLabels, skip_classes: Collection[str]) -> tuple[str, ...]:
    found = raw.classes or sorted({item.name for image in raw.images for item in image.objects})
    return tuple(name for name in found if name not in skip_classes and not is_ignored_class(name))


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
