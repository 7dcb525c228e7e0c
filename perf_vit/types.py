"""The values that travel between packages: windows, georeferenced pixels, feature shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from affine import Affine
    from rasterio.crs import CRS

__all__ = [
    "IGNORE_INDEX",
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
"""Label of a pixel that takes part in neither loss nor metrics; classes are 0 to 254."""


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of a source's pixels, half open: rows [row, row_stop), columns [col, col_stop).

    It may reach past the source's edges on any side; readers pad there.
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
        """The part that both windows share, or None."""
        row, col = max(self.row, other.row), max(self.col, other.col)
        height = min(self.row_stop, other.row_stop) - row
        width = min(self.col_stop, other.col_stop) - col
        return Window(row, col, height, width) if height > 0 and width > 0 else None

    def slices_in(self, outer: Window) -> tuple[slice, slice]:
        """(rows, columns) of this window inside an array that holds `outer`, which must contain it."""
        row, col = self.row - outer.row, self.col - outer.col
        return slice(row, row + self.height), slice(col, col + self.width)


@dataclass(slots=True)
class GeoImage:
    """Pixels that know where they lie and which of them hold data.

    Attributes:
        pixels: [C, H, W], the source's own dtype.
        valid: [H, W], True where at least one band holds data.
        crs: coordinate reference system, None where the source has none.
        transform: pixel (column, row) to CRS coordinates, None where the source has none.
        mpp: micrometres per pixel of a slide, None for a raster.
        band_valid: [C, H, W], True where a band holds data: not nodata, not masked, not NaN, inside the source. None
            where every band is like `valid`.
    """

    pixels: npt.NDArray[Any]
    valid: BoolArray
    crs: CRS | None = None
    transform: Affine | None = None
    mpp: float | None = None
    band_valid: BoolArray | None = None

    @classmethod
    def of(
        cls,
        pixels: npt.NDArray[Any],
        mask: BoolArray,
        crs: CRS | None = None,
        transform: Affine | None = None,
        mpp: float | None = None,
    ) -> GeoImage:
        """Make an image from the values that hold data.

        Args:
            pixels: [C, H, W].
            mask: True where a value holds data, [C, H, W], or [1, H, W] for all bands.
            crs: see the attributes.
            transform: see the attributes.
            mpp: see the attributes.
        """
        valid: BoolArray = np.asarray(mask[0] if len(mask) == 1 else mask.any(0))
        alike = len(mask) == 1 or bool((mask == valid).all())
        return cls(pixels, valid, crs, transform, mpp, None if alike else mask)

    @property
    def mask(self) -> BoolArray:
        """True where a value holds data, [C, H, W], or [1, H, W] for all bands."""
        return self.valid[None] if self.band_valid is None else self.band_valid


InputPath: TypeAlias = str | Path | Sequence[str | Path]
"""What `perf_vit.open_source` opens: a file, folder, pattern or URL, or a list of such."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputOptions:
    """Options that training, evaluation and prediction open the inputs of one model with.

    Attributes:
        bands: 1-based bands to read; None for all but an alpha band.
        nodata: value of missing pixels, instead of the one that files declare; None for theirs.
        resolution: pixel size that rasters are read at, None for their own.
        resolution_unit: name and metres of the unit of `resolution`; None instead of metres for degrees. None as a
            whole for the unit of each raster's CRS.
        mpp: micrometres per pixel that slides are read at; None for their level 0, and for rasters.
        slide_mpp: micrometres per pixel of slides' level 0, where their files don't say.
        tissue: "otsu", or a GeoJSON file of outlines: pixels elsewhere are not valid.
    """

    bands: tuple[int, ...] | None = None
    nodata: float | None = None
    resolution: float | None = None
    resolution_unit: tuple[str, float | None] | None = None
    mpp: float | None = None
    slide_mpp: float | None = None
    tissue: str | None = None

    @classmethod
    def from_config(cls, config: Any) -> InputOptions:
        """Take the options from the keys of a data config that have their names."""
        names = (each.name for each in fields(InputOptions) if hasattr(config, each.name))
        values: dict[str, Any] = {name: getattr(config, name) for name in names}
        if isinstance(values.get("bands"), list):
            values["bands"] = tuple(values["bands"])
        return cls(**values)


