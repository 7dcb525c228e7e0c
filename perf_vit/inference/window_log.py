"""Objects of finished windows on disk, so that a search goes on after a crash."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from perf_vit.inference.detections import ObjectKind, Objects
from perf_vit.inference.line_log import LineLog
from perf_vit.types import Window

__all__ = ["WindowLog"]


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
