"""Labels from mask rasters, on the source's grid or warped to it, and multi-label layers."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.enums import ColorInterp
from rasterio.vrt import WarpedVRT

from perf_vit.errors import InputError
from perf_vit.labels._placement import check_both_have_crs, check_mask_overlap
from perf_vit.labels.classes import LabelClasses
from perf_vit.labels.vector import VectorLabels
from perf_vit.sources import MosaicSource, RasterSource
from perf_vit.sources._gdal import GDAL_ERRORS, PerThread, color_kinds, crs_name, open_dataset, read_window, reason_of
from perf_vit.sources._grid import GridOptions
from perf_vit.sources._remote import with_retries
from perf_vit.text import number_text
from perf_vit.types import IGNORE_INDEX, BoolArray, LabelArray, Window

__all__ = ["RasterLabels", "RasterLayers", "VectorLayers", "open_all_bands", "same_grid", "spots"]

_SPOT_PX = 256

_MAX_SPOTS = 8


class RasterLabels:
    """Class indices from a raster of label values, built by `open_labels`.

    Args:
        labels: Mask raster.
        source: Source with the grid to read on.
        classes: Mapping of label values to class indices.
        paired: Whether labels without CRS lie on the source's pixels if the sizes agree.
        spot_check: Whether to read some windows at once.

    Raises:
        InputError: Labels and source don't fit, or the labels have a value that isn't a class.
    """

    def __init__(
        self,
        labels: RasterSource,
        source: RasterSource,
        classes: LabelClasses,
        *,
        paired: bool = False,
        spot_check: bool = True,
    ) -> None:
        self._labels = labels
        self._extent = source.extent
        self._classes = classes
        _check_values(labels, classes)
        if isinstance(labels, MosaicSource) and not same_grid(labels, source):
            self._labels = labels = _on_grid(labels, source)
        self._warped = None if same_grid(labels, source, paired=paired) else _warped(labels, source)
        for window in spots(self._extent) if spot_check else ():
            # Find values that aren't classes before training starts.
            self.read(window)

    def read(self, window: Window) -> LabelArray:
        """Read class indices of a window of the source, [height, width]; `IGNORE_INDEX` for pixels without label.

        Raises:
            InputError: The file is damaged there, or has a value that isn't a class.
        """
        indices = np.full(window.shape, IGNORE_INDEX, np.uint8)
        shared = window.intersect(self._extent)
        if shared is not None:
            pixels, valid = self._read_inside(shared)
            indices[shared.slices_in(window)] = self._classes.indices_of(pixels, valid, self._labels.path)
        return indices

    def close(self) -> None:
        """Close this thread's file handles; the next read opens them again."""
        self._labels.close()
        if self._warped is not None:
            self._warped.close()

    def _read_inside(self, window: Window) -> tuple[npt.NDArray[Any], BoolArray]:
        if self._warped is None:
            image = self._labels.read(window)
            return image.pixels[0], image.valid
        return with_retries(functools.partial(self._read_warped, self._warped, window), self._warped.close)

    def _read_warped(self, warped: PerThread[Any], window: Window) -> tuple[npt.NDArray[Any], BoolArray]:
        dataset = warped.get()
        pixels, alpha = read_window(dataset, self._labels.path, window, indexes=[self._labels.bands[0], dataset.count])
        return pixels, alpha > 0


def _check_values(labels: RasterSource, classes: LabelClasses) -> None:
    if labels.num_bands != 1:
        raise InputError(f"expected one band of label values in {labels.path}, got {labels.num_bands} bands")
    if classes.explicit and labels.nodata in classes.values and labels.nodata not in classes.ignore_values:
        shown = number_text(labels.nodata)
        raise InputError(
            f"{labels.path} declares {shown} as nodata, and {shown} is the value of class "
            f"{classes.values.index(labels.nodata)}: if it is a class, remove the declaration "
            f"(rio edit-info --unset-nodata {labels.path}); if it means no label, add it to ignore_values"
        )


def same_grid(labels: RasterSource, source: RasterSource, *, paired: bool = False) -> bool:
    """Return whether two rasters have the same pixel grid; paired labels without CRS do if the sizes agree."""
    if paired and labels.crs is None:
        return labels.size == source.size
    if labels.size != source.size or labels.crs != source.crs:
        return False
    if source.crs is None:
        return True
    to_labels = ~labels.transform @ source.transform
    corners = [(0, 0), (source.width, source.height)]
    return all(abs(a - b) < 0.01 for corner in corners for a, b in zip(to_labels @ corner, corner, strict=True))


def _warped(labels: RasterSource, source: RasterSource) -> PerThread[Any]:
    if labels.crs is None and source.crs is None:
        raise InputError(
            f"labels without a CRS must have the raster's size, {source.height} rows x {source.width} columns "
            f"({source.path}), got {labels.height} x {labels.width} ({labels.path})"
        )
    check_both_have_crs(source, labels.path, labels.crs)
    check_mask_overlap(source, labels)
    grid = {"crs": source.crs, "transform": source.transform, "height": source.height, "width": source.width}
    return PerThread(functools.partial(_open_warped, labels.path, grid))


