"""Names of images, which labels, tables and outputs go by."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from perf_vit.sources.files import image_suffixes

__all__ = ["image_name", "image_names", "names_of", "with_name"]

_DATASET = re.compile(r'(?:\w+:)?"?([^":]+)\.\w+"?:+([^:]+)')


def image_name(path: str | Path) -> str:
    """Return the name of an image: that of its file or folder without the suffix, `fluo` for `fluo.ome.tif`.

    Of a dataset in a file, `NETCDF:file.nc:variable`, it has both, `file_variable`. Folders of DICOM files keep their
    dots.

    Args:
        path: File, folder, URL or GDAL path.
    """
    given = os.fspath(path)
    name = PurePosixPath(given.partition("?")[0] if "://" in given else with_name(Path(given)).as_posix()).name
    if dataset := _DATASET.fullmatch(name):
        return f"{dataset[1]}_{dataset[2]}"
    lower = name.lower()
    known = max((each for each in image_suffixes() if lower.endswith(each)), key=len, default="")
    if 0 < len(known) < len(name):
        return name[: -len(known)]
    return name if os.path.isdir(given) else PurePosixPath(name).stem


def with_name(path: Path) -> Path:
    """Return a path whose last part is a name: an absolute one for `.` and `..`."""
    return path.resolve() if path.name in ("", "..") else path


def names_of(path: str | Path) -> tuple[str, ...]:
    """Return all names by which labels and tables may call an image, the full one first, without folders."""
    name = Path(path).name
    return tuple(dict.fromkeys([name, image_name(path), PurePosixPath(name).stem]))


def image_names(paths: Iterable[str | Path]) -> dict[str, str]:
    """Return a file name for each image; images of one name get a number, as `a-2`, that no other image has.

    Names that differ in case only count as one, as some file systems keep one of them.
    """
    named = {os.fspath(path): image_name(path) for path in paths}
    own = {name.casefold() for name in named.values()}
    taken: set[str] = set()
    for path, name in named.items():
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        free = (each for each in numbered if each.casefold() not in taken | own)
        named[path] = name if name.casefold() not in taken else next(free)
        taken.add(named[path].casefold())
    return named
