"""Identity of inputs and outputs: what a job was made from, and whether that changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from perf_vit._version import __version__
from perf_vit.files import read_json_or_none, sibling_path, write_json
from perf_vit.sources import file_stats, fingerprint
from perf_vit.text import to_json
from perf_vit.types import TISSUE_METHODS, Source
from perf_vit.writers import input_files

__all__ = ["OutputRecord", "SourceIdentity", "content_of", "newer_than", "stats_of"]

_DIGITS = 16

# Viewers write them beside a raster; what they say of its place is part of the source.
_SIDECARS = (".aux.xml", ".ovr")


class SourceIdentity:
    """Tells a source from one that gives other pixels, without reading all of it.

    Args:
        source: from `perf_vit.open`.

    Attributes:
        files: paths of the source, the members of virtual rasters, tile indexes and mosaics, and outlines of tissue.
        options: how it was opened.
        place: transform, CRS and size of a slide's pixels.
    """

    def __init__(self, source: Source) -> None:
        self.options = _options(source)
        named = list(getattr(source, "paths", (source.path,)))
        tissue = getattr(source, "options", {}).get("tissue")
        files = None if hasattr(source, "paths") else getattr(source, "files", None)
        opened = {} if files is None else {source.path: files}
        behind = _files_behind([*named, *([] if tissue is None else [str(tissue)])], opened)
        self.files = tuple(dict.fromkeys([*named, *behind]))
        nodata = None if source.nodata is None else str(float(source.nodata))
        self.place = [list(source.transform)[:6], source.crs and source.crs.to_wkt(), source.mpp, nodata]
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
        stats = [file_stats(path) for path in self.files]
        return {
            # A cluster's workers stand in other folders.
            "input": [os.path.abspath(path) if stat else path for path, stat in zip(self.files, stats, strict=True)],
            "input_bytes": [stat and stat[0] for stat in stats],
            "input_modified_ns": [stat and stat[1] for stat in stats],
            "input_options": self.options,
            "input_layout": self.layout,
            # The same file may be read on another grid.
            "input_place": self.place,
        }

    def changed_since(self, out: Path) -> bool:
        """Whether one of the files is newer than an output."""
        return _any_newer(self.files, out)


def content_of(paths: Iterable[str]) -> str:
    """A hash of the content of some inputs, with members of virtual rasters and the like; the same for copies."""
    return fingerprint(file for path in paths for file in _files_of(path))


def stats_of(paths: Iterable[str]) -> list[int]:
    """Bytes and times of change of some inputs that are files, with members of virtual rasters and the like."""
    stats = (file_stats(file) for path in paths for file in _files_of(path))
    return [number for stat in stats if stat is not None for number in stat]


def newer_than(paths: Iterable[str], out: Path) -> bool:
    """Whether an input was changed after an output was."""
    return _any_newer((file for path in paths for file in _files_of(path)), out)


def _any_newer(files: Iterable[str], out: Path) -> bool:
    made = out.stat().st_mtime_ns
    return any(stat[1] > made for stat in map(file_stats, files) if stat is not None)


def _files_of(path: str) -> list[str]:
    return list(dict.fromkeys([path, *_files_behind([path])]))


def _files_behind(paths: Iterable[str], opened: Mapping[str, Sequence[str]] = MappingProxyType({})) -> list[str]:
    behind = map(str, _outermost(file for _, file in input_files(paths, opened)))
    return [file for file in behind if not file.endswith(_SIDECARS)]


def _options(source: Source) -> dict[str, Any]:
    """How a source was opened, as plain values; outlines of tissue are a file, which counts by its content."""
    options: dict[str, Any] = json.loads(json.dumps(dict(getattr(source, "options", {})), default=str), parse_int=float)
    return {
        name: "file" if name == "tissue" and value not in TISSUE_METHODS else value for name, value in options.items()
    }


def _outermost(files: Iterable[Path]) -> Iterator[Path]:
    """Files and folders, without those inside a folder before them: a chunked array is one thing, not a million."""
    folders: set[Path] = set()
    for file in files:
        if folders.isdisjoint(file.parents):
            yield file
            if file.is_dir():
                folders.add(file)


_KEYS = frozenset({"perf_vit_version", "identity", "num_damaged", "outputs"})


class OutputRecord:
    """The file `.NAME.perf_vit.json` next to an output.

    Args:
        out: Main output; names of further ones are relative to its folder.
    """

    def __init__(self, out: Path) -> None:
        self._folder = out.parent
        self.path = sibling_path(out, ".", ".perf_vit.json")

    def read(self) -> dict[str, Any] | None:
        """Its content, None where there is none."""
        content = read_json_or_none(self.path)
        return content if isinstance(content, dict) and content.keys() >= _KEYS else None

    def is_foreign(self) -> bool:
        """Whether another file has its name."""
        return os.path.lexists(self.path) and (self.path.is_symlink() or self.read() is None)

    def write(self, identity: Mapping[str, Any], files: Mapping[Path, Path], num_damaged: int) -> None:
        """Write it, all or nothing.

        Args:
            identity: Plain values that decide the outputs.
            files: Output to the file that holds its content now.
            num_damaged: Parts of the inputs that were skipped.

        Raises:
            OutputError: Nothing can be written there.
        """
        outputs = dict(sorted((self._name(out), fingerprint([file])) for out, file in files.items()))
        content = {"perf_vit_version": __version__, "identity": dict(identity), "num_damaged": num_damaged}
        write_json(self.path, {**content, "outputs": outputs})

    def is_complete(self, found: Iterable[Path], content: Mapping[str, Any]) -> bool:
        """Whether all recorded outputs are among some files."""
        return {self._name(path) for path in found} >= content["outputs"].keys()

    def holds(self, path: Path, content: Mapping[str, Any]) -> bool:
        """Whether a file that exists is the one that was recorded."""
        recorded = content["outputs"].get(self._name(path))
        return path.is_file() and not path.is_symlink() and recorded == fingerprint([path])

    @staticmethod
    def plain(identity: Mapping[str, Any]) -> Any:
        """An identity as it is read from a file."""
        return json.loads(to_json(identity))

    def _name(self, path: Path) -> str:
        return Path(os.path.relpath(path, self._folder)).as_posix()
