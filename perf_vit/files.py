"""Files that appear when they are complete: staging, atomic replacement, JSON and text."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from perf_vit.errors import OutputError
from perf_vit.text import to_json

__all__ = ["beside", "replaced", "staged", "write_json", "write_text"]

# Of most file systems, in bytes; what is made beside an output may have eight letters more than this one.
_MAX_NAME = 255

_SPARE = 10


def beside(path: Path, beginning: str, ending: str) -> Path:
    """Path of a working file or folder beside an output: its name between both, shortened if that were too long."""
    name = f"{beginning}{path.name}{ending}"
    if len(os.fsencode(name)) + _SPARE <= _MAX_NAME:
        return path.with_name(name)
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    return path.with_name(f"{beginning}{digest}{ending}")


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Give a hidden folder beside `path` to write in, and move its file of that name to `path` at the end.

    After an exception the folder is gone, with any parent that was made for it, and an earlier output is untouched.

    Args:
        path: where the output goes; missing parent folders are made.

    Yields:
        The folder to write `path.name` into.

    Raises:
        OutputError: nothing can be written there.
    """
    parent = path.absolute().parent
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        with _make_staging(path, parent) as folder:
            yield Path(folder)
            _move(Path(folder, path.name), path)
    except BaseException:
        for empty in made:
            with suppress(OSError):
                empty.rmdir()
        raise


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give the hidden file `.NAME.tmp` beside `path` to write, and move it to `path` at the end.

    After an exception it is gone and an earlier `path` is untouched. What a killed process left of it is written over.
    For files that one process writes.

    Args:
        path: where the file goes; its folder must exist.

    Yields:
        The file to write.

    Raises:
        OutputError: nothing can be written there.
    """
    unfinished = beside(path, ".", ".tmp")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            # Else a machine that stops may keep the name without the content.
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink()
        if isinstance(error, OSError):
            raise _refusal(path, error) from error
        raise


def _make_staging(path: Path, parent: Path) -> tempfile.TemporaryDirectory[str]:
    if path.is_dir():
        raise OutputError(f"can't write {path}: it is a folder; choose a file in it")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=beside(path, ".", ".").name, dir=parent)
    except OSError as error:
        raise _refusal(path, error) from error


def _move(made: Path, path: Path) -> None:
    try:
        os.replace(made, path)
    except OSError as error:
        raise _refusal(path, error) from error


def _refusal(path: Path, error: OSError) -> OutputError:
    reason = "a parent is not a folder" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
    return OutputError(f"can't write {path}: {str(reason).lower()}; choose another output")


def write_json(path: str | Path, value: Any) -> None:
    """Write plain values as strict JSON; NaN and infinities become null.

    Raises:
        OutputError: nothing can be written there.
    """
    write_text(path, to_json(value, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8.

    Raises:
        OutputError: nothing can be written there.
    """
    path = Path(path)
    with staged(path) as folder:
        try:
            (folder / path.name).write_text(text, encoding="utf-8", newline="\n")
        except OSError as error:
            raise OutputError(f"can't write {path}: {error.strerror or error}; choose another output") from error
