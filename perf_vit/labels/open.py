"""Labels of a source, read window by window as class indices, from a mask raster or a vector file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from perf_vit.errors import InputError
from perf_vit.labels.classes import LabelClasses
from perf_vit.labels.raster import RasterLabels, RasterLayers, VectorLayers, open_all_bands
from perf_vit.labels.vector import VectorLabels
from perf_vit.sources import RasterSource, is_vector_name, open_raster, split_layer
from perf_vit.sources._gdal import check_exists
from perf_vit.sources.slides import SlideSource
from perf_vit.sources.vector_file import opens_as_vector
from perf_vit.types import LabelArray, Window

__all__ = ["LabelSource", "open_labels"]


class LabelSource(Protocol):
    """Labels on a source's pixel grid; may be pickled, forked and shared between threads."""

    def read(self, window: Window) -> LabelArray:
        """Class indices of a window of the source, [height, width]; or one layer a class, [K, height, width].

        Layers are 1 where a class is true, 0 where not. `IGNORE_INDEX` past the source's edge and wherever there is no
        label.

        Raises:
            InputError: the file is damaged there, or holds a value that is no class.
        """

    def close(self) -> None:
        """Close this thread's file handles; a later read opens them again."""


def open_labels(
    path: str | Path,
    source: RasterSource | SlideSource,
    *,
    attribute: str | None = None,
    classes: Sequence[str] | None = None,
    values: Sequence[float] | None = None,
    ignore_values: Sequence[float | str | None] = (),
    background: int | str | None = 0,
    all_touched: bool = False,
    multilabel: bool = False,
    paired: bool = False,
    spot_check: bool = True,
) -> LabelSource:
    """Open the labels of a raster: a mask raster or polygons, in any CRS and on any grid; or polygons on a slide.

    Args:
        path: a raster of label values, or a file of polygons (GeoJSON, GeoPackage, shapefile, GeoParquet, ...), of
            several layers as `FILE|layername=LAYER`. Polygons on a slide are in pixels of its level 0, as QuPath
            exports them.
        source: the raster or slide that they describe.
        attribute: column of class names or values of the polygons, "classification" in QuPath's files; without it
            polygons are the one of two classes that is not background.
        classes: class names; a label is an index into them. Without names and values, label values up to 254 are
            indices themselves.
        values: the label file's value of each class; 0, 1, 2, ... by default.
        ignore_values: label values that mean "no label", beside a mask's own nodata; of polygons also text, and None
            for features without a value.
        background: class of the pixels under no polygon, by name or index; "ignore" where they carry no label, as
            polygons are only samples; "none" with `multilabel` where no class is true there. None says nothing, and
            polygons are refused.
        all_touched: polygons burn every pixel that they touch, not only those whose centre they hold.
        multilabel: several classes may be true at a pixel: layers from overlapping polygons, or from the bands of a
            raster of 0 and 1 on the source's grid.
        paired: the labels are those of this image alone: a mask without CRS lies on its pixels, and where the image has
            none, coordinates of polygons are its pixels.
        spot_check: read some windows of a mask at once, so that values that are no class come to light.

    Raises:
        InputError: the file can't be read, has no place on the source, or holds what is no class.
    """
    name = os.fspath(path)
    check_exists(split_layer(name)[0])
    mapping = LabelClasses.make(classes, values, ignore_values)

    def from_vector() -> LabelSource:
        burn = VectorLayers if multilabel else VectorLabels
        index = _background_index(background, mapping, name, multilabel=multilabel)
        return burn(name, source, mapping, attribute, index, all_touched=all_touched, paired=paired)

    if is_vector_name(name):
        return from_vector()
    if isinstance(source, SlideSource) and source.downsample_xy != (1, 1):
        raise InputError(
            f"labels of the slide {source.path} must be polygons, such as QuPath's GeoJSON, as it isn't read at its "
            f"level 0; got {name}"
        )
    try:
        mask = open_all_bands(name) if multilabel else open_raster(name)
    except InputError:
        if not opens_as_vector(name):
            raise
        return from_vector()
    options = {"paired": paired, "spot_check": spot_check}
    if multilabel:
        return RasterLayers(mask, source, len(mapping.values), mapping, **options)
    return RasterLabels(mask, source, mapping, **options)


def _background_index(
    background: int | str | None, classes: LabelClasses, path: str, *, multilabel: bool
) -> int | None:
    """Class index under no polygon, None for no label; with `multilabel`, 0 stands for no class.

    Raises:
        InputError: no such class, or nothing was said.
    """
    names = ["none"] if multilabel else list(classes.names or ())
    if isinstance(background, str) and background in names:
        return names.index(background)
    if background == "ignore":
        return None
    if isinstance(background, int) and 0 <= background < len(classes.values):
        return background
    what = (
        f"{path} holds polygons: background must say what pixels under no polygon are"
        if background is None
        else "background must be a class"
    )
    known = ", ".join([*names, "ignore"]) if names else f"an index below {len(classes.values)}, ignore"
    raise InputError(f"{what}, one of {known}, got {'nothing' if background is None else background}")
