"""What couldn't be read of an input, kept beside the rows so far."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import astuple, dataclass
from pathlib import Path
from threading import Lock

from perf_vit.text import to_json
from perf_vit.types import Window

__all__ = ["DamageLog", "DamagedPiece"]


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
    """Damaged pieces in a folder; a run that goes on with the rows in it knows of those met before.

    Args:
        folder: exists already.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # A name of its own: several processes may write, and none after a line that a crash cut.
        self._file = folder / f"damage_{uuid.uuid4().hex}.jsonl"
        self._known: set[Window] = set()
        self._lock = Lock()

    def add(self, window: Window, reason: str) -> None:
        """Note a piece, on disk when this returns; from any thread."""
        with self._lock:
            if window in self._known:
                return
            self._known.add(window)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(to_json({"window": astuple(window), "reason": reason}) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def pieces(self) -> list[DamagedPiece]:
        """All pieces in the folder, each once, from top to bottom."""
        found = {}
        for file in self._folder.glob("damage_*.jsonl"):
            for line in file.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    # A crash cut it before the piece counted: the rows that need it are read again.
                    continue
                window = Window(*entry["window"])
                found[window] = DamagedPiece(window, entry["reason"])
        return sorted(found.values(), key=lambda piece: astuple(piece.window))
