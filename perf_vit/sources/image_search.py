"""Search for images in files, folders and globs, the same for every task."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from perf_vit.errors import DataWarning, InputError
from perf_vit.sources.files import (
    FOLDER_SUFFIXES,
    PICTURE_SUFFIXES,
    image_name,
    image_suffixes,
    is_by_product,
    is_image_name,
    is_own,
    names_of,
    with_name,
)
from perf_vit.sources.slide_files import data_folders, is_dicom_folder, one_per_slide, parts_of_slides, walk

__all__ = [
    "NamedImages",
    "files_below",
    "find_images",
    "image_root",
    "images_at",
    "is_glob",
    "is_image_folder",
    "previews_among",
    "without_own",
    "without_repeats",
]


def is_image_folder(path: str | Path) -> bool:
    """Return whether a folder is one image: a Zarr, or the DICOM files of a slide and no other images."""
    return os.path.isdir(path) and (Path(path).suffix.lower() in FOLDER_SUFFIXES or is_dicom_folder(path))


def is_glob(path: str | Path) -> bool:
    """Return whether a path has wildcards and isn't an existing file or folder."""
    return glob.has_magic(str(path)) and not Path(path).exists()


def image_root(path: str | Path) -> Path:
    """Return the folder that image names are relative to: a folder, an image's parent, or the folder of a glob.

    Of a glob in a folder that is one slide, it is the parent of that folder.
    """
    given = Path(path)
    if given.is_dir() and not is_image_folder(given):
        return given
    path = with_name(given)
    if not is_glob(path):
        return path.parent
    root = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
    return with_name(root).parent if is_dicom_folder(root) else root


def files_below(root: Path, wanted: Callable[[str], bool]) -> list[Path]:
    """Find files and image folders below a folder, sorted, without hidden files and by-products of other programs.

    Links to folders are followed once per folder, so that cyclic links end.

    Args:
        root: Folder.
        wanted: Function that tells whether a file name is searched for.
    """
    return sorted(Path(parent, name) for parent, names in walk(root) for name in names if wanted(name))


def without_repeats(paths: Iterable[Path]) -> list[Path]:
    """Remove paths of the same file through links to folders, keeping the shortest ones."""
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(paths, key=lambda path: (len(path.parts), path)):
        found.setdefault((os.path.realpath(path.parent), path.name), path)
    return sorted(found.values())


def previews_among(paths: Iterable[Path]) -> set[Path]:
    """Return the previews, i.e. photos next to a raster or slide of the same name: `a.png` next to `a.tif`."""
    found = list(paths)
    others = [path for path in found if path.suffix.lower() not in PICTURE_SUFFIXES]
    images = {path.with_name(name) for path in others for name in names_of(path)[1:]}
    pictures = (path for path in found if path.suffix.lower() in PICTURE_SUFFIXES)
    return {path for path in pictures if path.with_name(image_name(path)) in images}


