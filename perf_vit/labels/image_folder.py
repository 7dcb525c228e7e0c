"""Lookup of images and label files by name."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from perf_vit.errors import DataWarning, InputError
from perf_vit.sources import MASK_SUFFIXES, files_below, find_images, is_vector_name, names_of, previews_among
from perf_vit.sources.image_search import image_root
from perf_vit.types import InputPath

__all__ = ["ImageFolder", "find_label_pairs", "label_files", "read_lines", "vector_files_below", "warn_of_previews"]


class ImageFolder:
    """Images found by path within the folder or by file name, with or without suffix, or else by their whole path.

    An image next to a raster of the same name is a preview, which is only found by its name with suffix.

    Args:
        images: Folder (searched recursively), image file, glob, or several of these.
        names: Names of the images to use; None for all.
        without: Subfolders that are not searched.

    Raises:
        InputError: There are no images, or a name matches none or several.
    """

    def __init__(
        self,
        images: InputPath,
        names: Sequence[str] | None = None,
        *,
        without: Collection[Path] = (),
    ) -> None:
        given = [images] if isinstance(images, str | Path) else list(images)
        self.root = " and ".join(map(str, given))
        roots = [(path, image_root(each)) for each in given for path in find_images([each])]
        roots = [(path, root) for path, root in roots if not set(without).intersection(path.parents)]
        found = list(dict(roots))
        self._found = {os.path.abspath(path): path for path in found}
        previews = previews_among(found)
        self.paths = [path for path in found if path not in previews]
        self._known: dict[str, set[Path]] = {}
        for path, root in roots:
            inside = path.relative_to(root)
            for name in names_of(path)[: 1 if path in previews else None]:
                self._known.setdefault(str(inside.with_name(name)), set()).add(path)
                self._known.setdefault(name, set()).add(path)
        warn_of_previews(previews, len(found), ", unless labels name them with their ending")
        self._wanted = None if names is None else {self.find(name, "the list of names") for name in names}

    def has(self, name: str) -> bool:
        """Return whether any image matches a name from a label file."""
        return str(Path(name)) in self._known or os.path.abspath(name) in self._found

    def find(self, name: str, labels: str) -> Path:
        """Return the image that matches a name from a label file.

        Raises:
            InputError: No image matches, or several do.
        """
        # As with the whole path, which may be written in several ways.
        whole = self._found.get(os.path.abspath(name))
        found = self._known.get(str(Path(name))) or ({whole} if whole is not None else set())
        if len(found) == 1:
            return next(iter(found))
        if found:
            raise InputError(
                f"{labels} names {name}, which fits {len(found)} images in {self.root}, such as "
                f"{' and '.join(map(str, sorted(found)[:2]))}; give one of their folders"
            )
        raise InputError(
            f"{labels} names the image {name}, which is not among the {len(self.paths)} in {self.root}; "
            "check the images folder"
        )

    def wanted(self, path: Path) -> bool:
        """Return whether an image is in the list of names."""
        return self._wanted is None or path in self._wanted

    def check_named(self, labelled: Iterable[Path]) -> None:
        """Check that all images in the list of names have labels.

        Raises:
            InputError: An image in the list has no labels.
        """
        missing = [] if self._wanted is None else self.unlabelled(labelled)
        if missing:
            raise InputError(
                f"{len(missing)} images on the list of names have no labels, the first {missing[0]}; check the list"
            )

    def unlabelled(self, labelled: Iterable[Path]) -> list[Path]:
        """Return the images to use that have no labels."""
        known = set(labelled)
        return [path for path in self.paths if self.wanted(path) and path not in known]


def warn_of_previews(previews: Collection[Path], num_images: int, unless: str = "") -> None:
    """Warn about images that are left out as previews, if any; see `previews_among`."""
    if previews:
        warnings.warn(
            f"{len(previews)} of {num_images} images are taken as previews of the rasters beside them and left out"
            f"{unless}, the first {min(previews)}",
            DataWarning,
            stacklevel=4,
        )


def read_lines(file: Path) -> list[str]:
    """Read the lines of a text file of labels.

    Raises:
        InputError: The file can't be read as text.
    """
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read {file} as text: {error}; it may be damaged") from error


def label_files(labels: Path, folder: ImageFolder, suffix: str) -> list[tuple[Path, Path]]:
    """Pair the images to use with their label files, which have the same name except for the suffix.

    Args:
        labels: Folder (searched recursively), or a label file.
        folder: Images.
        suffix: Suffix of label files, such as ".xml".

    Raises:
        InputError: There are no label files, or one has no image.
    """
    files = [labels] if labels.is_file() else files_below(labels, lambda name: name.lower().endswith(suffix))
    if not files:
        raise InputError(f"no label files in {labels}; expected files that end in {suffix}")
    root = labels if labels.is_dir() else labels.parent
    pairs = [(folder.find(str(file.relative_to(root).with_suffix("")), str(file)), file) for file in files]
    return [(image, file) for image, file in pairs if folder.wanted(image)]


def find_label_pairs(images: InputPath, labels: str | Path) -> list[tuple[Path, Path]]:
    """Pair images with their label files (masks or polygons), which have the same name except for the suffix.

    Both folders are searched recursively. If one contains the other, files in the inner folder belong to it only. In a
    single folder for both, label files must be polygons, as masks can't be told from images. Images without label file
    are left out with a warning.

    Args:
        images: Folder, glob, or list of these and of files; of a list of files, labels of other images are left out.
        labels: Folder.

    Returns:
        Pairs of image and label file, sorted by image name.

    Raises:
        InputError: There are no images or label files, a label file has no image, or an image has two label files.
    """
    at_labels = Path(labels)
    given = [images] if isinstance(images, str | Path) else list(images)
    roots = [image_root(each) for each in given]
    folder = ImageFolder(given, without=[inner for root in roots if (inner := _inside(root, at_labels)) is not None])
    files = _label_files(at_labels, roots)
    orphans = [file for file in files if not folder.has(_name(file, at_labels))]
    if len(orphans) < len(files) and all(Path(each).is_file() for each in given):
        # A list of files chooses some of the labelled images.
        files = [file for file in files if file not in set(orphans)]
    elif orphans:
        raise InputError(
            f"{len(orphans)} of {len(files)} label files in {labels} have no image of their name among the "
            f"{len(folder.paths)} in {folder.root}, the first {orphans[0]}; a label file has the name of its image "
            "except for the suffix"
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
    """Return a folder's path as found by a search of another folder; None if it isn't inside."""
    whole, part = outer.resolve(), inner.resolve()
    return outer / part.relative_to(whole) if whole in part.parents else None


def vector_files_below(folder: Path, suffixes: Collection[str] = ()) -> list[Path]:
    """Find the files of polygons below a folder, and those with other suffixes; XML only of ASAP."""
    known = {*suffixes, ".xml"}
    found = files_below(folder, lambda name: Path(name).suffix.lower() in known or is_vector_name(name))
    return [path for path in found if path.suffix.lower() != ".xml" or is_vector_name(str(path))]


def _label_files(labels: Path, images: Sequence[Path]) -> list[Path]:
    """Find the masks and polygon files in a folder, except for those in image folders inside it."""
    same = any(labels.resolve() == root.resolve() for root in images)
    suffixes = frozenset[str]() if same else MASK_SUFFIXES
    inner = {_inside(labels, root) for root in images}
    found = vector_files_below(labels, suffixes)
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
