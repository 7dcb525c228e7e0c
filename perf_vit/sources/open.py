"""Opening of rasters, mosaics and slides."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from perf_vit.errors import DataWarning, InputError, PerfVitError
from perf_vit.sources._bands import Palette, PixelOptions
from perf_vit.sources._gdal import open_dataset
from perf_vit.sources._grid import Bounds, GridOptions
from perf_vit.sources.files import (
    GEOTIFF_SUFFIXES,
    RASTER_SUFFIXES,
    READERS,
    VERSION_TAG,
    OpenReader,
    is_by_product,
    is_item_list,
)
from perf_vit.sources.image_search import previews_among, without_own, without_repeats
from perf_vit.sources.mosaic import MosaicSource, item_paths
from perf_vit.sources.pixel_size import PixelSize
from perf_vit.sources.raster import OmeMapSource, RasterSource
from perf_vit.sources.slide_files import file_to_open, is_dicom_folder
from perf_vit.sources.slides import SlideSource
from perf_vit.sources.slides.ome_zarr import is_multiscale, open_ome_zarr
from perf_vit.sources.slides.openslide import OpenSlideReader
from perf_vit.sources.slides.pyramid import PyramidReader
from perf_vit.sources.slides.scale import SlideMpp
from perf_vit.sources.slides.tiff import holds_colours, open_array_tiff
from perf_vit.types import InputOptions, InputPath

__all__ = [
    "find_reader",
    "is_slide",
    "merged_options",
    "open_input",
    "open_map",
    "open_raster",
    "open_slide",
    "open_source",
]


def open_source(
    path: InputPath,
    *,
    bands: Sequence[int | str] | None = None,
    nodata: float | None = None,
    crs: Any = None,
    resolution: float | tuple[float, float] | PixelSize | None = None,
    bounds: Bounds | None = None,
    resampling: str | None = None,
    palette: Palette | None = None,
    apply_scale: bool | None = None,
    asset: str | None = None,
    mpp: float | None = None,
    level: int | None = None,
    slide_mpp: SlideMpp | None = None,
    slide_mpp_override: float | tuple[float, float] | None = None,
    tissue: str | Path | None = None,
    icc: Literal["srgb"] | None = None,
) -> RasterSource | SlideSource:
    """Open a raster (any GDAL format, also by URL), a mosaic of rasters, or a whole slide.

    Slides are all formats of OpenSlide (SVS, NDPI, MRXS, DICOM, ...), OME-TIFF and OME-Zarr; they need the extra
    `slides`. A TIFF with a georeference is a raster, and so are maps of perf_vit and a plain TIFF opened with raster
    options.

    A folder, a glob such as "tiles/*.tif", a list of paths or a JSON file of STAC items opens as a `MosaicSource`, in
    which earlier files take precedence. Files on another grid than the mosaic's are warped while reading, and so is a
    single raster if `crs`, `resolution` or `bounds` is given.

    Args:
        path: File, folder, glob, URL, GDAL path, or list of such paths.
        bands: 1-based numbers or names of the bands or channels to read, in this order; None for all but alpha.
        nodata: Value of a raster's missing pixels, which replaces the one declared in the file.
        crs: CRS to read rasters in, as "EPSG:32637" or anything rasterio accepts; None for that of the first file.
        resolution: Pixel size in CRS units, or (x, y), or a `PixelSize` in any unit; None for the finest of the files.
        bounds: Bounds (left, bottom, right, top) to read in the CRS, extended to whole pixels; None for those of all
            files. Pixels are aligned with the first file's corner; with `resolution` or another `crs`, with the bounds'
            top left.
        resampling: Resampling of rasters on another grid, by rasterio's name; None for "nearest" with a palette and
            "bilinear" without.
        palette: "keep" (default) to read the values of a band with a palette, "expand" to read its colours (red, green
            and blue), with transparent pixels invalid.
        apply_scale: Whether to apply the scale and offset declared in the file; gives float32, NaN where missing.
        asset: Asset to read from each STAC item; None for its only data asset.
        mpp: Micrometres per pixel to read a slide at. A level within 1 % of it is read without resampling.
        level: Level of a slide to read, instead of `mpp`; None for 0, the finest.
        slide_mpp: Micrometres per pixel of a slide's level 0, or (x, y), where the file states no plausible value;
            "objective" for 10 divided by the magnification of the objective.
        slide_mpp_override: Micrometres per pixel of a slide's level 0, or (x, y), whatever the file states.
        tissue: "auto" to detect a slide's tissue, "otsu" to detect it by saturation alone, or a file of outlines, as
            QuPath and ASAP write them; other pixels are invalid.
        icc: "srgb" to convert colours with the ICC profile of a slide (OpenSlide only).

    Raises:
        InputError: A file can't be opened or placed, a band or level doesn't exist, or an option doesn't fit.
    """
    scale = _given(mpp=mpp, level=level, slide_mpp=slide_mpp, slide_mpp_override=slide_mpp_override)
    of_slides = {**scale, **_given(tissue=tissue, icc=icc)}
    of_rasters = _given(
        nodata=nodata,
        crs=crs,
        resolution=resolution,
        bounds=bounds,
        resampling=resampling,
        palette=palette,
        apply_scale=apply_scale,
        asset=asset,
    )
    source = _open(path, bands, of_rasters=of_rasters, of_slides=of_slides)
    source.options = _given(bands=bands, **of_slides, **of_rasters)
    source.opened_from = path
    return source


def _open(
    path: InputPath,
    bands: Sequence[int | str] | None,
    *,
    of_rasters: Mapping[str, Any],
    of_slides: Mapping[str, Any],
) -> RasterSource | SlideSource:
    asked = True if of_slides else False if of_rasters else None
    found, opened = _inspect(os.fspath(path), asked) if isinstance(path, (str, Path)) else (False, None)
    if found and isinstance(path, (str, Path)):
        if of_rasters:
            raise InputError(f"{' and '.join(of_rasters)} is for rasters, and {path} is a slide; leave it out")
        return open_slide(os.fspath(path), bands=bands, **of_slides)
    if of_slides:
        names = " and ".join(of_slides)
        raise InputError(f"{names} can't be used with {path}, which is a raster, not a slide; leave it out")
    return open_raster(path, bands=bands, opened=opened, **of_rasters)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def open_raster(
    path: str | Path | Sequence[str | Path],
    *,
    bands: Sequence[int | str] | None = None,
    nodata: float | None = None,
    crs: Any = None,
    resolution: float | tuple[float, float] | PixelSize | None = None,
    bounds: Bounds | None = None,
    resampling: str | None = None,
    palette: Palette = "keep",
    apply_scale: bool = False,
    asset: str | None = None,
    opened: Any = None,
) -> RasterSource:
    """Open a raster that GDAL reads, or several as a mosaic; `open_source` describes the arguments.

    `opened` is the raster's dataset, if this thread has opened it already.

    Raises:
        InputError: A file can't be read or placed, or an option or another file doesn't fit.
    """
    pixels = PixelOptions(bands=bands, nodata=nodata, palette=palette, apply_scale=apply_scale)
    grid = _given(crs=crs, resolution=resolution, bounds=bounds)
    name, paths = _paths_of(path, asset)
    if paths is None and not grid:
        source = RasterSource(name, bands=bands, nodata=nodata, palette=palette, apply_scale=apply_scale, opened=opened)
        if not source.placed_by_gcps:
            return source
    return MosaicSource(name, paths or [name], pixels=pixels, grid=GridOptions(**grid), resampling=resampling)


def _paths_of(path: str | Path | Sequence[str | Path], asset: str | None) -> tuple[str, list[str] | None]:
    """Return a name for messages and the files of a mosaic; None instead of files for a single raster."""
    if not isinstance(path, (str, Path)):
        paths = [os.fspath(part) for part in path]
        if not paths:
            raise InputError("expected paths of rasters, got an empty list")
        return (paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"), paths
    name = os.fspath(path)
    if is_item_list(name):
        return name, item_paths(name, asset)
    if asset is not None:
        raise InputError(f"asset is for a JSON file of STAC items, got {name}; leave it out")
    if os.path.isdir(name):
        # Some formats are folders; those contain no rasters and are opened by GDAL.
        return name, _rasters_in(name) or None
    if glob.has_magic(name) and not os.path.exists(name) and "://" not in name and not name.startswith("/vsi"):
        return name, _matching(name)
    return name, None


def _rasters_in(folder: str) -> list[str]:
    files = {
        file
        for file in Path(folder).iterdir()
        if file.suffix.lower() in RASTER_SUFFIXES and file.is_file() and not is_by_product(file.name)
    }
    previews = previews_among(files)
    if previews:
        warnings.warn(
            f"{len(previews)} of {len(files)} files of the mosaic {folder} are taken as previews of the rasters beside "
            f"them and left out, the first {min(previews)}",
            DataWarning,
            stacklevel=4,
        )
    return sorted(map(str, without_own(sorted(files - previews))))


def _matching(pattern: str) -> list[str]:
    matches = (Path(match) for match in glob.glob(pattern, recursive=True))
    files = [str(file) for file in without_repeats(matches) if file.is_file() and not is_by_product(file.name)]
    if not files:
        raise InputError(f"no file matches {pattern}")
    return files


def open_map(path: str | Path) -> RasterSource:
    """Open a map as written by `perf-vit predict`, GeoTIFF or OME-TIFF, as a raster: never as colours of a slide.

    Raises:
        InputError: The file can't be read.
    """
    return OmeMapSource(path) if os.fspath(path).lower().endswith((".ome.tif", ".ome.tiff")) else open_raster(path)


def find_reader(path: str) -> OpenReader | None:
    """Return the reader with the longest suffix that a path ends in, None if there is none.

    A folder with the DICOM files of one slide has that of these.
    """
    name = ".dcm" if os.path.isdir(path) and is_dicom_folder(path) else path.lower().rstrip("/")
    suffixes = [suffix for suffix in READERS if name.endswith(suffix)]
    return READERS[max(suffixes, key=len)] if suffixes else None


def is_slide(path: str, *, asked: bool | None) -> bool:
    """Return whether a path is read as a slide.

    Args:
        path: Path to open.
        asked: True if slide options were given, so that a plain tiled TIFF is a slide; False if raster options were
            given, so that it isn't; None for neither.
    """
    found, opened = _inspect(path, asked)
    if opened is not None:
        opened.close()
    return found


def _inspect(path: str, asked: bool | None) -> tuple[bool, Any]:
    """Return whether a path is read as a slide, and the open dataset if it had to be opened and isn't."""
    if find_reader(path) is not None or _is_multiscale_zarr(path):
        return True, None
    if Path(path).suffix.lower() not in GEOTIFF_SUFFIXES or not Path(path).is_file():
        return False, None
    return _inspect_tiff(path, asked)


