"""Slides of several files: what belongs to one, and what stands for it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from perf_vit.sources.files import FOLDER_SUFFIXES, PICTURE_SUFFIXES, is_by_product, is_image_name, is_own, with_name

__all__ = [
    "SLIDES_OF_SEVERAL_FILES",
    "data_folders",
    "file_to_open",
    "is_dicom_folder",
    "named_files",
    "one_per_slide",
    "parts_of_slides",
    "slide_members",
    "walk",
]

_DICOM = ".dcm"

_MIRAX = ".mrxs"

_HAMAMATSU = (".vms", ".vmu")

SLIDES_OF_SEVERAL_FILES = (_DICOM, _MIRAX, *_HAMAMATSU)
"""Suffixes of slides whose other files lie beside them."""

# VL Whole Slide Microscopy Image Storage.
_WHOLE_SLIDE = b"1.2.840.10008.5.1.4.1.1.77.1.6"

# Study and series follow each other at the top of a file; in references to other series, the series stands alone.
_SERIES = re.compile(rb"\x20\x00\x0d\x00UI..[0-9.\0 ]+\x20\x00\x0e\x00UI..([0-9.]+)", re.DOTALL)

_HEADER_BYTES = 65536

_NUM_LOOKED_AT = 8


def is_dicom_folder(path: str | Path) -> bool:
    """Return whether a folder holds one slide as DICOM files, i.e. one series of whole-slide images.

    A folder that holds other images as well, itself or in its subfolders, is no slide; outputs of perf_vit don't count.
    """
    files = _dicom_files(path) if os.path.isdir(path) else []
    # Volumes of radiology have thousands of files.
    is_of_slides = any(_series(file) is not None for file in files[:_NUM_LOOKED_AT])
    return is_of_slides and len({_series(file) for file in files} - {None}) == 1 and not _has_others(path)


def file_to_open(path: str) -> str:
    """Return the file that a library opens for a slide: of a DICOM folder the largest one, else the path."""
    return str(max(_dicom_files(path), key=os.path.getsize)) if is_dicom_folder(path) else path


def slide_members(path: str | Path) -> list[Path]:
    """Return the files of an image, sorted: the file itself, and those that its format keeps in other places.

    These are all files of a folder, or its DICOM files; of MIRAX those of the data folder; of DICOM those of the
    series; of Hamamatsu's index files those that it names. Missing files and URLs have none.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_dir():
        return _dicom_files(path) or _files_in(path)
    if not path.is_file():
        return []
    if suffix == _MIRAX:
        return [path, *(_files_in(path.with_suffix("")) if path.with_suffix("").is_dir() else [])]
    if suffix == _DICOM and (series := _series(path)) is not None:
        return [file for file in _dicom_files(path.parent) if _series(file) == series]
    others = named_files(path) if suffix in _HAMAMATSU else set()
    return [path, *sorted(path.with_name(name) for name in others if path.with_name(name).is_file())]


def data_folders(names: Iterable[str]) -> set[str]:
    """Return the names, in lower case, that data folders of MIRAX slides have beside these files."""
    return {name.lower().removesuffix(_MIRAX) for name in names if name.lower().endswith(_MIRAX)}


def named_files(index: Path) -> set[str]:
    """Return the names of the files that an index file of Hamamatsu lists."""
    try:
        text = index.read_bytes()[:_HEADER_BYTES].decode("latin-1")
    except OSError:
        return set()
    values = (line.partition("=")[2].strip() for line in text.splitlines())
    return {value for value in values if "." in value and not {"/", "\\", "\0"}.intersection(value)}


def parts_of_slides(parent: Path, names: Iterable[str]) -> set[str]:
    """Return the names of files that index files of Hamamatsu among the files of a folder list."""
    return {part for name in names if name.lower().endswith(_HAMAMATSU) for part in named_files(parent / name)}


def one_per_slide(parent: Path, names: Sequence[str]) -> list[Path]:
    """Return the paths of images among the files of a folder: one for each slide of several files.

    Args:
        parent: Folder.
        names: File names in it.

    Returns:
        Paths in the order of the names; the folder itself where its DICOM files are one slide.
    """
    parts = parts_of_slides(parent, names)
    dicom = [name for name in names if name.lower().endswith(_DICOM)]
    whole = bool(dicom) and is_dicom_folder(parent)
    folder = with_name(parent)
    found: dict[Path, None] = {}
    seen: set[bytes] = set()
    for name in names:
        series = _series(parent / name) if name in dicom else None
        if name in parts or series in seen:
            continue
        if series is not None:
            seen.add(series)
        found[folder if whole and series is not None else parent / name] = None
    return list(found)


def walk(root: str | Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the folders below a folder with the names of their files and Zarrs, sorted.

    Hidden files and by-products of other programs are left out, as are data folders of MIRAX slides. Links to folders
    are followed once per folder, so that cyclic links end.
    """
    seen = set()
    for parent, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_by_product(name))
        images = [name for name in folders if os.path.splitext(name)[1].lower() in FOLDER_SUFFIXES]
        data = data_folders(files)
        folders[:] = [name for name in folders if name not in images and name.lower() not in data]
        regular = [name for name in files if not is_by_product(name) and os.path.isfile(os.path.join(parent, name))]
        yield parent, sorted([*images, *regular])


def _has_others(folder: str | Path) -> bool:
    """Return whether a folder has images other than the DICOM files that lie in it, and outputs of perf_vit.

    Photos don't count: scanners and viewers leave thumbnails and pictures of labels beside a slide.
    """
    top = os.fspath(folder)
    return any(
        is_image_name(name)
        and os.path.splitext(name)[1].lower() not in PICTURE_SUFFIXES
        and not (parent == top and name.lower().endswith(_DICOM))
        and not is_own(Path(parent, name))
        for parent, names in walk(top)
        for name in names
    )


def _dicom_files(folder: str | Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.name.lower().endswith(_DICOM) and not e.name.startswith("."))
    return [file for name in names if (file := Path(folder, name)).is_file()]


def _series(path: Path) -> bytes | None:
    """Return the UID of the series of a whole-slide DICOM file; None for other files."""
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
    except OSError:
        return None
    found = _SERIES.search(header) if header[128:132] == b"DICM" and _WHOLE_SLIDE in header else None
    return found and found[1]


def _files_in(folder: Path) -> list[Path]:
    found = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sorted(path for path in found if path.is_file())
