"""Types shared between packages: windows, georeferenced pixels, sources, objects, feature maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from affine import Affine
    from rasterio.crs import CRS

__all__ = [
    "IGNORE_INDEX",
    "TISSUE_METHODS",
    "BoolArray",
    "Detections",
    "FeatureSpec",
    "GeoImage",
    "InputOptions",
    "InputPath",
    "LabelArray",
    "MaskCrops",
    "ObjectLabels",
    "OpenInput",
    "Source",
    "Window",
]

BoolArray = npt.NDArray[np.bool_]
LabelArray = npt.NDArray[np.uint8]

IGNORE_INDEX = 255
"""Label of pixels excluded from losses and metrics; classes are 0 to 254."""

TISSUE_METHODS = ("auto", "otsu")
"""Methods that detect tissue; any other value of an option `tissue` is a file of outlines."""


@dataclass(frozen=True, slots=True)
class Window:
    """Rectangle of a source's pixels: rows [row, row_stop), columns [col, col_stop).

    It may extend past the edges of the source; readers pad there.
    """

    row: int
    col: int
    height: int
    width: int

    @property
    def row_stop(self) -> int:
        """First row below the window."""
        return self.row + self.height

    @property
    def col_stop(self) -> int:
        """First column right of the window."""
        return self.col + self.width

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    def intersect(self, other: Window) -> Window | None:
        """Return the intersection with another window, or None if it is empty."""
        row, col = max(self.row, other.row), max(self.col, other.col)
        height = min(self.row_stop, other.row_stop) - row
        width = min(self.col_stop, other.col_stop) - col
        return Window(row, col, height, width) if height > 0 and width > 0 else None

    def slices_in(self, outer: Window) -> tuple[slice, slice]:
        """Return the (rows, columns) of this window in an array of the pixels of `outer`, which must contain it."""
        row, col = self.row - outer.row, self.col - outer.col
        return slice(row, row + self.height), slice(col, col + self.width)


@dataclass(slots=True)
class GeoImage:
    """Pixels with their validity and georeference.

    Attributes:
        pixels: [C, H, W], in the dtype of the source.
        valid: [H, W] bool, True where at least one band holds data.
        crs: Coordinate reference system, or None.
        transform: Affine transform from pixel (column, row) to CRS coordinates, or None.
        mpp: Micrometres per pixel of a slide, None for a raster.
        band_valid: [C, H, W] bool, True where a band holds data: not nodata, not masked, not NaN, inside the source.
            None if every band equals `valid`.
    """

    pixels: npt.NDArray[Any]
    valid: BoolArray
    crs: CRS | None = None
    transform: Affine | None = None
    mpp: float | None = None
    band_valid: BoolArray | None = None

    @classmethod
    def from_mask(
        cls,
        pixels: npt.NDArray[Any],
        mask: BoolArray,
        crs: CRS | None = None,
        transform: Affine | None = None,
        mpp: float | None = None,
    ) -> GeoImage:
        """Make an image from pixels and their mask.

        Args:
            pixels: Pixels, [C, H, W].
            mask: True where a value holds data, [C, H, W], or [1, H, W] for all bands.
            crs: Coordinate reference system, or None.
            transform: Affine transform from pixel (column, row) to CRS coordinates, or None.
            mpp: Micrometres per pixel of a slide, None for a raster.
        """
        valid: BoolArray = np.asarray(mask[0] if len(mask) == 1 else mask.any(0))
        alike = len(mask) == 1 or bool((mask == valid).all())
        return cls(pixels, valid, crs, transform, mpp, None if alike else mask)

    @property
    def mask(self) -> BoolArray:
        """True where a value holds data, [C, H, W], or [1, H, W] for all bands."""
        return self.valid[None] if self.band_valid is None else self.band_valid


InputPath: TypeAlias = str | Path | Sequence[str | Path]
"""Input of `perf_vit.open`: a file, folder, pattern or URL, or a list of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputOptions:
    """Options with which a model's inputs are opened, in training, evaluation and prediction.

    Attributes:
        bands: 1-based bands to read; None for all except an alpha band.
        nodata: Value of missing pixels, which overrides the value in the files; None to use theirs.
        resolution: Pixel size at which rasters are read; None for their own.
        resolution_unit: name and metres of the unit of `resolution`, (name, None) for degrees; None for the unit of
            each raster's CRS.
        mpp: Micrometres per pixel at which slides are read; None for level 0, and for rasters.
        slide_mpp: Micrometres per pixel of level 0 of slides whose files state none, or "objective" for 10 divided by
            the magnification of the objective.
        slide_mpp_override: Micrometres per pixel of level 0, whatever the files state.
        tissue: "auto" or "otsu", or path of a GeoJSON file of outlines; pixels outside the tissue are invalid.
    """

    bands: tuple[int, ...] | None = None
    nodata: float | None = None
    resolution: float | None = None
    resolution_unit: tuple[str, float | None] | None = None
    mpp: float | None = None
    slide_mpp: float | Literal["objective"] | None = None
    slide_mpp_override: float | None = None
    tissue: str | None = None

    @classmethod
    def from_config(cls, config: Any) -> InputOptions:
        """Read the options from the fields of a data config with the same names."""
        names = (each.name for each in fields(InputOptions) if hasattr(config, each.name))
        values: dict[str, Any] = {name: getattr(config, name) for name in names}
        if isinstance(values.get("bands"), list):
            values["bands"] = tuple(values["bands"])
        return cls(**values)


