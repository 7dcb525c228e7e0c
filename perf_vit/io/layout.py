"""What a raster file is, apart from its pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import rasterio
from affine import Affine

from perf_vit.io._gdal import plain_images_allowed
from perf_vit.text import xml_text

__all__ = ["RasterLayout"]


@dataclass(frozen=True, kw_only=True)
class RasterLayout:
    """Size, place and meaning of a raster to write.

    Attributes:
        height: rows.
        width: columns.
        num_bands: C.
        dtype: of the pixels.
        crs: None for none.
        transform: pixel (column, row) to CRS coordinates, None for none.
        nodata: value of missing pixels.
        colormap: value to (red, green, blue, alpha), 0 to 255; for one band of uint8 or uint16. TIFF keeps no alpha.
        band_names: one description a band.
        tags: metadata of the file.
        scale: what pixels are to be multiplied with to get their value, 1 for nothing.
        overviews: how to make them; by default "nearest" with a colour table and "average" without. Class maps
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
        # Both go into metadata that are XML; what is written must be what is compared with later.
        names = self.band_names and tuple(map(xml_text, self.band_names))
        object.__setattr__(self, "band_names", names)
        object.__setattr__(self, "tags", {xml_text(key): xml_text(value) for key, value in self.tags.items()})

    def profile(self, height: int | None = None) -> dict[str, Any]:
        """What rasterio needs to create a file, of all rows or of some."""
        return {
            "height": self.height if height is None else height,
            "width": self.width,
            "count": self.num_bands,
            "dtype": self.dtype,
            "nodata": self.nodata,
        }

    def create(self, path: str, **options: Any) -> Any:
        """A new GeoTIFF with everything but pixels, open for writing."""
        # An identity transform is what a file without georeference reads as.
        given: dict[str, Any] = (
            {} if self.transform is None or self.transform.is_identity else {"transform": self.transform}
        )
        if self.num_bands >= 4:
            # GDAL takes four bands of bytes for a photo with alpha, unless it is told.
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
