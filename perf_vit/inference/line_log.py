"""Entries that a crash doesn't cost: lines of JSON in a folder."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from perf_vit.text import to_json

__all__ = ["LineLog"]


class LineLog:
    """A log in a folder, to which several processes may add.

    Args:
        folder: Existing folder.
        name: Beginning of the log's file names.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self._name = name
        # A file of its own: no other process writes it, and no entry follows a line that a crash cut.
        self._file = folder / f"{name}_{uuid.uuid4().hex}.jsonl"
        self._lock = Lock()

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add an entry of plain values, which is on disk when this returns; any thread may call it."""
        with self._lock, self._file.open("a", encoding="utf-8") as file:
            file.write(to_json(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def entries(self) -> Iterator[dict[str, Any]]:
        """The complete entries of all processes; those of one process are in their order."""
        for file in sorted(self.folder.glob(f"{self._name}_*.jsonl")):
            for line in file.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    # A crash cut it: what it stands for is computed again.
                    continue
                yield entry
