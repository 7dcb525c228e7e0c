"""An unfinished output: its pieces so far, what they were made with, who works on it, and what was damaged."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from filelock import FileLock, Timeout

from perf_vit.errors import BusyError, DataWarning, OutputError, PerfVitError
from perf_vit.files import put_in_place, read_json_or_none, sibling_path
from perf_vit.inference.seams import SeamCount
from perf_vit.sources.describe import SEAM_TAG
from perf_vit.text import to_json
from perf_vit.types import Window

__all__ = [
    "MADE_MAP",
    "MADE_PYRAMID",
    "TOKEN_FOLDER",
    "DamageLog",
    "DamagedPiece",
    "Journal",
    "LineLog",
    "SeamLog",
    "check_partial_folder",
    "discard_journal",
    "has_partial_folder",
    "open_journal",
    "partial_folder",
]

_SETTINGS = "journal.json"
_UNFINISHED_SETTINGS = f"{_SETTINGS}.tmp"
_LOCK = "lock"
_MKDIR_TRIES = 20
MADE_MAP = "map.tmp"
"""Name of a map that is being written."""
MADE_PYRAMID = "pyramid.tmp"
"""Name of the pyramid that an OME-TIFF is being written from."""
TOKEN_FOLDER = "tokens"
"""Name of the folder of a whole image's tokens."""
_PIECES = ("rows_*", "windows_*", "items_*", f"{TOKEN_FOLDER}/{_SETTINGS}")
"""Names of finished pieces of work: rows of a map, windows of a detector, rows of a table, tokens of a whole image."""
_NEXT_TO_MADE = r"\.?(map|pyramid)\.tmp\..+"
"""Names of what writers keep next to a map while they write it, such as a staging folder or a file of statistics."""
_WITHOUT_JOURNAL = re.compile(
    "|".join(
        [
            *map(re.escape, (_LOCK, _UNFINISHED_SETTINGS, MADE_MAP, MADE_PYRAMID)),
            r"(damage|seams)_[0-9a-f]{32}\.jsonl",
            _NEXT_TO_MADE,
        ]
    )
)
"""Names of what a killed process leaves that kept no pieces."""
_TEMPORARY = re.compile(r"tmp[a-z0-9_]{8}|\.nfs[0-9a-f]+")
"""Names of temporary files of a process at work, and of those that it deleted on a network drive."""


