"""Folders of images, each with a label file of its own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from perf_vit.data.crops import image_root, is_glob
from perf_vit.data.labels.image_folder import ImageFolder
from perf_vit.errors import DataWarning, InputError
from perf_vit.io import MASK_SUFFIXES, files_below, is_vector_name
from perf_vit.types import InputPath

__all__ = ["find_label_pairs", "is_labelled_folder"]


def is_labelled_folder(images: InputPath, labels: str | Path) -> bool:
    """Whether labels are a folder, and images a folder, a glob or a list: each image has a label file of its own."""
    if not Path(labels).is_dir():
        return False
    return not isinstance(images, str | Path) or Path(images).is_dir() or is_glob(images)


def find_label_pairs(images: InputPath, labels: str | Path) -> list[tuple[Path, Path]]:
    """Images and their label files, masks or polygons, which have the images' names but for the ending.

    Both folders are searched with their subfolders, and one may lie in the other: then what lies there is no image, or
    no label. In one folder for both, masks can't be told from images, so labels are polygons there. Images without
    label file are left out with a warning.

    Args:
        images: a folder, a glob, or a list of these and of files.
        labels: a folder.

    Returns:
        Sorted by the images' names.

    Raises:
        InputError: no images or label files, a label file without image, or two of one image.
    """
    at_labels = Path(labels)
    given = [images] if isinstance(images, str | Path) else list(images)
    roots = [image_root(each) for each in given]
    folder = ImageFolder(given, without=[inner for root in roots if (inner := _inside(root, at_labels)) is not None])
    files = _label_files(at_labels, roots)
    orphans = [file for file in files if not folder.has(_name(file, at_labels))]
    if orphans:
        raise InputError(
            f"{len(orphans)} of {len(files)} label files in {labels} have no image of their name among the "
            f"{len(folder.paths)} in {folder.root}, the first {orphans[0]}; a label file has its image's name but for "
            "the ending"
        )
    pairs: dict[Path, Path] = {}
    for file in files:
        image = folder.find(_name(file, at_labels), str(file))
        if image in pairs:
            raise InputError(f"{image} has two label files, {pairs[image]} and {file}; keep one of them")
        pairs[image] = file
    _warn_of_unlabelled(folder.unlabelled(pairs), len(folder.paths), labels)
    return sorted(pairs.items())


def _name(file: Path, root: Path) -> str:
    return str(file.relative_to(root).with_suffix(""))


def _inside(outer: Path, inner: Path) -> Path | None:
    """A folder's path as a search of another one finds it; None if it isn't inside."""
    whole, part = outer.resolve(), inner.resolve()
    return outer / part.relative_to(whole) if whole in part.parents else None


def _label_files(labels: Path, images: Sequence[Path]) -> list[Path]:
    """Files of masks and polygons in a folder, but for those in the folders of images inside it."""
    same = any(labels.resolve() == root.resolve() for root in images)
    suffixes = frozenset[str]() if same else MASK_SUFFIXES
    inner = {_inside(labels, root) for root in images}
    found = files_below(labels, lambda name: Path(name).suffix.lower() in suffixes or is_vector_name(name))
    files = [file for file in found if not inner.intersection(file.parents)]
    if not files:
        raise InputError(f"no label files in {labels}; expected masks ({', '.join(sorted(MASK_SUFFIXES))}) or polygons")
    return files


def _warn_of_unlabelled(missing: Sequence[Path], num_images: int, labels: str | Path) -> None:
    if missing:
        warnings.warn(
            f"{len(missing)} of {num_images} images have no labels in {labels} and are left out, the first "
            f"{missing[0]}",
            DataWarning,
            stacklevel=3,
        )
