"""Registry of readers of image formats that GDAL doesn't read: whole slides, by the suffix of their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from perf_vit.errors import InputError
from perf_vit.registry import Registry

if TYPE_CHECKING:
    from perf_vit.sources.slides.pyramid import PyramidReader

__all__ = ["READERS", "find_reader", "register_source"]

OpenReader = Callable[[str], "PyramidReader"]
R = TypeVar("R", bound=OpenReader)

READERS: Registry[OpenReader] = Registry("suffix of a source", InputError)
"""Functions that open a path as a `PyramidReader`, by suffix."""


def register_source(*suffixes: str) -> Callable[[R], R]:
    """Decorate a class or function (path) -> `PyramidReader` to open all files with these suffixes.

    `perf_vit.open`, folders and globs of images, configs and all commands find the files then, and read them as they
    read slides.

    Args:
        suffixes: Ends of file names in lower case, such as ".svs" or ".ome.tif".

    Raises:
        ValueError: If a suffix is taken, or isn't in lower case with a dot.
    """
    wrong = [suffix for suffix in suffixes if not suffix.startswith(".") or suffix != suffix.lower()]
    if wrong:
        raise ValueError(f"suffix of a source must be in lower case and start with a dot, got {wrong[0]!r}")

    def register(reader: R) -> R:
        for suffix in suffixes:
            READERS.add(suffix, reader)
        return reader

    return register


def find_reader(path: str) -> OpenReader | None:
    """Return the reader with the longest suffix that a path ends in, None if there is none."""
    name = path.lower().rstrip("/")
    suffixes = [suffix for suffix in READERS if name.endswith(suffix)]
    return READERS[max(suffixes, key=len)] if suffixes else None