class Source(Protocol):
    """What a raster, a mosaic and a slide have in common; `perf_vit.open_source` opens them.

    Attributes:
        path: as it was given.
        height: rows.
        width: columns.
        num_bands: C, bands or channels that `read` gives.
        dtype: of the pixels.
        band_names: one a band.
        crs: coordinate reference system, None where there is none.
        transform: pixel (column, row) to CRS coordinates; the identity where there is none.
        mpp: micrometres per pixel of a slide at the size it is read at, None for a raster.
        nodata: value of missing pixels, None if there is none.
        colormap: value to (red, green, blue, alpha), None where there is none.
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
        """C."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""

    @property
    def extent(self) -> Window:
        """The window of all pixels."""

    def read(self, window: Window) -> GeoImage:
        """Pixels [C, h, w] and valid mask [h, w] of a window, padded where it reaches past the edge.

        Any thread may call it.
        """

    def read_reduced(self, max_size_px: int, window: Window | None = None) -> GeoImage:
        """A window at lower resolution, its longest side at most `max_size_px`: for statistics and pictures."""

    def close(self) -> None:
        """Close this thread's file handle; a later read opens it again."""


OpenInput: TypeAlias = Callable[[InputPath], Source]
"""Opens an image by its path, with the options of a model or a data config."""


@dataclass(frozen=True, slots=True)
class MaskCrops:
    """Masks of one image, each only inside a rectangle that holds its object, so that many fit in memory.

    Attributes:
        crops: which pixels of its rectangle each object covers, n arrays bool [h, w].
        corners: row and column of each rectangle's first pixel, [n, 2].
        size: (height, width) of the image.
    """

    crops: list[BoolArray]
    corners: npt.NDArray[np.int64]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.crops)

    @classmethod
    def of(cls, masks: BoolArray) -> MaskCrops:
        """From whole masks, [n, height, width]."""
        crops, corners = [], np.zeros((len(masks), 2), np.int64)
        for index, mask in enumerate(masks):
            rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            if len(rows):
                corners[index] = rows[0], cols[0]
            crops.append(mask[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1] if len(rows) else mask[:1, :1])
        return cls(crops, corners, (masks.shape[1], masks.shape[2]))

    def take(self, indices: npt.NDArray[Any]) -> MaskCrops:
        """Some of the masks, by their numbers or as bool [n]."""
        chosen = np.arange(len(self))[indices]
        return MaskCrops([self.crops[index] for index in chosen.tolist()], self.corners[chosen], self.size)

    def areas(self) -> npt.NDArray[np.int64]:
        """Pixels of each object, [n]."""
        return np.array([np.count_nonzero(crop) for crop in self.crops], np.int64)

    def rectangles(self) -> npt.NDArray[np.int64]:
        """The rectangles as left, top, right, bottom, [n, 4]."""
        shapes = np.array([crop.shape for crop in self.crops], np.int64).reshape(-1, 2)
        return np.hstack([self.corners, self.corners + shapes])[:, [1, 0, 3, 2]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Detections:
    """The objects of one tile, tensors or arrays, with exactly one kind of geometry.

    Attributes:
        scores: [n], higher is surer.
        labels: [n], class indices.
        boxes_xyxy: left, top, right, bottom in the tile's pixels, [n, 4].
        oriented_boxes: centre x, centre y, width, height in the tile's pixels and angle in radians, [n, 5]; width is
            at least height, and the angle lies in [-pi/2, pi/2).
        masks: which pixels of the tile each object covers, bool [n, h, w].
        polygons: n shapely polygons or multipolygons in the tile's pixels.
        mask_crops: masks of an image too large for `masks`; only metrics take them.
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
    """The labelled objects of an image or a window, in its pixels.

    Attributes:
        labels: [n] int64, class indices.
        boxes_xyxy: left, top, right, bottom, [n, 4] float32.
        oriented_boxes: centre x, centre y, width, height and angle in radians, [n, 5] float32, where labels have them;
            width is at least height, and the angle, from the x axis towards the y axis, lies in [-pi/2, pi/2).
        masks: which pixels each object covers, bool [n, h, w], where labels have them.
        ignored: [n] bool, objects that count neither as found nor as missed: crowds and difficult ones.
        mask_crops: instead of `masks`, those of an image too large for them; only metrics take them.
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
    """One feature map of a backbone: its channel count and its stride in input pixels."""

    channels: int
    stride: int
