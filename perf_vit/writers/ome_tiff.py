"""Pyramidal OME-TIFF of finished maps, for QuPath and other slide viewers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import rasterio.windows

from perf_vit.errors import InputError, OutputError, extra
from perf_vit.files import staged
from perf_vit.sources._gdal import GDAL_ERRORS, check_exists, color_kinds, plain_images_allowed, reason_of
from perf_vit.sources.slides.ome_xml import make_ome_xml
from perf_vit.text import number_text

__all__ = ["write_ome_tiff"]

_TILE_PX = 512
_UM_PER_CM = 10_000
# 32-bit offsets reach 4 GiB, and the compressed size is unknown in advance.
_BIG_BYTES = 1 << 31


def write_ome_tiff(
    out: str | Path,
    cog_path: str | Path,
    *,
    mpp: float | tuple[float, float],
    name: str | None = None,
    channel_names: Sequence[str] | None = None,
    colormap: Mapping[int, tuple[int, ...]] | None = None,
    description: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Copy a Cloud-Optimised GeoTIFF to a pyramidal OME-TIFF, tile by tile.

    Channels are separate planes, and the overviews of the COG become SubIFDs (OME-TIFF 2016-06). The output is
    byte-reproducible, as it contains neither time nor machine, and appears when it is complete.

    Args:
        out: Output file, by convention `.ome.tif`.
        cog_path: Map.
        mpp: Micrometres per pixel of the map (not of the slide, if the map is coarser), or (x, y).
        name: Name of the image; None for the name of the map's file.
        channel_names: Name of each band; None for the bands' descriptions.
        colormap: Value to (red, green, blue, ...), 0 to 255, for a map with one band of uint8; None for the map's own.
        description: Free text.
        tags: Key-value pairs, stored as an annotation; scale and offset of bands are added.

    Raises:
        InputError: The map can't be read.
        OutputError: The output can't be written, or an argument doesn't fit the map.
    """
    tifffile = _tifffile(out)
    source, target = str(cog_path), Path(out)
    check_exists(source)
    try:
        with plain_images_allowed(), rasterio.open(source) as cog, staged(target) as folder:
            colors = _color_table(cog, source, colormap)
            xml = _metadata(cog, name or Path(source).name, target, mpp, channel_names, description, tags or {})
            big = cog.count * cog.height * cog.width * np.dtype(cog.dtypes[0]).itemsize > _BIG_BYTES
            with tifffile.TiffWriter(folder / target.name, bigtiff=big) as writer:
                for band in range(1, cog.count + 1):
                    _write_band(writer, cog, source, band, mpp, colors, xml if band == 1 else None)
    except GDAL_ERRORS as error:
        raise InputError(f"can't read {source}: {reason_of(error)}; the file may be truncated or damaged") from error
    except OSError as error:
        raise OutputError(f"can't write {target}: {str(error.strerror or error).lower()}") from error


def _as_pair(mpp: float | tuple[float, float]) -> tuple[float, float]:
    return mpp if isinstance(mpp, tuple) else (mpp, mpp)


def _tifffile(out: str | Path) -> Any:
    with extra("slides", f"writing {out}"):
        return importlib.import_module("tifffile")


def _write_band(
    writer: Any,
    cog: Any,
    source: str,
    band: int,
    mpp: float | tuple[float, float],
    colors: npt.NDArray[np.uint16] | None,
    xml: str | None,
) -> None:
    num_overviews = len(cog.overviews(band))
    options = {
        "dtype": cog.dtypes[band - 1],
        "tile": (_TILE_PX, _TILE_PX),
        "compression": "zlib",
        "photometric": "minisblack" if colors is None else "palette",
        "colormap": colors,
        "metadata": None,
        "software": False,
        # A single thread compresses tiles in a fixed order and holds few in memory.
        "maxworkers": 1,
    }
    for level in range(num_overviews + 1):
        # GDAL counts levels from the first overview.
        overview = {} if level == 0 else {"overview_level": level - 1}
        with plain_images_allowed(), rasterio.open(source, **overview) as dataset:
            writer.write(
                _tiles(dataset, band),
                shape=(dataset.height, dataset.width),
                subifds=num_overviews if level == 0 else None,
                subfiletype=1 if level else 0,
                description=xml if level == 0 else None,
                # Readers without OME support take the pixel size from here.
                resolution=tuple(_UM_PER_CM / value * dataset.width / cog.width for value in _as_pair(mpp)),
                resolutionunit="CENTIMETER",
                **options,
            )


def _tiles(dataset: Any, band: int) -> Iterator[npt.NDArray[Any]]:
    """Yield the tiles of one band row by row, padded with 0 at the edge, [tile, tile]."""
    for row in range(0, dataset.height, _TILE_PX):
        for col in range(0, dataset.width, _TILE_PX):
            height, width = min(_TILE_PX, dataset.height - row), min(_TILE_PX, dataset.width - col)
            tile = np.zeros((_TILE_PX, _TILE_PX), dataset.dtypes[band - 1])
            tile[:height, :width] = dataset.read(band, window=rasterio.windows.Window(col, row, width, height))
            yield tile


def _color_table(
    cog: Any, source: str, colormap: Mapping[int, tuple[int, ...]] | None
) -> npt.NDArray[np.uint16] | None:
    """Return the 16-bit colour table of TIFF, [3, 256]."""
    is_class_map = cog.count == 1 and cog.dtypes[0] == "uint8"
    if colormap is None:
        if not is_class_map or color_kinds(cog)[0] != rasterio.enums.ColorInterp.palette:
            return None
        colormap = cog.colormap(1)
    if not is_class_map:
        raise OutputError(f"a colour table is for one band of uint8, {source} has {cog.count} of {cog.dtypes[0]}")
    table = np.zeros((3, 256), np.uint16)
    for value, color in colormap.items():
        table[:, value] = np.array(color[:3], np.uint16) * 257
    return table


def _metadata(
    cog: Any,
    name: str,
    target: Path,
    mpp: float | tuple[float, float],
    channel_names: Sequence[str] | None,
    description: str | None,
    tags: Mapping[str, str],
) -> str:
    mpp_xy = _as_pair(mpp)
    if not all(0 < value < np.inf for value in mpp_xy):
        raise OutputError(f"mpp of {target} must be above 0, in micrometres per pixel of the map; got {mpp}")
    names = tuple(channel_names or (cog.descriptions[band] or f"band_{band + 1}" for band in range(cog.count)))
    if len(names) != cog.count:
        raise OutputError(f"channel_names must name the {cog.count} bands of {name}, got {len(names)}: {list(names)}")
    scaling = {
        f"scale of {name}": number_text(value) for name, value in zip(names, cog.scales, strict=True) if value != 1
    }
    scaling |= {
        f"offset of {name}": number_text(value) for name, value in zip(names, cog.offsets, strict=True) if value != 0
    }
    return make_ome_xml(
        name=name,
        shape=(cog.count, cog.height, cog.width),
        dtype=np.dtype(cog.dtypes[0]),
        mpp_xy=mpp_xy,
        channel_names=names,
        description=description,
        tags={**tags, **scaling},
    )
