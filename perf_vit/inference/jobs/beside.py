"""Files next to a map: which are of an earlier map, and what polygons were made of."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from perf_vit.errors import DataWarning, OutputError
from perf_vit.inference.jobs.identity import OutputRecord
from perf_vit.inference.jobs.journal import Journal
from perf_vit.reporting.outputs import is_map_report
from perf_vit.sources import fingerprint
from perf_vit.sources.files import is_own
from perf_vit.writers import category_names_path, existing_error, is_own_style

__all__ = [
    "PolygonRecord",
    "attached_files",
    "discard_style",
    "has_style",
    "is_to_be_made",
    "stray_style",
    "warn_of_style",
]

_LAYERS = (".tif", ".gpkg", ".geojson", ".parquet")
"""Files to which QGIS applies the style of their name."""


def attached_files(out: Path) -> list[Path]:
    """Files of an earlier map that GDAL and QGIS would take for those of a new one, asked for or not."""
    return [category_names_path(out), *_attached_style(out)]


def _attached_style(out: Path) -> list[Path]:
    """The style that perf_vit made of an earlier output, and QGIS would apply to a new one; empty without one."""
    style = out.with_suffix(".qml")
    return [style] if is_own_style(style) else []


def stray_style(out: Path) -> list[Path]:
    """The style that perf_vit made of an output that is gone, if QGIS would apply it to this one; else nothing.

    A layer of the same name that is there, such as a map beside a new table, may be what the style is of.
    """
    others = [out.with_suffix(suffix) for suffix in _LAYERS if suffix != out.suffix]
    if out.suffix not in _LAYERS or any(other.exists() for other in others):
        return []
    return _attached_style(out)


def has_style(out: Path, record: OutputRecord) -> bool:
    """Whether the style there is the one that is recorded of the outputs before."""
    style, before = out.with_suffix(".qml"), record.read()
    return before is not None and style.exists() and record.holds(style, before)


def discard_style(journal: Journal, record: OutputRecord, made: Collection[Path], *, overwrite: bool) -> None:
    """Remove the style of the outputs before, if new ones have none: QGIS finds it by its name."""
    out = journal.path
    is_ours = has_style(out, record) or (overwrite and record.read() is None and bool(stray_style(out)))
    if out.with_suffix(".qml") not in made and is_ours:
        journal.discard(out.with_suffix(".qml"))
    if out.suffix in _LAYERS:
        warn_of_style(out, made)


def warn_of_style(out: Path, written: Collection[Path]) -> None:
    """Warn of a style of somebody else's, which stays and which QGIS applies to a new output.

    Args:
        out: The output.
        written: Files that are made with it, of which the style may be one.
    """
    style = out.with_suffix(".qml")
    if style.exists() and style not in written:
        warnings.warn(f"{style} is not of {out.name} and stays; QGIS applies it", DataWarning, stacklevel=2)


def is_to_be_made(path: Path, map_path: Path) -> bool:
    """Whether a file next to a map isn't there, or is a picture or report of an earlier map.

    Such a file is older than the map, and perf_vit made it; files of others stay. So do styles and names of classes,
    to which QGIS and GDAL add their own: those of an earlier map go when it is replaced.
    """
    if not path.exists():
        return True
    if path.stat().st_mtime_ns >= map_path.stat().st_mtime_ns:
        return False
    known = {".png": is_own, ".html": is_map_report}
    return path.suffix in known and known[path.suffix](path)


class PolygonRecord:
    """What the polygons next to a map were made of and how they were tidied: a record of their own.

    They may change while the map stays, and stay while the map changes.

    Args:
        path: File of the polygons.
        tidying: Plain values that decide them, with the map.
        map_path: The map.

    Attributes:
        path: Path of the record.
    """

    def __init__(self, path: Path, tidying: Mapping[str, float], map_path: Path) -> None:
        self._polygons = path
        self._tidying = dict(tidying)
        self._map = map_path
        self._record = OutputRecord(path)
        self.path = self._record.path

    def check(self) -> None:
        """Refuse to replace another file with the record.

        Raises:
            OutputError: There is one.
        """
        if self._record.is_foreign():
            raise existing_error(self.path, ", but was not made by perf_vit")

    def is_done(self) -> bool:
        """Whether the polygons of the map are there as they are asked for.

        Raises:
            OutputError: They are of another map or tidied otherwise, and were changed since they were made.
        """
        if not self._polygons.exists():
            return False
        content = self._record.read()
        if content is not None and content["identity"] == self.identity:
            return True
        if content is None or not self._record.holds(self._polygons, content):
            reason = ", but of another map, tidied otherwise, or changed since it was made"
            raise existing_error(self._polygons, reason)
        return False

    def put(self, journal: Journal, made: Path) -> None:
        """Put finished polygons under their name, after the record: neither is there without the other for long.

        Args:
            journal: Journal of the polygons.
            made: The finished file.

        Raises:
            OutputError: Nothing can be written there.
        """
        before = made.with_name(f"before{made.suffix}")
        if self._polygons.exists():
            journal.move(self._polygons, before)
        # A process that ends here leaves no polygons, which the next one makes again.
        try:
            self._record.write(self.identity, {self._polygons: made}, 0)
        except OutputError:
            if before.exists():
                journal.move(before, self._polygons)
            raise
        journal.move(made, self._polygons)

    @property
    def identity(self) -> dict[str, Any]:
        """Plain values that decide what the polygons are."""
        return {**self._tidying, "map": fingerprint([self._map])}
