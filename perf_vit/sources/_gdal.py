"""GDAL's failures as one line that names the file."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import rasterio
import rasterio.windows
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from perf_vit.errors import DamagedDataError, InputError, UnreachableError, parsing
from perf_vit.sources._members import MASK, check_members, check_sources, leads_to_server, open_tiles, opens_members
from perf_vit.sources._remote import is_remote, network_limits, was_decoded_in_vain, with_remote_settings
from perf_vit.types import Window

__all__ = [
    "GDAL_ERRORS",
    "bounded_cache",
    "check_exists",
    "check_name",
    "color_kinds",
    "crs_name",
    "open_dataset",
    "plain_images_allowed",
    "read_window",
    "reason_of",
]

# Some of GDAL's own errors come through rasterio as they are; it has no public name for them. GDAL's messages about
# damaged VRTs hold their bytes, which need not be UTF-8, and neither need a file's name.
GDAL_ERRORS = (RasterioError, CPLE_BaseError, UnicodeError)

# Two rows of windows of 1,024 px across a scene of 40,000 px and three bytes.
_CACHE_BYTES = 256 * 2**20
# Reading whole PNGs at once, GDAL passes over a cut end and gives whatever is in memory. It looks at this option when a
# file is opened and when it is read.
_CAREFUL = {"GDAL_PNG_WHOLE_IMAGE_OPTIM": "NO"}
# Python in a VRT, as a pixel function, is code in a file. In the environment it holds for all threads of GDAL, too.
os.environ["GDAL_VRT_ENABLE_PYTHON"] = "NO"
# rasterio's wheels come without some of them.
_OPTIONAL_DRIVERS = {
    ".ecw": "ECW",
    ".sid": "MrSID",
    ".hdf": "HDF4",
    ".kea": "KEA",
    ".h5": "HDF5",
    ".nc": "netCDF",
    ".jp2": "JP2OpenJPEG",
    ".zarr": "Zarr",
}


def open_dataset(path: str, *, name: str | None = None, overview_level: int | None = None) -> Any:
    """Open a raster for reading.

    Args:
        path: a file, a URL, a GDAL path or the text of a VRT.
        name: for errors, instead of the path.
        overview_level: Overview to read instead of the full resolution.

    Raises:
        InputError: no such file, or not a raster.
        UnreachableError: a server doesn't deliver it.
    """
    if not path.startswith("<VRTDataset"):
        check_name(path)
        check_exists(path)
        _check_text(path)
    level = {} if overview_level is None else {"overview_level": overview_level}
    open_file = functools.partial(rasterio.open, path, **level)
    try:
        with plain_images_allowed():
            if is_remote(path):
                return with_remote_settings(open_file, _CAREFUL)
            with rasterio.Env(**_CAREFUL, **network_limits()):
                return open_file()
    except GDAL_ERRORS as error:
        hint, reason = _driver_hint(name or path), reason_of(error)
        # Members of a local file may lie on a server, too.
        unreachable = reason.startswith(("HTTP", "CURL")) or (is_remote(path) and "not recognized" not in reason)
        failed = UnreachableError if unreachable else InputError
        raise failed(f"can't open {name or path} as a raster: {reason}{hint}") from error


def _check_text(path: str) -> None:
    """Refuse a VRT that isn't UTF-8: rasterio prints a traceback where GDAL quotes its bytes."""
    if path.lower().endswith(".vrt") and os.path.isfile(path):
        with parsing(path, "a VRT"), open(path, encoding="utf-8") as file:
            file.read()


def _driver_hint(path: str) -> str:
    """What is missing where GDAL was built without the driver of a file's format."""
    driver = _OPTIONAL_DRIVERS.get(os.path.splitext(path)[1].lower())
    with rasterio.Env() as env:
        if driver is None or driver in env.drivers():
            return ""
    return (
        f"; this GDAL has no {driver} driver: convert the file to GeoTIFF elsewhere, or install rasterio from source "
        f"against a GDAL that has it (pip install --no-binary rasterio rasterio)"
    )


@contextmanager
def bounded_cache() -> Iterator[None]:
    """Let GDAL keep at most 256 MiB of blocks: it takes a twentieth of the machine's memory otherwise.

    `GDAL_CACHEMAX` of the environment, in MB, overrides it.
    """
    if "GDAL_CACHEMAX" in os.environ:
        yield
        return
    with rasterio.Env(GDAL_CACHEMAX=_CACHE_BYTES):
        yield