def find_images(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """Find the images of files, folders and globs; see `images_at`.

    Args:
        paths: Files, folders and globs, or one of them.

    Returns:
        Unique images in the order of the paths, sorted by name within a folder or glob.

    Raises:
        InputError: There are no paths, a path doesn't exist, or a folder or glob has no images.
    """
    several = [paths] if isinstance(paths, str | Path) else list(paths)
    if not several:
        raise InputError("expected files, folders or globs of images, got none")
    found = [image for path in map(Path, several) for image in images_at(path)]
    return list(dict.fromkeys(found))


def images_at(path: Path) -> list[Path]:
    """Find the images of a file, folder or glob.

    Files are taken as they are, and so is a folder that is one image. Other folders are searched recursively for the
    suffixes of rasters, slides and photos, without hidden files, by-products of other programs and, where there are
    other images, outputs of perf_vit; so are globs, in which `**` matches any folders. A slide of several files (DICOM,
    MIRAX, VMS) is found once. Masks among the images are found, too, so keep them elsewhere or list the images.

    Raises:
        InputError: The path doesn't exist, or a folder or glob has no images.
    """
    if is_glob(path):
        found = list(_matches(path))
        if not found:
            raise InputError(f"no image matches {path}; expected files that end in {', '.join(image_suffixes())}")
        return without_own(found)
    if path.is_file() or is_image_folder(path):
        return [with_name(path)]
    if not path.is_dir():
        raise InputError(f"no image file or folder {path}; check the path")
    found = _images_below(path)
    if not found:
        raise InputError(f"no images in {path}; expected files that end in {', '.join(image_suffixes())}")
    return without_own(found)


class NamedImages:
    """Images of a folder, found by path or name; suffixes may be left out.

    Each folder is listed once, and only images whose name fits are opened.

    Args:
        folder: Folder that names are relative to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[Path, dict[str, list[str]]] = {}

    def find(self, name: str) -> list[Path]:
        """Return the image of a name; several if it fits as many, none if it fits none.

        Args:
            name: Name, with the subfolders in which the image lies.
        """
        target = self.folder / name
        if target.is_file():
            return [target]
        fitting = self._entries_in(target.parent).get(target.name, [])
        images = [path for path in _images_among(target.parent, fitting) if target.name in names_of(path)]
        images = [path for path in images if path not in previews_among(images)]
        exact = [path for path in images if path.name == target.name]
        return exact or images or ([target] if target.exists() else [])

    def _entries_in(self, parent: Path) -> dict[str, list[str]]:
        """Return the files and folders in a folder by each of their names, without those that are parts of slides."""
        if parent not in self._entries:
            found: dict[str, list[str]] = {}
            listed = sorted(os.listdir(parent)) if parent.is_dir() else []
            data, parts = data_folders(listed), parts_of_slides(parent, listed)
            for entry in listed:
                if not is_by_product(entry) and entry not in parts and entry.lower() not in data:
                    for name in names_of(parent / entry):
                        found.setdefault(name, []).append(entry)
            self._entries[parent] = found
        return self._entries[parent]


def without_own(paths: Sequence[Path]) -> list[Path]:
    """Remove outputs of perf_vit from images that a search found, unless there are no others; warn about them."""
    own = {path for path in paths if is_own(path)}
    if not own or len(own) == len(paths):
        return list(paths)
    warnings.warn(
        f"{len(own)} of {len(paths)} images found are outputs of perf_vit and left out, the first {min(own)}; "
        "name one itself to use it",
        DataWarning,
        stacklevel=4,
    )
    return [path for path in paths if path not in own]


def _images_below(root: Path) -> list[Path]:
    return _outside_slides(sorted(path for parent, names in walk(root) for path in _images_among(Path(parent), names)))


def _outside_slides(paths: Sequence[Path]) -> list[Path]:
    """Remove photos in the folder of a slide, such as its thumbnail."""
    folders = {path for path in paths if path.is_dir()}
    return [path for path in paths if folders.isdisjoint(path.parents)]


def _images_among(parent: Path, names: Sequence[str]) -> list[Path]:
    """Return the images among files and folders of a folder, each slide once."""
    data = data_folders(names)
    images = [name for name in names if is_image_name(name) or is_image_folder(parent / name)]
    return one_per_slide(parent, [name for name in images if name.lower() not in data])


def _matches(pattern: Path) -> Iterator[Path]:
    """Yield the images that a glob matches; of a glob that names a suffix, whatever the suffix is."""
    matches = without_repeats(map(Path, glob.glob(str(pattern), recursive=True)))
    any_suffix = bool(pattern.suffix) and not glob.has_magic(pattern.suffix)
    names: dict[Path, list[str]] = {}
    for path in matches:
        is_found = is_image_folder(path) or (path.is_file() and (any_suffix or is_image_name(path.name)))
        if is_found and not is_by_product(path.name):
            names.setdefault(path.parent, []).append(path.name)
    yield from _outside_slides([path for parent, found in names.items() for path in one_per_slide(parent, found)])
