"""Layout of a raster file: everything except its pixels; and the pixels of a small one in memory."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import rasterio
from affine import Affine

from perf_vit.errors import OutputError
from perf_vit.sources._gdal import GDAL_ERRORS, plain_images_allowed
from perf_vit.sources.slides.ome_xml import parse_ome_tags, parse_ome_xml
from perf_vit.text import xml_text

__all__ = ["BLOCK_PX", "HeldRows", "RasterLayout", "holds_layout", "is_ome_tiff_name", "is_one_block"]

BLOCK_PX = 512
"""Side of a block of a Cloud-Optimised GeoTIFF in pixels."""


@dataclass(frozen=True, kw_only=True)
class RasterLayout:
    """Size, georeference and metadata of a raster to write.

    Attributes:
        height: Number of rows.
        width: Number of columns.
        num_bands: Number of bands C.
        dtype: Data type of the pixels.
        crs: CRS, or None.
        transform: Transform from pixels (column, row) to CRS coordinates, or None.
        nodata: Value of missing pixels.
        colormap: Value to (red, green, blue, alpha), 0 to 255, for one band of uint8 or uint16. TIFF drops alpha.
        band_names: Description of each band.
        tags: Metadata of the file.
        scale: Factor from stored to actual values; 1 for none.
        overviews: Resampling of overviews: by default "nearest" with a colour table and "average" without. Class maps
            without a colour table need "nearest".
    """

    height: int
    width: int
    num_bands: int
    dtype: np.dtype[Any]
    crs: Any = None
    transform: Affine | None = None
    nodata: float | None = None
    colormap: Mapping[int, tuple[int, ...]] | None = None
    band_names: Sequence[str] | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    scale: float = 1.0
    overviews: Literal["nearest", "average"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        # Both go into XML metadata, and are compared with what was written later.
        names = self.band_names and tuple(map(xml_text, self.band_names))
        object.__setattr__(self, "band_names", names)
        object.__setattr__(self, "tags", {xml_text(key): xml_text(value) for key, value in self.tags.items()})

    @property
    def resampling(self) -> Literal["nearest", "average"]:
        """Resampling of overviews."""
        return self.overviews or ("nearest" if self.colormap else "average")

    def profile(self, height: int | None = None) -> dict[str, Any]:
        """Return rasterio's creation options for the whole raster or for some rows."""
        return {
            "height": self.height if height is None else height,
            "width": self.width,
            "count": self.num_bands,
            "dtype": self.dtype,
            "nodata": self.nodata,
        }

    def create(self, path: str, options: Mapping[str, Any]) -> Any:
        """Create a GeoTIFF with all metadata and no pixels, open for writing; `options` are the driver's."""
        # Files without georeference read as the identity transform.
        given: dict[str, Any] = (
            {} if self.transform is None or self.transform.is_identity else {"transform": self.transform}
        )
        if self.num_bands >= 4:
            # GDAL assumes that the fourth of four byte bands is alpha unless told otherwise.
            given["alpha"] = "NO"
        with plain_images_allowed():
            dataset = rasterio.open(path, "w", driver="GTiff", crs=self.crs, **self.profile(), **given, **options)
        for band, name in enumerate(self.band_names or (), 1):
            dataset.set_band_description(band, name)
        if self.colormap:
            dataset.write_colormap(1, dict(self.colormap))
        if self.scale != 1:
            dataset.scales = (self.scale,) * self.num_bands
        dataset.update_tags(**self.tags)
        return dataset

    def check_rows(self, row: int, block: npt.NDArray[Any], path: Path) -> None:
        """Check that pixels [C, h, width] from a row on are some of the raster's.

        Raises:
            OutputError: They have another shape or dtype, or exceed the raster.
        """
        num_rows = block.shape[1] if block.ndim == 3 else 0
        if (
            block.shape != (self.num_bands, num_rows, self.width)
            or block.dtype != self.dtype
            or num_rows == 0
            or not 0 <= row <= self.height - num_rows
        ):
            raise OutputError(
                f"expected strips [{self.num_bands}, h, {self.width}] of {self.dtype} inside {self.height} rows for "
                f"{path}, got {list(block.shape)} of {block.dtype} at row {row}"
            )

    def check_complete(self, gaps: Iterable[tuple[int, int]], path: Path) -> None:
        """Check that no rows are missing.

        Raises:
            OutputError: Some are.
        """
        if missing := sum(stop - start for start, stop in gaps):
            raise OutputError(f"expected {self.height} rows for {path}, got {self.height - missing}")


def is_one_block(height: int, width: int) -> bool:
    """Return whether a map is a single block without overviews: its rows may be `HeldRows`, which are faster."""
    return max(height, width) <= BLOCK_PX


class HeldRows:
    """Rows of a small raster in memory, which a crash loses; for the rest like a `StripStore`.

    Attributes:
        folder: Folder as given.
        pixels: Pixels [C, height, width].
    """

    def __init__(self, folder: Path, layout: RasterLayout, path: Path) -> None:
        self.folder = folder
        self.pixels = np.zeros((layout.num_bands, layout.height, layout.width), layout.dtype)
        self._layout = layout
        self._path = path
        self._missing = np.ones(layout.height, bool)

    def write(self, row: int, block: npt.NDArray[Any]) -> None:
        """Take a strip of rows; see `StripStore.write`."""
        self._layout.check_rows(row, block, self._path)
        rows = slice(row, row + block.shape[1])
        self.pixels[:, rows] = block
        self._missing[rows] = False

    def close(self) -> None:
        """Do nothing, as all is in memory."""

    def gaps(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the missing rows of [start, stop) as (first, stop) pairs, from top to bottom."""
        missing = np.concatenate([[False], self._missing[start:stop], [False]])
        edges = np.flatnonzero(missing[1:] != missing[:-1]) + start
        return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def holds_layout(path: Path, layout: RasterLayout, *, other_tags: Container[str] = ()) -> bool:
    """Return whether a file is a raster of this size with these bands and tags, whatever its georeference and pixels.

    Args:
        path: File; it may be missing or not a raster.
        layout: Layout to compare with.
        other_tags: Names of tags that may differ.
    """
    try:
        with plain_images_allowed(), rasterio.open(path) as dataset:
            tags, names = dataset.tags(), dataset.descriptions
            if is_ome_tiff_name(path):
                # Channels are separate images, and tags are part of the description.
                xml = tags.get("TIFFTAG_IMAGEDESCRIPTION", "")
                tags = parse_ome_tags(xml)
                names = next((image.channel_names for image in parse_ome_xml(xml)), ())
            same = (
                (dataset.height, dataset.width, len(names)) == (layout.height, layout.width, layout.num_bands)
                and set(dataset.dtypes) == {str(layout.dtype)}
                and (layout.band_names is None or names == tuple(layout.band_names))
            )
    except GDAL_ERRORS:
        return False
    return same and all(tags.get(name) == value for name, value in layout.tags.items() if name not in other_tags)


def is_ome_tiff_name(path: str | Path) -> bool:
    """Return whether a file name is that of an OME-TIFF."""
    return Path(path).name.lower().endswith((".ome.tif", ".ome.tiff"))
