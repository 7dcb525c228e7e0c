"""What polygons next to a map were made with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from perf_vit.inference.jobs.identity import OutputRecord
from perf_vit.writers import existing_error

__all__ = ["PolygonRecord"]


class PolygonRecord:
    """How the polygons next to a map were tidied: a record of its own, as they may change while the map stays.

    Args:
        path: File of the polygons.
        tidying: Plain values that decide them, with the map.

    Attributes:
        path: Path of the record.
    """

    def __init__(self, path: Path, tidying: Mapping[str, float]) -> None:
        self._polygons = path
        self._tidying = dict(tidying)
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
        """Whether the polygons are there as they are asked for.

        Raises:
            OutputError: They are tidied otherwise, and were changed since they were made.
        """
        if not self._polygons.exists():
            return False
        content = self._record.read()
        # Without a record, they are of a version that tidied none.
        if (content["identity"] if content else dict.fromkeys(self._tidying, 0.0)) == self._tidying:
            return True
        if content is None or not self._record.holds(self._polygons, content):
            raise existing_error(self._polygons, ", but tidied otherwise, or changed since it was made")
        return False

    def keep(self) -> None:
        """Note how the polygons were tidied, once they are written."""
        self._record.write(self._tidying, {self._polygons: self._polygons}, 0)
