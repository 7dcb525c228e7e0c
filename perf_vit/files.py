"""Atomic file output, JSON and text files."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from perf_vit.errors import OutputError
from perf_vit.text import to_json

__all__ = ["atomic_file", "put_in_place", "read_json_or_none", "sibling_path", "staged", "write_json", "write_text"]

# Longest file name of most file systems, in bytes; temporary names add up to eight random characters.
_MAX_NAME = 255

_SPARE = 10


def sibling_path(path: Path, beginning: str, ending: str) -> Path:
    """Return the path of a working file or folder in the same folder as an output.

    The name is `beginning`, the output's name and `ending`; long names are replaced by a hash.
    """
    name = f"{beginning}{path.name}{ending}"
    if len(os.fsencode(name)) + _SPARE <= _MAX_NAME:
        return path.with_name(name)
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    return path.with_name(f"{beginning}{digest}{ending}")


def read_json_or_none(path: str | Path) -> Any:
    """Return the content of a JSON file; None if it can't be read, isn't JSON or is nested too deeply."""
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a hidden folder next to `path` to write in, and move the file of the same name to `path` on exit.

    After an exception the folder is deleted, with any parents created for it, and an existing output is unchanged.

    Args:
        path: Output path; missing parent folders are created.

    Yields:
        The folder to write `path.name` into.

    Raises:
        OutputError: The path isn't writable.
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
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the hidden path `.NAME.tmp` next to `path` to write, and move it to `path` on exit.

    After an exception it is deleted and an existing `path` is unchanged. A leftover of a killed process is overwritten.
    Only for files written by one process.

    Args:
        path: Output path; its folder must exist.

    Yields:
        The file to write.

    Raises:
        OutputError: The path isn't writable.
    """
    unfinished = sibling_path(path, ".", ".tmp")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            # Without fsync, a crash of the machine may keep the name but lose the content.
            os.fsync(file.fileno())
        put_in_place(unfinished, path)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink()
        if isinstance(error, OSError):
            raise _refusal(path, error) from error
        raise


def put_in_place(made: Path, path: Path) -> None:
    """Rename a file to another name in its place, which outlives a crash of the machine when this returns.

    Without it, what is deleted next may be gone after a crash, and the new name not there yet.
    """
    os.replace(made, path)
    try:
        folder = os.open(path.absolute().parent, os.O_RDONLY)
    except OSError:
        # Windows opens no folders.
        return
    try:
        # Some file systems can't do that to folders, those of some network mounts and virtual machines.
        with suppress(OSError):
            os.fsync(folder)
    finally:
        os.close(folder)


def _make_staging(path: Path, parent: Path) -> tempfile.TemporaryDirectory[str]:
    if path.is_dir():
        raise OutputError(f"can't write {path}: it is a folder; choose a file in it")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=sibling_path(path, ".", ".").name, dir=parent)
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
    """Write plain values as strict JSON, with null for NaN and infinities.

    Raises:
        OutputError: The path isn't writable.
    """
    write_text(path, to_json(value, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8, atomically.

    Raises:
        OutputError: The path isn't writable.
    """
    path = Path(path)
    with staged(path) as folder:
        try:
            (folder / path.name).write_text(text, encoding="utf-8", newline="\n")
        except OSError as error:
            raise OutputError(f"can't write {path}: {error.strerror or error}; choose another output") from error