@contextmanager
def plain_images_allowed() -> Iterator[None]:
    """Open or make files without georeference in silence; whatever needs a position says so itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def check_exists(path: str) -> None:
    """Refuse a local path that doesn't exist.

    Raises:
        InputError: there is no such file.
    """
    # URLs, /vsi paths and "DRIVER:file:variable" are GDAL's to judge.
    if not os.path.exists(path) and ":" not in path and not path.startswith("/vsi"):
        raise InputError(f"can't open {path}: no such file")


def check_name(path: str) -> None:
    """Refuse a path that isn't UTF-8, which GDAL can't be told.

    Raises:
        InputError: what is wrong with it.
    """
    try:
        path.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise InputError(f"can't open {shown}: its name is not UTF-8; rename it") from error


def color_kinds(dataset: Any) -> list[ColorInterp]:
    """What the bands of an open raster are to GDAL: red, alpha, palette, ..."""
    try:
        return list(dataset.colorinterp)
    except GDAL_ERRORS:
        # rasterio takes the error of an earlier read, of whatever file, for one of this call, and forgets it then.
        return list(dataset.colorinterp)


def read_window(dataset: Any, path: str, window: Window, **options: Any) -> Any:
    """`dataset.read` of a window inside the dataset.

    Args:
        dataset: an open rasterio dataset.
        path: its name in errors.
        window: the pixels to read.
        **options: `dataset.read`'s own, and `masks=True` for `dataset.read_masks`.

    Raises:
        DamagedDataError: the file is damaged there.
        UnreachableError: a server doesn't deliver it.
    """
    masks = options.pop("masks", False)
    read = dataset.read_masks if masks else dataset.read
    shape = options.get("out_shape")
    reduced = shape is not None and tuple(shape[-2:]) != window.shape
    check_members(dataset, path, window, reduced=reduced)
    place = rasterio.windows.Window(window.col, window.row, window.width, window.height)
    try:
        with _settings_for(dataset):
            open_tiles(dataset, path, window)
            pixels = _read_bands(read, dataset, window=place, **options)
            bands = [*_bands_of(dataset, options), *([MASK] if masks else [])]
            check_sources(dataset, window, bands, reduced=reduced)
            return pixels
    except GDAL_ERRORS as error:
        reason = reason_of(error)
        what = f"rows {window.row} to {window.row_stop}, columns {window.col} to {window.col_stop} of {path}: {reason}"
        if leads_to_server(dataset, path) and not was_decoded_in_vain(reason):
            raise UnreachableError(f"can't read {what}; try again later, or download the file") from error
        raise DamagedDataError(f"can't read {what}; the file may be truncated or damaged") from error


def _read_bands(read: Callable[..., Any], dataset: Any, **options: Any) -> Any:
    """`read` of some bands; one by one where their dtypes differ, which rasterio refuses to read at once."""
    bands, shape = _bands_of(dataset, options), options.get("out_shape")
    if len({dataset.dtypes[band - 1] for band in bands}) == 1:
        return read(**options)
    place = {} if shape is None else {"out_shape": tuple(shape[-2:])}
    return np.stack([read(**{**options, "indexes": band, **place}) for band in bands])


def _bands_of(dataset: Any, options: dict[str, Any]) -> Sequence[int]:
    """The bands that `dataset.read` would give."""
    bands = options.get("indexes")
    return [bands] if isinstance(bands, int) else bands or dataset.indexes


def _settings_for(dataset: Any) -> AbstractContextManager[Any]:
    """What GDAL has to be told for reading; what a file was opened with holds for most."""
    if opens_members(dataset):
        return rasterio.Env(**network_limits())
    return rasterio.Env(**_CAREFUL) if dataset.driver == "PNG" else nullcontext()


def reason_of(error: BaseException) -> str:
    """The innermost cause of a rasterio error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, UnicodeEncodeError):
        return "its name is not UTF-8, which GDAL needs; rename it"
    message = getattr(error, "errmsg", None) or getattr(error, "strerror", None) or str(error)
    return " ".join(message.split()).rstrip(".")


def crs_name(crs: Any) -> str:
    """A short name for messages: `EPSG:32637` where there is one."""
    if crs is None:
        return "no CRS"
    code = crs.to_epsg()
    return f"EPSG:{code}" if code else str(crs.to_wkt()).split('"')[1]