def open_slide(
    path: str, *, bands: Sequence[int | str] | None = None, icc: str | None = None, **options: Any
) -> SlideSource:
    """Open a slide with the reader of its format.

    Args:
        path: Slide.
        bands: Names or 1-based numbers of channels.
        icc: "srgb" or None.
        **options: Arguments of `SlideSource`.

    Raises:
        InputError: The slide can't be opened, or an option doesn't fit.
    """
    if icc not in (None, "srgb"):
        raise InputError(f'icc must be "srgb" or None, got {icc!r}')
    if "tissue" in options:
        options["tissue"] = str(options["tissue"])
    return SlideSource(path, _reader(path, icc), bands=bands, **options)


def _reader(path: str, icc: str | None) -> PyramidReader:
    open_reader = find_reader(path) or (open_ome_zarr if _is_multiscale_zarr(path) else OpenSlideReader)
    if open_reader is OpenSlideReader and not holds_colours(file_to_open(path)):
        # OpenSlide reduces other values to 8 bits.
        open_reader = open_array_tiff
    if icc is None:
        return open_reader(file_to_open(path))
    if open_reader is not OpenSlideReader:
        raise InputError(f"icc is for slides that OpenSlide reads, and {path} is not one; leave it out")
    return OpenSlideReader(file_to_open(path), to_srgb=True)


