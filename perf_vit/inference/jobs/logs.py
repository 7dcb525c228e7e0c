"""Logs of a job in progress: one line per damaged piece or finished window."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from perf_vit.geometry import Objects
from perf_vit.geometry.objects import ObjectKind
from perf_vit.text import to_json
from perf_vit.types import Window

__all__ = ["DamageLog", "DamagedPiece", "LineLog", "WindowLog"]


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


class WindowLog:
    """Objects of windows in a folder, batch by batch: a batch is there whole or not at all.

    Args:
        folder: Existing folder.
    """

    def __init__(self, folder: Path) -> None:
        self._log = LineLog(folder, "windows")

    def add(self, empty: Iterable[Window], found: Iterable[tuple[Window, Objects]]) -> None:
        """Note the windows of a batch.

        Args:
            empty: Windows without a valid pixel.
            found: Other windows, with their objects in pixels of the scene.
        """
        entries = [{"window": astuple(window)} for window in empty]
        entries += [{"window": astuple(window), **_plain(objects)} for window, objects in found]
        self._log.add({"windows": entries})

    def windows(self) -> dict[Window, Objects | None]:
        """All windows in the folder, with their objects; None without a valid pixel."""
        entries = (entry for batch in self._log.entries() for entry in batch["windows"])
        return {Window(*entry["window"]): _objects(entry) for entry in entries}


def _plain(objects: Objects) -> dict[str, Any]:
    # JSON keeps every float64, and so every float32, to the last bit.
    geometry = shapely.to_wkb(objects.geometry, hex=True) if objects.kind == "polygons" else objects.geometry
    return {
        "kind": objects.kind,
        "geometry": geometry.tolist(),
        "scores": objects.scores.tolist(),
        "labels": objects.labels.tolist(),
    }


def _objects(entry: dict[str, Any]) -> Objects | None:
    if "kind" not in entry:
        return None
    kind: ObjectKind = entry["kind"]
    scores, labels = np.array(entry["scores"], np.float32), np.array(entry["labels"], np.int32)
    return Objects(kind, _geometry(kind, entry["geometry"]), scores, labels)


def _geometry(kind: ObjectKind, values: Sequence[Any]) -> npt.NDArray[Any]:
    if kind == "polygons":
        return np.asarray(shapely.from_wkb(np.array(values, object)), object)
    return np.array(values, np.float64).reshape(-1, 4 if kind == "boxes" else 5)
