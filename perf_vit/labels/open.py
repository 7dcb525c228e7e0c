"""Labels of a source, read by window as class indices."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from perf_vit.errors import InputError
from perf_vit.labels.classes import LabelClasses
from perf_vit.labels.raster import RasterLabels, RasterLayers, VectorLayers, open_all_bands
from perf_vit.labels.vector import VectorLabels, warn_of_polygons
from perf_vit.sources import MASK_SUFFIXES, RasterSource, is_vector_name, open_raster, split_layer
from perf_vit.sources._gdal import check_exists
from perf_vit.sources.files import RASTER_SUFFIXES
from perf_vit.sources.image_search import is_glob
from perf_vit.sources.slides import SlideSource
from perf_vit.sources.vector_file import opens_as_vector
from perf_vit.types import InputPath, LabelArray, Window

__all__ = ["LabelSource", "is_labelled_folder", "open_labels", "warn_of_polygons_outside"]


class LabelSource(Protocol):
    """Labels on a source's pixel grid; can be pickled, forked and shared between threads."""

    def read(self, window: Window) -> LabelArray:
        """Read a window of the source.

        Args:
            window: Window of the source; it may exceed it.

        Returns:
            Class indices, [height, width], or layers of 0 and 1 per class, [K, height, width]; `IGNORE_INDEX` for
            pixels without label and outside of the source.

        Raises:
            InputError: The file is damaged there, or has a value that isn't a class.
        """

    def close(self) -> None:
        """Close this thread's file handles; the next read opens them again."""


def is_labelled_folder(images: InputPath, labels: str | Path) -> bool:
    """Return whether labels are a folder and images a folder, glob or list, so each image has its own label file."""
    if not Path(labels).is_dir():
        return False
    return not isinstance(images, str | Path) or Path(images).is_dir() or is_glob(images)


def open_labels(
    path: str | Path,
    source: RasterSource | SlideSource,
    *,
    attribute: str | None = None,
    classes: Sequence[str] | None = None,
    values: Sequence[float] | None = None,
    ignore_values: Sequence[float | str | None] = (),
    skip_classes: Sequence[float | str | None] = (),
    background: int | str | None = 0,
    all_touched: bool = False,
    multilabel: bool = False,
    paired: bool = False,
    spot_check: bool = True,
) -> LabelSource:
    """Open the labels of a raster (mask raster or polygons, in any CRS and on any grid) or of a slide (polygons).

    Args:
        path: Raster of label values, or polygons (GeoJSON, GeoPackage, shapefile, GeoParquet, ...), with several layers
            as `FILE|layername=LAYER`. Polygons on a slide are in QuPath's coordinates, or in those that the file names.
        source: Raster or slide that the labels belong to.
        attribute: Column with class names or values of polygons ("classification" in QuPath's files); None if polygons
            are the one of two classes that isn't the background.
        classes: Class names; labels are indices into them. Without names and values, label values up to 254 are
            indices.
        values: Label value of each class; None for 0, 1, 2, ...
        ignore_values: Label values that mark unlabelled pixels, in addition to a mask's nodata; for polygons also text,
            and None for features without a value. QuPath's class `Ignore*` is one of them.
        skip_classes: Values of polygons that are left out, as if they were not there; None for those without a value.
        background: Class of the pixels outside of polygons, by name or index; "ignore" leaves them unlabelled; "none",
            with `multilabel`, gives them no class. Polygons are rejected if it is None.
        all_touched: Whether polygons label all pixels that they touch, instead of those whose centre they contain.
        multilabel: Whether a pixel may have several classes: layers from overlapping polygons, or from the bands of a
            raster of 0 and 1 on the source's grid.
        paired: Whether the labels belong to this image only: a mask without CRS then lies on its pixels, and if the
            image has no CRS either, polygons are in its pixels.
        spot_check: Whether to read some windows of a mask at once, to find values that aren't classes.

    Raises:
        InputError: The file can't be read, can't be placed on the source, or has values that aren't classes.
    """
    name = os.fspath(path)
    check_exists(split_layer(name)[0])
    mapping = LabelClasses.make(classes, values, ignore_values, skip_classes)

    def from_vector() -> LabelSource:
        burn = VectorLayers if multilabel else VectorLabels
        index = _background_index(background, mapping, name, multilabel=multilabel)
        return burn(name, source, mapping, attribute, index, all_touched=all_touched, paired=paired)

    if is_vector_name(name):
        return from_vector()
    if Path(name).suffix.lower() in RASTER_SUFFIXES - MASK_SUFFIXES:
        raise InputError(f"{name} is a JPEG, which changes the values of a mask; write masks as PNG or TIFF")
    if isinstance(source, SlideSource) and source.downsample_xy != (1, 1):
        raise InputError(
            f"labels of the slide {source.path} must be polygons, such as QuPath's GeoJSON, as it isn't read at its "
            f"level 0; got {name}"
        )
    try:
        mask = open_all_bands(name) if multilabel else open_raster(name)
    except InputError:
        # Reading XML of other viewers says what is read.
        if not opens_as_vector(name) and not name.lower().endswith(".xml"):
            raise
        return from_vector()
    options = {"paired": paired, "spot_check": spot_check}
    labelled, row, col = _labelled(mask, source)
    labels: LabelSource = (
        RasterLayers(mask, labelled, len(mapping.values), mapping, **options)
        if multilabel
        else RasterLabels(mask, labelled, mapping, **options)
    )
    return _MovedLabels(labels, row, col) if (row, col) != (0, 0) else labels


