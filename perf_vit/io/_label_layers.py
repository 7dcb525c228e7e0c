"""Labels of which several may be true at a pixel: one layer a class, from overlapping polygons or a raster's bands."""

from __future__ import annotations

import numpy as np

from perf_vit.errors import InputError
from perf_vit.io._gdal import open_dataset
from perf_vit.io._label_classes import LabelClasses
from perf_vit.io._label_raster import same_grid, spots
from perf_vit.io._label_vector import VectorLabels
from perf_vit.io.raster import RasterSource
from perf_vit.types import IGNORE_INDEX, LabelArray, Window

__all__ = ["RasterLayers", "VectorLayers", "open_all_bands"]


def open_all_bands(path: str) -> RasterSource:
    """Open a raster with all its bands as data: GDAL takes the fourth of four bytes for transparency.

    Raises:
        InputError: it can't be opened as a raster.
    """
    with open_dataset(path) as dataset:
        num_bands = dataset.count
    return RasterSource(path, bands=range(1, num_bands + 1))


class RasterLayers:
    """One layer a class from the bands of a raster of 0 and 1; `open_labels` makes one.

    A band's nodata and the ignored values are "no label" for its class alone.

    Args:
        labels: all bands of the raster, on the source's grid.
        source: gives the grid.
        num_classes: bands expected.
        classes: the values to ignore.
        paired: labels without CRS lie on the source's pixels, if there are as many.
        spot_check: read some windows at once.

    Raises:
        InputError: another number of bands, another grid, or a value other than 0 and 1.
    """

    def __init__(
        self,
        labels: RasterSource,
        source: RasterSource,
        num_classes: int,
        classes: LabelClasses,
        *,
        paired: bool = False,
        spot_check: bool = True,
    ) -> None:
        self._path = labels.path
        self._extent = source.extent
        self._bands = labels
        if labels.num_bands != num_classes:
            raise InputError(f"expected one band a class in {self._path}, {num_classes}, got {labels.num_bands} bands")
        if not same_grid(labels, source, paired=paired):
            raise InputError(
                f"label bands must lie on the pixel grid of {source.path}, {source.height} rows x {source.width} "
                f"columns; warp {self._path} to it (gdalwarp -r near -te ... -ts ...)"
            )
        nodata = [] if self._bands.nodata in (None, 0, 1) else [self._bands.nodata]
        self._values = LabelClasses(None, (0, 1), (*classes.ignore_values, *nodata), explicit=True)
        for window in spots(self._extent) if spot_check else ():
            # A value that is no label should come to light before the training does.
            self.read(window)

    def read(self, window: Window) -> LabelArray:
        """1 where a class is true, 0 where not, `IGNORE_INDEX` where there is no label: [K, height, width].

        Raises:
            InputError: the file is damaged there, or holds a value other than 0 and 1.
        """
        layers = np.full((self._bands.num_bands, *window.shape), IGNORE_INDEX, np.uint8)
        shared = window.intersect(self._extent)
        if shared is not None:
            pixels = self._bands.read(shared).pixels
            everywhere = np.ones(shared.shape, bool)
            for layer, band in zip(layers, pixels, strict=True):
                layer[shared.slices_in(window)] = self._values.indices_of(band, everywhere, self._path)
        return layers

    def close(self) -> None:
        """Close this thread's file handle; a later read opens it again."""
        self._bands.close()


class VectorLayers(VectorLabels):
    """One layer a class from polygons that may overlap; `open_labels` makes one.

    Polygons of an ignored value are "no label" for all classes.

    Args:
        path: the vector file.
        source: gives the grid to burn on.
        classes: attribute values to class indices.
        attribute: column of class names or values; it may be left out where there is one class.
        background: None where polygons are only samples: pixels under no polygon carry no label.
        all_touched: burn every pixel that a polygon touches, not only those whose centre it holds.

    Raises:
        InputError: the file can't be read, or doesn't fit the source or the classes.
    """

    def read(self, window: Window) -> LabelArray:
        """1 where a class is true, 0 where not, `IGNORE_INDEX` where there is no label: [K, height, width]."""
        layers = np.full((self._num_classes, *window.shape), IGNORE_INDEX, np.uint8)
        shared = window.intersect(self._extent)
        if shared is not None:
            layers[:, *shared.slices_in(window)] = self._burn_layers(shared)
        return layers

    def _burn_layers(self, window: Window) -> LabelArray:
        hits = self._hits(window)
        codes = self._codes[hits]
        layers = [self._burnt(window, hits[codes == k], 1, fill=0) for k in range(self._num_classes)]
        unlabelled = self._burnt(window, hits[codes == IGNORE_INDEX], 1, fill=0) > 0
        burnt = np.stack(layers)
        if self._fill == IGNORE_INDEX:
            unlabelled |= ~burnt.any(0)
        burnt[:, unlabelled] = IGNORE_INDEX
        return burnt

    def _code_without_attribute(self, path: str, background: int | None) -> int:
        if self._num_classes != 1:
            raise InputError(
                f"polygons without attribute are of one class, got {self._num_classes} classes; set attribute to the "
                f"column of {path} that holds the class"
            )
        return 0
