"""What may be written: no input, and no file that exists already unless the user says so."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from perf_vit.errors import OutputError
from perf_vit.io._input_files import input_files

__all__ = ["check_outputs", "existing_error", "existing_outputs"]


def check_outputs(
    outputs: Iterable[str | Path], inputs: Iterable[str | Path | None], *, overwrite: bool = False
) -> None:
    """Refuse outputs that would destroy a file of the user; called before anything is computed.

    Args:
        outputs: all files of a job.
        inputs: all that the job reads: files, folders, patterns and lists, with their members; None and URLs are
            passed over. No file of an input folder may be replaced.
        overwrite: allow outputs that exist and are no inputs.

    Raises:
        OutputError: an output is an input or part of one, is a folder, is named twice, lies where nothing can be
            written, or exists without `overwrite`.
    """
    paths = [Path(path) for path in outputs]
    existing = existing_outputs(paths)
    _refuse_inputs(existing, [each for each in inputs if each is not None])
    _refuse_twice(paths)
    for path in paths:
        _check_place(path)
    if existing and not overwrite:
        raise existing_error(existing[0])


def existing_outputs(outputs: Iterable[Path]) -> list[Path]:
    """Those of some paths where a file, a folder or a link is."""
    return [path for path in outputs if os.path.lexists(_plain(path))]


def existing_error(path: Path, reason: str = "") -> OutputError:
    """The error that says that an output exists and what to do.

    Args:
        path: the output.
        reason: why it is not what would be written, as in ", but of another model".
    """
    return OutputError(
        f"{path} exists already{reason}; choose another output, or replace it with --overwrite (overwrite=True)"
    )


def _refuse_inputs(existing: Sequence[Path], inputs: Sequence[str | Path]) -> None:
    # A file that doesn't exist is no input, so members need not be looked for in most cases.
    by_identity = {_identity(_plain(path)): path for path in existing if _plain(path).exists()}
    if not by_identity:
        return
    for origin, file in input_files(inputs):
        path = by_identity.get(_identity(file))
        if path is not None:
            whole = os.path.exists(origin) and os.path.samefile(origin, file)
            raise OutputError(
                f"{path} would replace {'' if whole else 'a part of '}the input {origin}; choose another output"
            )


def _plain(path: Path) -> Path:
    """A path whose folders are made as it is written, without dots: `new/../a.tif` becomes `a.tif`."""
    return path if path.parent.exists() else Path(os.path.normpath(path))


def _identity(path: Path) -> tuple[int, int]:
    """The same for all names of a file, by links of both kinds."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _refuse_twice(paths: Sequence[Path]) -> None:
    taken: set[str] = set()
    for path in paths:
        name = os.path.abspath(path)
        if name in taken:
            raise OutputError(f"{path} would be written twice by one command; choose another output or its suffix")
        taken.add(name)


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise OutputError(f"can't write {path}: it is a folder; choose a file in it")
    nearest = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not nearest.is_dir():
        raise OutputError(f"can't write {path}: a parent is not a folder; choose another output")
    if not os.access(nearest, os.W_OK):
        raise OutputError(f"can't write {path}: permission denied; choose another output")
