"""Names of vector files that pyogrio takes for paths, whatever characters are in them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["layer_name", "reading_path", "writing_path"]

# pyogrio parses names as URLs: it drops what follows ";" and control characters, and takes "!" for the border of an
# archive.
_URL_MARKS = frozenset(";!?\t\r\n")
# GDAL refuses a GeoPackage's layer whose name begins with one of these.
_NOT_FIRST = "`~!@#$%^&*()+-={}|[]\\:\";'<>?,./"


def layer_name(stem: str) -> str:
    """A layer's name for a file's: without the marks at its beginning that GeoPackages can't have."""
    return _unicode(stem).lstrip(_NOT_FIRST) or "objects"


@contextmanager
def writing_path(path: Path) -> Iterator[Path]:
    """The path to write a file of one piece at, which is moved to `path` when the block ends well."""
    if _is_plain(str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        # The file itself is made beside `path`, where its disk is.
        made = Path(folder, "target", f"made{path.suffix}")
        made.parent.symlink_to(path.absolute().parent, target_is_directory=True)
        yield made
        os.replace(path.absolute().parent / made.name, path)


@contextmanager
def reading_path(path: str) -> Iterator[str]:
    """The path to read a file and those of its name beside it at; what isn't there stays as it is."""
    if _is_plain(path) or not Path(path).is_file():
        yield path
        return
    source = Path(path).absolute()
    with tempfile.TemporaryDirectory() as folder:
        for each in source.parent.iterdir():
            if each.name.startswith(f"{source.stem}."):
                Path(folder, f"file{each.name[len(source.stem) :]}").symlink_to(each)
        yield str(Path(folder, f"file{source.suffix}"))


def _is_plain(path: str) -> bool:
    return not _URL_MARKS & set(path) and _unicode(path) == path == path.strip()


def _unicode(text: str) -> str:
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")