class Source(Protocol):
    """Interface of rasters, mosaics and slides; `perf_vit.open` opens them.

    Attributes:
        path: Path as given.
        height: Number of rows.
        width: Number of columns.
        num_bands: Number of bands or channels C that `read` returns.
        dtype: Dtype of the pixels.
        band_names: name of each band.
        crs: Coordinate reference system, or None.
        transform: Affine transform from pixel (column, row) to CRS coordinates; the identity without georeference.
        mpp: Micrometres per pixel of a slide at the scale at which it is read, None for a raster.
        nodata: Value of missing pixels, or None.
        colormap: Mapping of value to (red, green, blue, alpha), or None.
    """

    path: str
    height: int
    width: int
    dtype: np.dtype[Any]
    band_names: tuple[str, ...]
    crs: CRS | None
    transform: Affine
    mpp: float | None
    nodata: float | None
    colormap: dict[int, tuple[int, int, int, int]] | None

    @property
    def num_bands(self) -> int:
        """Number of bands or channels, C."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""

    @property
    def extent(self) -> Window:
        """Window of all pixels."""

    def read(self, window: Window) -> GeoImage:
        """Read the pixels [C, h, w] and the valid mask [h, w] of a window, padded past the edges; thread-safe."""

    def read_reduced(self, max_size_px: int, window: Window | None = None) -> GeoImage:
        """Read a window at reduced resolution, longest side at most `max_size_px`, for statistics and thumbnails."""

    def close(self) -> None:
        """Close the file handle of this thread; a later read opens it again."""


OpenInput: TypeAlias = Callable[[InputPath], Source]
"""Function that opens an image by its path, with the options of a model or a data config."""


@dataclass(frozen=True, slots=True)
class MaskCrops:
    """Masks of the objects of one image, each cropped to a rectangle around its object to save memory.

    Attributes:
        crops: Mask of each object within its rectangle, n bool arrays [h, w].
        corners: Row and column of the first pixel of each rectangle, [n, 2].
        size: (height, width) of the image in pixels.
    """

    crops: list[BoolArray]
    corners: npt.NDArray[np.int64]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.crops)

    @classmethod
    def from_masks(cls, masks: BoolArray) -> MaskCrops:
        """Make crops of full-size masks, [n, height, width]."""
        crops, corners = [], np.zeros((len(masks), 2), np.int64)
        for index, mask in enumerate(masks):
            rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            if len(rows):
                corners[index] = rows[0], cols[0]
            crops.append(mask[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1] if len(rows) else mask[:1, :1])
        return cls(crops, corners, (masks.shape[1], masks.shape[2]))

    def take(self, indices: npt.NDArray[Any]) -> MaskCrops:
        """Select masks by their indices or by a bool array [n]."""
        chosen = np.arange(len(self))[indices]
        return MaskCrops([self.crops[index] for index in chosen.tolist()], self.corners[chosen], self.size)

    def areas(self) -> npt.NDArray[np.int64]:
        """Return the area of each object in pixels, [n]."""
        return np.array([np.count_nonzero(crop) for crop in self.crops], np.int64)

    def rectangles(self) -> npt.NDArray[np.int64]:
        """Return the rectangles as left, top, right, bottom, [n, 4]."""
        shapes = np.array([crop.shape for crop in self.crops], np.int64).reshape(-1, 2)
        return np.hstack([self.corners, self.corners + shapes])[:, [1, 0, 3, 2]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Detections:
    """Objects predicted in one tile, as tensors or arrays, with exactly one kind of geometry.

    Attributes:
        scores: Confidence, [n].
        labels: Class indices, [n].
        boxes_xyxy: Left, top, right, bottom in pixels of the tile, [n, 4].
        oriented_boxes: Centre x, centre y, width, height in pixels of the tile and angle in radians, [n, 5]; width >=
            height and angle in [-pi/2, pi/2).
        masks: Mask of each object, bool [n, h, w].
        polygons: n shapely polygons or multipolygons in pixels of the tile.
        mask_crops: Cropped masks of an image too large for `masks`; for metrics only.
    """

    scores: Any
    labels: Any
    boxes_xyxy: Any = None
    oriented_boxes: Any = None
    masks: Any = None
    polygons: Any = None
    mask_crops: MaskCrops | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectLabels:
    """Labelled objects of an image or a window, in its pixels.

    Attributes:
        labels: Class indices, [n] int64.
        boxes_xyxy: Left, top, right, bottom, [n, 4] float32.
        ignored: Bool [n], objects excluded from metrics: crowds and difficult ones.
        oriented_boxes: Centre x, centre y, width, height and angle in radians from the x axis towards the y axis, [n,
            5] float32, or None; width >= height and angle in [-pi/2, pi/2).
        masks: Mask of each object, bool [n, h, w], or None.
        mask_crops: Cropped masks of an image too large for `masks`; for metrics only.
    """

    labels: npt.NDArray[np.int64]
    boxes_xyxy: npt.NDArray[np.float32]
    ignored: BoolArray
    oriented_boxes: npt.NDArray[np.float32] | None = None
    masks: BoolArray | None = None
    mask_crops: MaskCrops | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """Feature map of a backbone.

    Attributes:
        channels: Number of channels.
        stride: Stride in input pixels.
    """

    channels: int
    stride: int