def _on_grid(labels: MosaicSource, source: RasterSource) -> MosaicSource:
    """Return a mosaic of masks on the grid of a source.

    Raises:
        InputError: It doesn't overlap the source, or the source is rotated.
    """
    check_both_have_crs(source, labels.path, labels.crs)
    check_mask_overlap(source, labels)
    t = source.transform
    grid = GridOptions(crs=source.crs, resolution=(abs(t.a), abs(t.e)), bounds=source.bounds)
    placed = MosaicSource(labels.path, labels.paths, grid=grid, resampling="nearest")
    if not same_grid(placed, source):
        raise InputError(
            f"masks in several files must lie on a raster with rows from north to south, and {source.path} is turned; "
            f"make one file of {labels.path} (gdalbuildvrt labels.vrt ...)"
        )
    return placed


def _open_warped(path: str, grid: dict[str, Any]) -> Any:
    dataset = open_dataset(path)
    try:
        # The alpha band marks pixels outside of the labels, whatever their nodata value.
        has_alpha = ColorInterp.alpha in color_kinds(dataset)
        return WarpedVRT(dataset, add_alpha=not has_alpha, **grid)
    except GDAL_ERRORS as error:
        raise InputError(f"can't warp {path} to {crs_name(grid['crs'])}: {reason_of(error)}") from error


def spots(extent: Window) -> list[Window]:
    """Return evenly spread windows: all of a small raster, a sample of a large one."""
    rows, cols = _spread(extent.height), _spread(extent.width)
    return [Window(row, col, _SPOT_PX, _SPOT_PX) for row in rows for col in cols]


def _spread(length: int) -> list[int]:
    count = min(_MAX_SPOTS, -(-length // _SPOT_PX))
    return [int(start) for start in np.linspace(0, max(0, length - _SPOT_PX), count)]


def open_all_bands(path: str) -> RasterSource:
    """Open a raster with all its bands as data, as GDAL takes the fourth of four byte bands for alpha.

    Raises:
        InputError: The file can't be opened as a raster.
    """
    with open_dataset(path) as dataset:
        num_bands = dataset.count
    return RasterSource(path, bands=range(1, num_bands + 1))


class RasterLayers:
    """Multi-label layers from the bands of a raster of 0 and 1, one per class, built by `open_labels`.

    Nodata and ignored values of a band leave pixels unlabelled for its class only.

    Args:
        labels: Raster on the source's grid, with all its bands.
        source: Source with the grid.
        num_classes: Expected number of bands.
        classes: Values to ignore.
        paired: Whether labels without CRS lie on the source's pixels if the sizes agree.
        spot_check: Whether to read some windows at once.

    Raises:
        InputError: The number of bands or the grid differs, or there is a value other than 0 and 1.
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
            raise InputError(f"expected one band per class in {self._path}, {num_classes}, got {labels.num_bands}")
        if not same_grid(labels, source, paired=paired):
            raise InputError(
                f"label bands must lie on the pixel grid of {source.path}, {source.height} rows x {source.width} "
                f"columns; warp {self._path} to it (gdalwarp -r near -te ... -ts ...)"
            )
        nodata = [] if self._bands.nodata in (None, 0, 1) else [self._bands.nodata]
        self._values = LabelClasses(None, (0, 1), (*classes.ignore_values, *nodata), explicit=True)
        for window in spots(self._extent) if spot_check else ():
            # Find invalid values before training starts.
            self.read(window)

    def read(self, window: Window) -> LabelArray:
        """Read a window, [K, height, width]: 1 for present classes, 0 for absent, `IGNORE_INDEX` for unlabelled.

        Raises:
            InputError: The file is damaged there, or has a value other than 0 and 1.
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
        """Close this thread's file handle; the next read opens it again."""
        self._bands.close()


class VectorLayers(VectorLabels):
    """Multi-label layers from polygons that may overlap, one per class, built by `open_labels`.

    Polygons of an ignored value leave pixels unlabelled for all classes.

    Args:
        path: Vector file.
        source: Source with the grid to burn on.
        classes: Mapping of attribute values to class indices.
        attribute: Column with class names or values; None if there is one class.
        background: None if polygons are samples only, so that pixels outside of them are unlabelled.
        all_touched: Whether polygons label all pixels that they touch, instead of those whose centre they contain.

    Raises:
        InputError: The file can't be read, or doesn't fit the source or the classes.
    """

    def read(self, window: Window) -> LabelArray:
        """Read a window, [K, height, width]: 1 for present classes, 0 for absent, `IGNORE_INDEX` for unlabelled."""
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

    def _warn_of_covered(self, owners: npt.NDArray[np.int64]) -> None:
        """Do nothing, as each class has a layer of its own."""

    def _code_without_attribute(self, path: str, background: int | None) -> int:
        if self._num_classes != 1:
            raise InputError(
                f"polygons without attribute have one class, got {self._num_classes} classes; set attribute to the "
                f"column of {path} with the class"
            )
        return 0
