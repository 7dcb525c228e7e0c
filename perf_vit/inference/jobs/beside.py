"""Names of maps and of the files next to them: which are asked for and to be made, and what polygons were made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perf_vit.errors import OutputError
from perf_vit.inference.jobs.identity import OutputRecord
from perf_vit.inference.options import SegmentationPredictOptions
from perf_vit.reporting.outputs import is_map_report
from perf_vit.sources import GEOTIFF_SUFFIXES, fingerprint
from perf_vit.sources.files import is_own
from perf_vit.writers import category_names_path, existing_error, is_ome_tiff_name, is_own_style

__all__ = ["PolygonRecord", "attached_files", "check_map_name", "files_beside", "is_to_be_made"]

_STYLE = ".qml"


def check_map_name(out: Path) -> None:
    """Refuse a map whose name doesn't say that it is a GeoTIFF.

    Raises:
        OutputError: it doesn't end in .tif or .tiff.
    """
    if out.suffix.lower() not in GEOTIFF_SUFFIXES:
        raise OutputError(f"the map is a GeoTIFF: its name must end in .tif, got {out}; try {out.with_suffix('.tif')}")


def files_beside(out: Path, options: SegmentationPredictOptions) -> list[Path]:
    """The quicklook, the report, the polygons and the names of classes of a map, as far as they are asked for."""
    suffixes = [*([".png"] if options.quicklook else []), *([".html"] if options.report else [])]
    suffixes += [f".{options.polygons}"] if options.polygons else []
    found = [out.with_suffix(suffix) for suffix in suffixes]
    if options.style and options.kind == "classes" and not is_ome_tiff_name(out):
        found += [out.with_suffix(_STYLE), category_names_path(out)]
    return found


def attached_files(out: Path) -> list[Path]:
    """Files of an earlier map that GDAL and QGIS would take for those of a new one, asked for or not."""
    style = out.with_suffix(_STYLE)
    return [*([style] if is_own_style(style) else []), category_names_path(out)]


def is_to_be_made(path: Path, map_path: Path) -> bool:
    """Whether a file next to a map isn't there, or is of an earlier map: perf_vit made it, and it is older.

    Files of others stay.
    """
    if not path.exists():
        return True
    if path.stat().st_mtime_ns >= map_path.stat().st_mtime_ns:
        return False
    # The other suffix is that of GDAL's metadata, which describe the raster of their name.
    known = {".png": is_own, ".html": is_map_report, _STYLE: is_own_style}
    return path == category_names_path(map_path) or known.get(path.suffix, _is_others)(path)


def _is_others(path: Path) -> bool:
    """Polygons, which have a record."""
    return False


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
