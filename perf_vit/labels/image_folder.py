"""Images by the names that label files give them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from perf_vit.errors import DataWarning, InputError
from perf_vit.sources import MASK_SUFFIXES, files_below, find_images, is_vector_name, previews_among
from perf_vit.sources.files import image_root, is_glob
from perf_vit.types import InputPath

__all__ = ["ImageFolder", "find_label_pairs", "is_labelled_folder", "label_files", "read_lines"]


class ImageFolder:
    """Finds images by path inside the folder, file name, or either without ending.

    A picture beside a raster of its name is a preview, unless it is asked for by its name with ending.

    Args:
        images: a folder, searched with its subfolders, one image, a glob, or several of these.
        names: the images to use; all if None.
        without: folders inside that are not searched.

    Raises:
        InputError: no image there, or a name that fits none or several.
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
        previews = previews_among(found)
        self.paths = [path for path in found if path not in previews]
        self._known: dict[str, set[Path]] = {}
        for path, root in roots:
            inside = path.relative_to(root)
            bare = () if path in previews else (str(inside.with_suffix("")), path.stem)
            for name in (str(inside), path.name, *bare):
                self._known.setdefault(name, set()).add(path)
        _warn_of_previews(previews, len(found))
        self._wanted = None if names is None else {self.find(name, "the list of names") for name in names}

    def has(self, name: str) -> bool:
        """Whether an image, or several, have the name that a label file gives."""
        return str(Path(name)) in self._known

    def find(self, name: str, labels: str) -> Path:
        """The image of a name that a label file gives.

        Raises:
            InputError: there is none, or several have this name.
        """
        found = self._known.get(str(Path(name)), set())
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
        """Whether an image is on the list of names."""
        return self._wanted is None or path in self._wanted

    def check_named(self, labelled: Iterable[Path]) -> None:
        """Refuse a list of names of which some have no labels.

        Raises:
            InputError: an image on the list is not among the labelled ones.
        """
        missing = [] if self._wanted is None else self.unlabelled(labelled)
        if missing:
            raise InputError(
                f"{len(missing)} images on the list of names have no labels, the first {missing[0]}; check the list"
            )

    def unlabelled(self, labelled: Iterable[Path]) -> list[Path]:
        """Wanted images that are not among the labelled ones."""
        known = set(labelled)
        return [path for path in self.paths if self.wanted(path) and path not in known]


def _warn_of_previews(previews: Collection[Path], num_images: int) -> None:
    if previews:
        warnings.warn(
            f"{len(previews)} of {num_images} images are taken as previews of the rasters beside them and left out, "
            f"unless labels name them with their ending, the first {min(previews)}",
            DataWarning,
            stacklevel=4,
        )


def read_lines(file: Path) -> list[str]:
    """The lines of a text file of labels.

    Raises:
        InputError: it can't be read as text.
    """
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read {file} as text: {error}; it may be damaged") from error


def label_files(labels: Path, folder: ImageFolder, suffix: str) -> list[tuple[Path, Path]]:
    """Pairs of a wanted image and its label file, which has the image's name but for the ending.

    Args:
        labels: a folder, searched with its subfolders, or one label file.
        folder: the images.
        suffix: of label files, such as ".xml".

    Raises:
        InputError: no label files, or one without an image.
    """
    files = [labels] if labels.is_file() else files_below(labels, lambda name: name.lower().endswith(suffix))
    if not files:
        raise InputError(f"no label files in {labels}; expected files that end in {suffix}")
    root = labels if labels.is_dir() else labels.parent
    pairs = [(folder.find(str(file.relative_to(root).with_suffix("")), str(file)), file) for file in files]
    return [(image, file) for image, file in pairs if folder.wanted(image)]


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
