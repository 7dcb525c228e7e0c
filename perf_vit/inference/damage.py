"""What couldn't be read of an input, kept beside the rows so far."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path
from threading import Lock

from perf_vit.inference.line_log import LineLog
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
