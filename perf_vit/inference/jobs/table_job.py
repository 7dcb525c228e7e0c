"""A table with a row an input: what decides it, and its rows so far."""

from __future__ import annotations

import csv
import hashlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from perf_vit.errors import OutputError
from perf_vit.inference.jobs.identity import content_of, newer_than, stats_of
from perf_vit.inference.jobs.job import RecordedJob
from perf_vit.inference.jobs.journal import LineLog, partial_folder
from perf_vit.inference.options import PredictOptions
from perf_vit.sources import fingerprint
from perf_vit.text import to_json

__all__ = ["GrowingTable", "RowLog", "TableJob", "is_growing", "write_table"]

_GROWN = "table"

_GROWN_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class TableJob(RecordedJob):
    """A CSV file with a row for each of some inputs, and the files of single rows.

    Attributes:
        paths: Inputs, in the order of the rows.
        out: Path of the table, .csv.
        settings: Plain values that decide a row, with the model.
        options: Options of the prediction.
        device: Device that the model runs on.
        beside: Files of single rows.
        further_inputs: Other files that decide all rows, such as outlines of tissue.
    """

    paths: Sequence[str]
    out: Path
    settings: Mapping[str, Any]
    options: PredictOptions
    device: str = "cpu"
    beside: Sequence[Path] = field(default=())
    further_inputs: Sequence[str] = field(default=())
    _what = "this model's table of these inputs"

    def __post_init__(self) -> None:
        if self.out.suffix.lower() != ".csv":
            raise OutputError(f"a table is written as CSV: its name must end in .csv, got {self.out}")

    @property
    def input_files(self) -> Sequence[str]:
        """Paths of the inputs."""
        return [*self.paths, *self.further_inputs]

    @property
    def begun_with(self) -> Mapping[str, Any]:
        """Plain values that decide a row; the inputs may change, as each row knows its own."""
        further = content_of(self.further_inputs)
        return {**self.settings, "device": torch.device(self.device).type, "further_inputs": further}

    @property
    def identity(self) -> Mapping[str, Any]:
        """Plain values that decide the table."""
        inputs = hashlib.sha256(to_json([[path, self.content(path)] for path in self.paths]).encode()).hexdigest()
        return {**self.settings, "inputs": inputs, "further_inputs": content_of(self.further_inputs)}

    def found(self) -> list[Path]:
        """Outputs that exist, without the rows so far of an unfinished table."""
        return [path for path in super().found() if path != self.out or not is_growing(path)]

    def discard_begun(self) -> None:
        """Remove the rows so far of an unfinished table, before the log that knows them goes."""
        if is_growing(self.out):
            self.out.unlink()

    def changed_since(self, out: Path) -> bool:
        """Whether an input is newer than the table."""
        return newer_than(self.input_files, out)

    def content(self, path: str) -> str:
        """Hash of an input's files, which are looked at once."""
        if path not in self._contents:
            self._contents[path] = content_of([path])
        return self._contents[path]

    @cached_property
    def _contents(self) -> dict[str, str]:
        return {}


class RowLog:
    """Rows so far, on disk.

    Args:
        job: What they are of.
        folder: Existing folder.
    """

    def __init__(self, job: TableJob, folder: Path) -> None:
        self._job = job
        self._log = LineLog(folder, "items")
        entries = (entry for rows in self._log.entries() for entry in rows["rows"])
        wanted = frozenset(job.paths)
        self.rows: dict[str, list[str]] = {
            entry["input"]: entry["row"]
            for entry in entries
            # A row of what an input held before is no row of it.
            if entry["input"] in wanted and entry["content"] == self._content(entry["input"])
        }

    def add(self, rows: Mapping[str, list[str]]) -> None:
        """Note rows, on disk when this returns."""
        self.rows |= rows
        entries = [{"input": path, "content": self._content(path), "row": row} for path, row in rows.items()]
        self._log.add({"rows": entries})

    def _content(self, path: str) -> Any:
        return [self._job.content(path), *stats_of([path])]


class GrowingTable:
    """The rows so far under the table's own name, to look at while others are computed.

    It is written now and then, and left alone where another file, or an earlier table, has the name. A log in the
    folder knows what was written, so that the next call replaces it, and no other file.

    Args:
        path: Table.
        folder: Folder in which it is made.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self._path = path
        self._folder = folder
        self._log = LineLog(folder, _GROWN)
        self._next = 0.0

    def write(self, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Write all rows so far.

        Raises:
            OutputError: Nothing can be written there.
        """
        if os.path.lexists(self._path) and not is_growing(self._path):
            return
        start = time.monotonic()
        made = write_table(self._folder / f"{_GROWN}.tmp", header, rows)
        # First, as a crash may come between.
        self._log.add({"fingerprint": fingerprint([made])})
        try:
            os.replace(made, self._path)
        except OSError as error:
            raise OutputError(f"can't write {self._path}: {error.strerror}; choose another output") from error
        # Tables of many rows take a while.
        self._next = time.monotonic() + max(_GROWN_EVERY_S, 20 * (time.monotonic() - start))

    @property
    def is_due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() >= self._next


def is_growing(path: Path) -> bool:
    """Whether a file is a table of some rows that an unfinished call wrote, and nobody changed since."""
    folder = partial_folder(path)
    if path.is_symlink() or not path.is_file() or not folder.is_dir():
        return False
    known = {entry.get("fingerprint") for entry in LineLog(folder, _GROWN).entries()}
    return bool(known) and fingerprint([path]) in known


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    """Write a CSV file.

    Args:
        path: The file, in an existing folder.
        header: Names of the columns.
        rows: Their values.

    Raises:
        OutputError: Nothing can be written there.
    """
    try:
        with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)
    except OSError as error:
        raise OutputError(f"can't write {path}: {error.strerror}; choose another output") from error
    return path