class _MovedLabels:
    """Labels of a source of which another one is a part.

    Args:
        labels: Labels of the whole.
        row: Row of the whole where the part begins.
        col: Column of the whole where the part begins.
    """

    def __init__(self, labels: LabelSource, row: int, col: int) -> None:
        self._labels = labels
        self._row, self._col = row, col

    def read(self, window: Window) -> LabelArray:
        """Read a window of the part, see `LabelSource.read`."""
        return self._labels.read(Window(window.row + self._row, window.col + self._col, window.height, window.width))

    def close(self) -> None:
        """Close this thread's file handles; the next read opens them again."""
        self._labels.close()


def _labelled(mask: RasterSource, source: RasterSource | SlideSource) -> tuple[Any, int, int]:
    """Return the source that a mask labels by its size, and where the given one begins in it.

    A slide at level 0 is labelled as a whole, or inside its bounds, as QuPath exports masks.
    """
    if not isinstance(source, SlideSource):
        return source, 0, 0
    inside = source.within_bounds()
    labelled = inside if mask.size == inside.size else source.whole
    begin, own = labelled.frame.to_level0, source.frame.to_level0
    return labelled, round(own.f - begin.f), round(own.c - begin.c)


def warn_of_polygons_outside(labels: Iterable[LabelSource]) -> None:
    """Warn about polygons outside of all the sources that their file labels, once per file."""
    of_files: dict[str, list[VectorLabels]] = {}
    for each in labels:
        if isinstance(each, VectorLabels):
            of_files.setdefault(each.path, []).append(each)
    for path, of_file in of_files.items():
        beside = ~np.any([each.is_on_source for each in of_file], axis=0)
        warn_of_polygons("lie outside of the images", beside, of_file[0].numbers, path)


def _background_index(
    background: int | str | None, classes: LabelClasses, path: str, *, multilabel: bool
) -> int | None:
    """Return the class index outside of polygons, None for unlabelled; with `multilabel`, 0 stands for no class.

    Raises:
        InputError: The class is unknown, or none is given.
    """
    names = ["none"] if multilabel else list(classes.names or ())
    if isinstance(background, str) and background in names:
        return names.index(background)
    if background == "ignore":
        return None
    if isinstance(background, int) and 0 <= background < len(classes.values):
        return background
    what = (
        f"{path} holds polygons: background must be set for the pixels outside of them"
        if background is None
        else "background must be a class"
    )
    known = ", ".join([*names, "ignore"]) if names else f"an index below {len(classes.values)}, ignore"
    raise InputError(f"{what}, one of {known}, got {'nothing' if background is None else background}")
