"""Which files of a folder are images: one table for training, prediction, mosaics and labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

__all__ = [
    "FOLDER_SUFFIXES",
    "IMAGE_SUFFIXES",
    "MASK_SUFFIXES",
    "PICTURE_SUFFIXES",
    "RASTER_SUFFIXES",
    "SLIDE_SUFFIXES",
    "files_below",
    "is_by_product",
    "is_image_name",
    "previews_among",
    "without_repeats",
]

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
"""Of photos, and of previews that lie beside rasters."""

RASTER_SUFFIXES = PICTURE_SUFFIXES | {".tif", ".tiff", ".vrt", ".img", ".jp2", ".j2k", ".bil", ".asc"}
"""Of files that GDAL reads. A file that is named itself may have any ending."""

SLIDE_SUFFIXES = frozenset({".bif", ".czi", ".dcm", ".mrxs", ".ndpi", ".scn", ".svs", ".svslide", ".vms", ".vmu"})
"""Of files that OpenSlide alone reads."""

FOLDER_SUFFIXES = frozenset({".zarr"})
"""Of folders that are one image each."""

IMAGE_SUFFIXES = RASTER_SUFFIXES | SLIDE_SUFFIXES | FOLDER_SUFFIXES
"""Of what a folder is searched for."""

MASK_SUFFIXES = RASTER_SUFFIXES - {".jpg", ".jpeg"}
"""Of masks: JPEG changes values."""

_BY_PRODUCTS = frozenset({"thumbs.db", "desktop.ini", "ehthumbs.db", "__macosx", "@eadir", "$recycle.bin"})
_BY_PRODUCT_ENDINGS = (".aux.xml", ".ovr", ".msk", ".partial", ".part", ".crdownload", "~")


def is_by_product(name: str) -> bool:
    """Whether the name of a file or folder is hidden, or that of what other programs leave behind."""
    name = name.lower()
    return name.startswith(".") or name in _BY_PRODUCTS or name.endswith(_BY_PRODUCT_ENDINGS)


def is_image_name(name: str) -> bool:
    """Whether a folder is searched for files of such a name."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def files_below(root: Path, wanted: Callable[[str], bool]) -> list[Path]:
    """Files and image folders below a folder, sorted, without hidden ones and what other programs leave behind.

    Links to folders are followed, each folder once, so that a link to a folder above ends nowhere.

    Args:
        root: the folder.
        wanted: whether a file's name is looked for.
    """
    return sorted(path for path in _walk(root) if wanted(path.name))


def without_repeats(paths: Iterable[Path]) -> list[Path]:
    """Paths but for those that name a file of an earlier one through a link to its folder; short ones first."""
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(paths, key=lambda path: (len(path.parts), path)):
        found.setdefault((os.path.realpath(path.parent), path.name), path)
    return sorted(found.values())


def previews_among(paths: Iterable[Path]) -> set[Path]:
    """Pictures that lie beside a raster or slide of their name: `a.png` beside `a.tif`."""
    found = list(paths)
    images = {path.with_suffix("") for path in found if path.suffix.lower() not in PICTURE_SUFFIXES}
    pictures = (path for path in found if path.suffix.lower() in PICTURE_SUFFIXES)
    return {path for path in pictures if path.with_suffix("") in images}


def _walk(root: Path) -> Iterator[Path]:
    seen = set()
    for parent, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_by_product(name))
        images = [name for name in folders if os.path.splitext(name)[1].lower() in FOLDER_SUFFIXES]
        folders[:] = [name for name in folders if name not in images]
        regular = [name for name in files if not is_by_product(name) and os.path.isfile(os.path.join(parent, name))]
        yield from (Path(parent, name) for name in [*images, *regular])
