"""What decides the pixels that a source gives: its files, how they are read, and where they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from perf_vit.io import fingerprint, input_files
from perf_vit.types import Source

__all__ = ["SourceIdentity"]

_DIGITS = 16
# Viewers write them beside a raster; what they say of its place is part of the source.
_SIDECARS = (".aux.xml", ".ovr")


class SourceIdentity:
    """Tells a source from one that gives other pixels, without reading all of it.

    Args:
        source: from `perf_vit.open_source`.

    Attributes:
        files: paths of the source, the members of virtual rasters, tile indexes and mosaics, and outlines of tissue.
        options: how it was opened.
        place: transform, CRS and size of a slide's pixels.
    """

    def __init__(self, source: Source) -> None:
        self.options: dict[str, Any] = json.loads(json.dumps(_options(source), default=str))
        named = [*getattr(source, "paths", (source.path,)), str(self.options.get("tissue", ""))]
        behind = [str(file) for _, file in input_files(named) if not str(file).endswith(_SIDECARS)]
        self.files = tuple(dict.fromkeys([*named[:-1], *behind]))
        self.place = [list(source.transform)[:6], source.crs and source.crs.to_wkt(), source.mpp, str(source.nodata)]
        self.layout = [source.num_bands, source.height, source.width, str(source.dtype)]

    @cached_property
    def tags(self) -> dict[str, str]:
        """Hashes of the files' content and of all else, for the tags of an output; the same for a copy."""
        reading = json.dumps([self.options, self.place, self.layout], sort_keys=True)
        return {
            "PERF_VIT_INPUT": fingerprint(self.files),
            "PERF_VIT_READING": hashlib.sha256(reading.encode()).hexdigest()[:_DIGITS],
        }

    @property
    def settings(self) -> Mapping[str, Any]:
        """Plain values for the journal of an unfinished output, with the files' times of change."""
        files = [Path(path) for path in self.files]
        stats = [file.stat() if file.exists() else None for file in files]
        return {
            # A cluster's workers stand in other folders.
            "input": [str(file.absolute()) if stat else str(file) for file, stat in zip(files, stats, strict=True)],
            "input_bytes": [stat and stat.st_size for stat in stats],
            "input_modified_ns": [stat and stat.st_mtime_ns for stat in stats],
            "input_options": self.options,
            "input_layout": self.layout,
            # The same file may be read on another grid.
            "input_place": self.place,
        }

    def changed_since(self, out: Path) -> bool:
        """Whether one of the files is newer than an output."""
        made = out.stat().st_mtime_ns
        return any(Path(path).exists() and Path(path).stat().st_mtime_ns > made for path in self.files)


def _options(source: Source) -> dict[str, Any]:
    return dict(getattr(source, "options", {}))