class Journal:
    """The folder `OUTPUT.partial` beside an output; `open_journal` makes one.

    Attributes:
        folder: where rows and temporary files go.
        path: the output.
        begun: whether what is in the folder is of this run.
    """

    def __init__(self, folder: Path, path: Path) -> None:
        self.folder = folder
        self.path = path
        self.begun = False

    def settings(self) -> dict[str, Any] | None:
        """What the rows were made with, None where nothing has been begun."""
        return _read_settings(self.folder) or None

    def begin(self, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Go on with an unfinished output of the same settings, or begin a new one.

        Args:
            settings: everything that decides the output, as plain values of JSON.
            resume: go on where there is something; else remove it.

        Raises:
            OutputError: what is there was made with other settings.
        """
        wanted = json.loads(to_json(settings))
        before = self.settings()
        if before is not None and resume:
            self._check(before, wanted)
            for unfinished in self.folder.glob("*.tmp"):
                unfinished.unlink(missing_ok=True)
            self.begun = True
            return
        self.clear()
        with _refusing(self.path):
            _write_settings(self.folder, wanted)
        self.begun = True

    def clear(self) -> None:
        """Remove what an earlier call left.

        Raises:
            OutputError: It can't be removed.
        """
        with _refusing(self.path):
            _clear(self.folder)

    def move(self, made: Path, out: Path | None = None) -> None:
        """Move a finished file to an output's name, by default that of the main one, once it is on disk.

        Raises:
            OutputError: it can't be written there, or its last bytes don't reach the disk.
        """
        out = out or self.path
        with _refusing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            # Its pieces are removed next: a crash of the machine must not keep the name but lose the content.
            with made.open("rb+") as file:
                os.fsync(file.fileno())
            put_in_place(made, out)

    def discard(self, out: Path) -> None:
        """Remove an output of an earlier call, if it is there.

        Raises:
            OutputError: It can't be removed.
        """
        with _refusing(out):
            out.unlink(missing_ok=True)

    def _check(self, before: dict[str, Any], wanted: dict[str, Any]) -> None:
        for name in [*wanted, *before]:
            if before.get(name) != wanted.get(name):
                raise OutputError(
                    f"{self.folder} holds the unfinished {self.path.name}, made with {name} = {before.get(name)}, now "
                    f"{wanted.get(name)}; go on with the same, or begin again with `resume=False`"
                )


def check_partial_folder(path: Path) -> None:
    """Refuse an output whose folder `OUTPUT.partial` is somebody else's.

    Ours holds a journal, or nothing but what precedes one or is made without one.

    Raises:
        OutputError: it is another folder, or a file.
    """
    folder = partial_folder(path)
    if not os.path.lexists(folder) or _read_settings(folder) is not None:
        return
    with suppress(OSError):
        names = os.listdir(folder)
        known = [_WITHOUT_JOURNAL, *([_TEMPORARY] if _LOCK in names else [])]
        if all(any(each.fullmatch(name) for each in known) for name in names):
            return
    # Another process may have finished the output since.
    if not os.path.lexists(folder):
        return
    raise OutputError(
        f"{folder}, where the unfinished {path.name} would be kept, exists and was not made by perf_vit; move it away "
        "or choose another output"
    )


def has_partial_folder(path: Path) -> bool:
    """Whether an output has a folder `OUTPUT.partial`."""
    return partial_folder(path).is_dir()


def discard_journal(path: Path, settings: Mapping[str, Any]) -> None:
    """Remove the folder that a process left which was killed right after it had finished an output.

    What was begun with other settings, to replace the output, is left with a warning.

    Args:
        path: The output, which is there.
        settings: What it was made with.
    """
    before = _read_settings(partial_folder(path)) or {}
    wanted = json.loads(to_json(settings))
    # The device is noted, but does not decide what an output is.
    names = [name for name in wanted if before and name != "device"]
    other = next((name for name in names if before.get(name) != wanted[name]), None)
    if other is not None:
        # Another process may be at work on it.
        with suppress(BusyError), _locked(partial_folder(path), path):
            warnings.warn(
                f"{partial_folder(path)} holds an unfinished {path.name} made with {other} = {before.get(other)}, now "
                f"{wanted[other]}; it is left: finish it with its settings and `overwrite=True`, or delete it",
                DataWarning,
                stacklevel=2,
            )
        return
    with suppress(BusyError), open_journal(path):
        pass


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """Work on an output alone, in a folder beside it that a crash leaves behind.

    The folder is removed when the `with` block ends well, or ends before there is anything to keep.

    Args:
        path: the output; missing parent folders are made.

    Raises:
        BusyError: another process works on it.
        OutputError: nothing can be written there, or the folder is somebody else's.
    """
    folder = partial_folder(path)
    if path.is_dir():
        raise OutputError(f"can't write {path}: it is a folder; choose a file in it")
    check_partial_folder(path)
    made = [parent for parent in (folder, *folder.absolute().parents) if not parent.exists()]
    try:
        with _locked(folder, path):
            journal = Journal(folder, path)
            try:
                yield journal
            except BaseException as error:
                if not any(file for pattern in _PIECES for file in folder.glob(pattern)):
                    _remove(folder)
                elif journal.begun and isinstance(error, PerfVitError):
                    kept = f"{folder.name} keeps what is finished, and the same command goes on there"
                    raise type(error)(f"{error}; {kept}") from error
                raise
            _remove(folder)
    finally:
        for empty in made:
            with suppress(OSError):
                empty.rmdir()


@contextmanager
def _locked(folder: Path, path: Path) -> Iterator[None]:
    busy = BusyError(f"{path} is being written by another process; wait for it, or choose another output")
    # The system drops the lock with the process that holds it, however that ends.
    # One thread may acquire it, and another one release it.
    lock = FileLock(folder / _LOCK, timeout=0, thread_local=False)
    try:
        with _refusing(path):
            _make_folder(folder)
            _acquire(lock)
    except Timeout as error:
        raise busy from error
    # The other process may have finished and removed the folder in between: this lock is of a file that is gone.
    if not (folder / _LOCK).exists():
        lock.release()
        raise busy
    try:
        yield
    finally:
        lock.release()


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents, whatever other processes that end meanwhile remove of them."""
    for num_left in reversed(range(_MKDIR_TRIES)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return
        except (FileNotFoundError, FileExistsError):
            # Also where a parent is a file, which no further try changes.
            if num_left == 0:
                raise


def _acquire(lock: FileLock) -> None:
    try:
        lock.acquire()
    except FileNotFoundError as error:
        # The folder was there a moment ago.
        raise Timeout(lock.lock_file) from error


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except Timeout:
        raise
    except OSError as error:
        not_folder = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a parent is not a folder" if not_folder else str(error.strerror or error).lower()
        raise OutputError(f"can't write {path}: {reason}; choose another output or make room") from error


def partial_folder(path: Path) -> Path:
    """Folder in which an output is made."""
    return sibling_path(path, "", ".partial")


def _read_settings(folder: Path) -> dict[str, Any] | None:
    """What the journal of a folder says, None where it has none."""
    settings = read_json_or_none(folder / _SETTINGS)
    return settings if isinstance(settings, dict) else None


def _write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    unfinished = folder / _UNFINISHED_SETTINGS
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(to_json(settings, indent=2))
        file.flush()
        os.fsync(file.fileno())
    put_in_place(unfinished, folder / _SETTINGS)


def _clear(folder: Path) -> None:
    """Remove all but lock and journal, without which the folder would be somebody else's after a crash."""
    for file in folder.iterdir():
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        elif file.name not in {_LOCK, _SETTINGS}:
            file.unlink()


def _remove(folder: Path) -> None:
    with suppress(OSError):
        # The settings are struck out first: without them the rest counts as nothing.
        if (folder / _SETTINGS).exists():
            _write_settings(folder, {})
    with suppress(OSError):
        _clear(folder)
        for name in (_SETTINGS, _LOCK):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


class LineLog:
    """A log in a folder, to which several processes may add.

    Args:
        folder: Existing folder.
        name: Beginning of the log's file names.
        is_kept: Whether entries outlive a crash of the machine.
    """

    def __init__(self, folder: Path, name: str, *, is_kept: bool = True) -> None:
        self.folder = folder
        self._name = name
        self._is_kept = is_kept
        # A file of its own: no other process writes it, and no entry follows a line that a crash cut.
        self._file = folder / f"{name}_{uuid.uuid4().hex}.jsonl"
        self._lock = Lock()

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add an entry of plain values; any thread may call it. One that is kept is on disk when this returns."""
        with self._lock, self._file.open("a", encoding="utf-8") as file:
            file.write(to_json(entry) + "\n")
            file.flush()
            if self._is_kept:
                os.fsync(file.fileno())

    def entries(self) -> Iterator[dict[str, Any]]:
        """The complete entries of all processes; those of one process are in their order."""
        for file in sorted(self.folder.glob(f"{self._name}_*.jsonl")):
            for line in file.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    # A crash cut it: what it stands for is computed again.
                    continue
                yield entry


@dataclass(frozen=True, slots=True)
class DamagedPiece:
    """Pixels that a window couldn't read: nodata in the map, but for those that a neighbouring window could.

    Attributes:
        window: where they lie in the source.
        reason: what the reader said.
    """

    window: Window
    reason: str


class DamageLog:
    """Damaged pieces in a folder; a resumed run knows those that earlier runs met.

    Args:
        folder: Existing folder.
    """

    def __init__(self, folder: Path) -> None:
        self._log = LineLog(folder, "damage")
        self._known: set[Window] = set()
        self._lock = Lock()

    def add(self, window: Window, reason: str) -> None:
        """Note a piece, on disk when this returns; from any thread."""
        with self._lock:
            if window in self._known:
                return
            self._known.add(window)
            self._log.add({"window": astuple(window), "reason": reason})

    def pieces(self) -> list[DamagedPiece]:
        """All pieces in the folder, each once, from top to bottom."""
        entries = ((Window(*entry["window"]), entry["reason"]) for entry in self._log.entries())
        found = {window: DamagedPiece(window, reason) for window, reason in entries}
        return sorted(found.values(), key=lambda piece: astuple(piece.window))


class SeamLog:
    """Counts of the strips in a folder: pixels under several windows, and those on which the windows disagree.

    A strip's count is noted before its pixels are written, so that whoever finds the pixels finds the count. A strip
    that is made again, after a crash in between, has the same count, and counts once.

    Args:
        folder: Existing folder.
        is_kept: Whether strips outlive a crash of the machine.
    """

    def __init__(self, folder: Path, *, is_kept: bool = True) -> None:
        self._log = LineLog(folder, "seams", is_kept=is_kept)

    def add(self, window: Window, count: SeamCount) -> None:
        """Note the count of a strip; from any thread."""
        with _refusing(self._log.folder):
            self._log.add({"rows": [window.row, window.height], "count": astuple(count)})

    def tags(self, height: int) -> dict[str, str]:
        """Tags of a map of a number of rows: none where no windows overlap, or counts of rows are missing."""
        found = {tuple(entry["rows"]): SeamCount(*entry["count"]) for entry in self._log.entries()}
        share = sum(found.values(), SeamCount()).share
        is_whole = sum(num_rows for _, num_rows in found) == height
        return {SEAM_TAG: f"{share:.6f}"} if is_whole and share is not None else {}
