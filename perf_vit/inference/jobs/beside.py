"""Files next to a map: which are of an earlier map, and what polygons were made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perf_vit.inference.jobs.identity import OutputRecord
from perf_vit.reporting.outputs import is_map_report
from perf_vit.sources import fingerprint
from perf_vit.sources.files import is_own
from perf_vit.writers import category_names_path, existing_error, is_own_style

__all__ = ["PolygonRecord", "attached_files", "is_to_be_made"]


def attached_files(out: Path) -> list[Path]:
    """Files of an earlier map that GDAL and QGIS would take for those of a new one, asked for or not."""
    style = out.with_suffix(".qml")
    return [*([style] if is_own_style(style) else []), category_names_path(out)]


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
        if content is not None and content["identity"] == self._identity:
            return True
        if content is None or not self._record.holds(self._polygons, content):
            reason = ", but of another map, tidied otherwise, or changed since it was made"
            raise existing_error(self._polygons, reason)
        return False

    def keep(self) -> None:
        """Note what the polygons were made of, once they are written."""
        self._record.write(self._identity, {self._polygons: self._polygons}, 0)

    @property
    def _identity(self) -> dict[str, Any]:
        return {**self._tidying, "map": fingerprint([self._map])}
