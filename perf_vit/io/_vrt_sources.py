"""Files of a VRT that gave no pixels, where GDAL gives zeros and reports nothing.

As long as a process has any VRT open, GDAL remembers the files of VRTs that it couldn't open. It reports the first
failure only: later reads, also of a VRT opened anew, give zeros as if they were data, where a checksum still fails.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary
from xml.etree import ElementTree

import rasterio
import rasterio.windows
import shapely
from rasterio.errors import NotGeoreferencedWarning, RasterioIOError

from perf_vit.types import Window

__all__ = ["MASK", "check_sources"]

MASK = 0


@dataclass(frozen=True)
class _Sources:
    """The files of each band of a VRT, and where each lies in its pixels."""

    bands: list[int]
    files: list[str]
    tree: shapely.STRtree


_known: WeakKeyDictionary[Any, _Sources] = WeakKeyDictionary()


def check_sources(dataset: Any, window: Window, bands: Iterable[int], *, reduced: bool) -> None:
    """Refuse a window for which a file of a VRT gave no pixels.

    Args:
        dataset: open, of any format; of those other than VRT nothing is checked.
        window: what was read.
        bands: which were read, `MASK` among them if masks were.
        reduced: whether it was read at lower resolution, where GDAL doesn't report any failure.

    Raises:
        RasterioIOError: a file can't be read.
    """
    if dataset.driver != "VRT" or (reduced and dataset.overviews(1)):
        return
    if dataset not in _known:
        _known[dataset] = _sources_of(dataset)
    sources, checked, wanted = _known[dataset], set(), set(bands)
    area = shapely.box(window.col, window.row, window.col_stop, window.row_stop)
    for number in sorted(sources.tree.query(area).tolist()):
        file, band = sources.files[number], sources.bands[number]
        part = sources.tree.geometries[number].intersection(area)
        whole = _has_files(file) and not reduced
        # A file that can't be opened gives no pixel at all; a VRT in a VRT may give some.
        if part.area > 0 and band in wanted and (whole or file not in checked):
            checked.add(file)
            if band == MASK:
                _open_mask(file)
            else:
                _sum(dataset, band, file, part.bounds, window, whole=whole)


def _open_mask(file: str) -> None:
    """What stands for a checksum, which rasterio doesn't give of masks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        rasterio.open(file).close()


def _sum(dataset: Any, band: int, file: str, bounds: tuple[float, ...], window: Window, *, whole: bool) -> None:
    left, top, right, bottom = bounds
    if not whole:
        left, top = (left + right) / 2, (top + bottom) / 2
    col, row = min(int(left), window.col_stop - 1), min(int(top), window.row_stop - 1)
    width, height = (max(1, int(right) - col), max(1, int(bottom) - row)) if whole else (1, 1)
    try:
        dataset.checksum(band, rasterio.windows.Window(col, row, width, height))
    except RasterioIOError as error:
        raise RasterioIOError(f"its file {file} can't be read") from error.__cause__


def _sources_of(dataset: Any) -> _Sources:
    """Those of a VRT's bands; none of one that warps, of which GDAL reports each failure."""
    root = ElementTree.fromstring(dataset.tags(ns="xml:VRT")["xml:VRT"])
    found = list(itertools.chain.from_iterable(map(_sources_in, root.findall("VRTRasterBand"))))
    for band in root.findall(".//MaskBand/VRTRasterBand"):
        for source in band.findall("*/SourceFilename[@relativeToVRT='1']"):
            source.text = os.path.join(os.path.dirname(dataset.name), source.text or "")
        found.extend((MASK, file, rect) for _, file, rect in _sources_in(band))
    boxes = [_box(rect, dataset) for _, _, rect in found]
    return _Sources([band for band, _, _ in found], [file for _, file, _ in found], shapely.STRtree(boxes))


def _sources_in(band: ElementTree.Element) -> Iterator[tuple[int, str, ElementTree.Element | None]]:
    """(band, file, where it lies) of each file of a band."""
    for source in band:
        file = source.findtext("SourceFilename")
        if file is not None:
            yield int(band.get("band", "1")), file, source.find("DstRect")


def _box(rect: ElementTree.Element | None, dataset: Any) -> Any:
    """A rectangle of a VRT's pixels; all of them without one."""
    if rect is None:
        return shapely.box(0, 0, dataset.width, dataset.height)
    left, top, width, height = (float(rect.get(name, "0")) for name in ("xOff", "yOff", "xSize", "ySize"))
    return shapely.box(left, top, left + width, top + height)


def _has_files(file: str) -> bool:
    return file.lower().endswith(".vrt") or file.startswith(("<VRT", "vrt://"))