def _is_multiscale_zarr(path: str) -> bool:
    return path.rstrip("/").endswith(".zarr") and is_multiscale(path)


def _inspect_tiff(path: str, asked: bool | None) -> tuple[bool, Any]:
    """Do as `_inspect`: slides are a scanner's format, or a tiled colour pyramid without georeference."""
    found = _slide_format(path)
    if found is None or found != "generic-tiff":
        return found is not None, None
    try:
        dataset = open_dataset(path)
    except PerfVitError:
        return True, None
    if _is_pyramid(dataset, asked):
        dataset.close()
        return True, None
    return False, dataset


def _is_pyramid(dataset: Any, asked: bool | None) -> bool:
    if dataset.crs is not None or not dataset.transform.is_identity or dataset.gcps[0] or dataset.rpcs:
        return False
    is_pyramid_of_colours = dataset.count in (3, 4) and set(dataset.dtypes) == {"uint8"} and dataset.overviews(1)
    # Maps of slides have no georeference either, and may have as many bands.
    return bool(is_pyramid_of_colours) and VERSION_TAG not in dataset.tags() if asked is None else asked


def _slide_format(path: str) -> str | None:
    """Return OpenSlide's name of a file's format; None if it isn't a slide or OpenSlide isn't installed."""
    try:
        import openslide
    except (ImportError, OSError):
        return None
    try:
        name: str | None = openslide.OpenSlide.detect_format(path)
    except openslide.OpenSlideError:
        return None
    return name


def open_input(
    path: InputPath, options: InputOptions, overrides: Mapping[str, Any] | None = None
) -> RasterSource | SlideSource:
    """Open an input of a model; of a slide the part inside its bounds, which QuPath shows.

    Args:
        path: What `open_source` opens.
        options: Those of the model.
        overrides: Options of `open_source` that come before the model's; None counts as not given.

    Raises:
        InputError: The input can't be opened, or the options don't fit it.
    """
    source = open_source(path, **merged_options(options, overrides or {}))
    return source.within_bounds() if isinstance(source, SlideSource) else source


def merged_options(options: InputOptions, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `open_source`.

    Args:
        options: Those of a model.
        overrides: Options of `open_source` that come before the model's; None counts as not given.
    """
    resolution: float | PixelSize | None = options.resolution
    if options.resolution is not None and options.resolution_unit is not None:
        resolution = PixelSize(options.resolution, options.resolution_unit)
    given = {name: value for name, value in overrides.items() if value is not None}
    own = {
        "bands": options.bands,
        "nodata": options.nodata,
        "resolution": resolution,
        # `level` is an alternative to `mpp`.
        "mpp": None if "level" in given else options.mpp,
        "slide_mpp": options.slide_mpp,
        "slide_mpp_override": options.slide_mpp_override,
        "tissue": options.tissue,
    }
    return {**{name: value for name, value in own.items() if value is not None}, **given}
