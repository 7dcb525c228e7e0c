"""GDAL: opening, settings and errors; handles that survive forks, threads and pickling."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import rasterio
import rasterio.windows
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from perf_vit.errors import DamagedDataError, InputError, UnreachableError, parsing
from perf_vit.sources._members import (
    MASK,
    MEMBER_DRIVERS,
    check_members,
    check_sources,
    leads_to_server,
    open_tiles,
)
from perf_vit.sources._remote import is_decoding_error, is_remote, network_limits, with_remote_settings
from perf_vit.types import Window

__all__ = [
    "GDAL_ERRORS",
    "PerThread",
    "Pool",
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


class _Closable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=_Closable)


class PerThread(Generic[T]):
    """Handle per thread and process, opened at first use.

    GDAL datasets may be used by one thread at a time only, and a forked child shares its parent's file offset, so
    handles must not be inherited.

    Args:
        open_handle: Function that opens a handle; picklable, such as a `functools.partial` of a module-level function.
        opened: Handle of the calling thread, if it has one already.
    """

    def __init__(self, open_handle: Callable[[], T], opened: T | None = None) -> None:
        self._open_handle = open_handle
        self._local = threading.local()
        if opened is not None:
            self._local.handle, self._local.pid = opened, os.getpid()

    def get(self) -> T:
        """Return this thread's handle."""
        # `close` replaces it, maybe in another thread.
        local = self._local
        if getattr(local, "pid", None) != os.getpid():
            local.handle = self._open_handle()
            local.pid = os.getpid()
        handle: T = local.handle
        return handle

    def close(self) -> None:
        """Close this thread's handle, if any; `get` opens a new one."""
        if getattr(self._local, "pid", None) == os.getpid():
            self._local.handle.close()
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"open_handle": self._open_handle}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["open_handle"])  # type: ignore[misc]


class Pool(Generic[T]):
    """Bounded number of open handles; the least recently used one is closed for a new one.

    For a single thread: `PerThread` gives each thread its own pool.

    Args:
        open_handle: Function that opens the handle of an index.
        max_open: Maximum number of open handles.
    """

    def __init__(self, open_handle: Callable[[int], T], max_open: int) -> None:
        self._open_handle = open_handle
        self._max_open = max_open
        self._handles: OrderedDict[int, T] = OrderedDict()

    def get(self, index: int) -> T:
        """Return the handle of an index, opened if necessary."""
        if index in self._handles:
            self._handles.move_to_end(index)
            return self._handles[index]
        while len(self._handles) >= self._max_open:
            self._handles.popitem(last=False)[1].close()
        handle = self._handles[index] = self._open_handle(index)
        return handle

    def close(self) -> None:
        """Close all handles."""
        while self._handles:
            self._handles.popitem()[1].close()


# Some of GDAL's own errors come through rasterio as they are; it has no public name for them. GDAL's messages about
# damaged VRTs hold their bytes, which need not be UTF-8, and neither need a file's name.
GDAL_ERRORS = (RasterioError, CPLE_BaseError, UnicodeError)

# Two rows of 1,024 px windows across a scene of 40,000 px with three bytes per pixel.
_CACHE_BYTES = 256 * 2**20

# Reading whole PNGs at once, GDAL passes over a cut end and gives whatever is in memory. It looks at this option when a
# file is opened and when it is read.
_CAREFUL = {"GDAL_PNG_WHOLE_IMAGE_OPTIM": "NO"}

# Python in a VRT, as a pixel function, is code in a file. In the environment it holds for all threads of GDAL, too.
os.environ["GDAL_VRT_ENABLE_PYTHON"] = "NO"

# rasterio's wheels lack some of them.
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
        path: File, URL, GDAL path or text of a VRT.
        name: Name for errors; None for the path.
        overview_level: Overview to read instead of the full resolution.

    Raises:
        InputError: The file doesn't exist, or isn't a raster.
        UnreachableError: A server fails.
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
        # Members of a local file may be remote, too.
        unreachable = reason.startswith(("HTTP", "CURL")) or (is_remote(path) and "not recognized" not in reason)
        failed = UnreachableError if unreachable else InputError
        raise failed(f"can't open {name or path} as a raster: {reason}{hint}") from error


def _check_text(path: str) -> None:
    """Check that a VRT is UTF-8, as rasterio prints a traceback if GDAL quotes other bytes."""
    if path.lower().endswith(".vrt") and os.path.isfile(path):
        with parsing(path, "a VRT"), open(path, encoding="utf-8") as file:
            file.read()


def _driver_hint(path: str) -> str:
    """Return a hint if GDAL was built without the driver of a file's format."""
    driver = _OPTIONAL_DRIVERS.get(os.path.splitext(path)[1].lower())
    with rasterio.Env() as env:
        if driver is None or driver in env.drivers():
            return ""
    return (
        f"; this GDAL has no {driver} driver: convert the file to GeoTIFF elsewhere, or install rasterio from source "
        f"against a GDAL that has it (pip install --no-binary rasterio rasterio)"
    )


class _PlainImages:
    """Filter of rasterio's warning in the threads that need it.

    The filter stays in `warnings.filters` and asks this object for a match. `warnings.catch_warnings` would change the
    filters of all threads, and put back those of a while ago.
    """

    def __init__(self) -> None:
        self._depth = threading.local()
        # A filter's pattern of messages is whatever has `match`.
        self._filter = ("ignore", self, NotGeoreferencedWarning, None, 0)
        self._lock = threading.Lock()

    def __reduce__(self) -> str:
        # Libraries send the filters to other processes.
        return "_PLAIN_IMAGES"

    def match(self, _: str) -> bool:
        """Return whether this thread ignores the warning."""
        return getattr(self._depth, "value", 0) > 0

    def __enter__(self) -> None:
        self._depth.value = getattr(self._depth, "value", 0) + 1
        filters: Any = warnings.filters
        # It stays there; others may have put theirs before it, or replaced the list.
        with self._lock:
            if not filters or filters[0] is not self._filter:
                filters[:] = [self._filter, *(each for each in filters if each is not self._filter)]

    def __exit__(self, *exception: object) -> None:
        self._depth.value -= 1


_PLAIN_IMAGES = _PlainImages()


def plain_images_allowed() -> AbstractContextManager[None]:
    """Suppress warnings about files without georeference in this thread; callers that require one check it."""
    return _PLAIN_IMAGES


@contextmanager
def bounded_cache() -> Iterator[None]:
    """Limit GDAL's block cache to 256 MiB, by default a twentieth of the memory.

    `GDAL_CACHEMAX` in the environment, in MB, overrides it.
    """
    if "GDAL_CACHEMAX" in os.environ:
        yield
        return
    with rasterio.Env(GDAL_CACHEMAX=_CACHE_BYTES):
        yield


def check_exists(path: str) -> None:
    """Check that a local path exists.

    Raises:
        InputError: The file doesn't exist.
    """
    # GDAL checks URLs, /vsi paths and "DRIVER:file:variable".
    if not os.path.exists(path) and ":" not in path and not path.startswith("/vsi"):
        raise InputError(f"can't open {path}: no such file")


def check_name(path: str) -> None:
    """Check that a path is UTF-8, as GDAL requires.

    Raises:
        InputError: The path isn't UTF-8.
    """
    try:
        path.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise InputError(f"can't open {shown}: its name is not UTF-8; rename it") from error


def color_kinds(dataset: Any) -> list[ColorInterp]:
    """Return GDAL's colour interpretation of the bands: red, alpha, palette, ..."""
    try:
        return list(dataset.colorinterp)
    except GDAL_ERRORS:
        # rasterio reports a pending error of an earlier read, of any file, in this call, and clears it.
        return list(dataset.colorinterp)


def read_window(dataset: Any, path: str, window: Window, **options: Any) -> Any:
    """Read a window inside a dataset with `dataset.read`.

    Args:
        dataset: Open rasterio dataset.
        path: Its name, for errors.
        window: Window to read.
        **options: Arguments of `dataset.read`, and `masks=True` for `dataset.read_masks`.

    Raises:
        DamagedDataError: The file is damaged there.
        UnreachableError: A server fails.
    """
    masks = options.pop("masks", False)
    read = dataset.read_masks if masks else dataset.read
    shape = options.get("out_shape")
    reduced = shape is not None and tuple(shape[-2:]) != window.shape
    has_members = dataset.driver in MEMBER_DRIVERS
    if has_members:
        check_members(dataset, path, window, reduced=reduced)
    place = rasterio.windows.Window(window.col, window.row, window.width, window.height)
    try:
        if not has_members:
            # Most settings are kept from opening it.
            with rasterio.Env(**_CAREFUL) if dataset.driver == "PNG" else nullcontext():
                return _read_bands(read, dataset, window=place, **options)
        with rasterio.Env(**network_limits()), plain_images_allowed():
            open_tiles(dataset, path, window)
            pixels = _read_bands(read, dataset, window=place, **options)
            bands = [*_bands_of(dataset, options), *([MASK] if masks else [])]
            check_sources(dataset, window, bands, reduced=reduced)
            return pixels
    except GDAL_ERRORS as error:
        reason = reason_of(error)
        what = f"rows {window.row} to {window.row_stop}, columns {window.col} to {window.col_stop} of {path}: {reason}"
        if leads_to_server(dataset, path) and not is_decoding_error(reason):
            raise UnreachableError(f"can't read {what}; try again later, or download the file") from error
        raise DamagedDataError(f"can't read {what}; the file may be truncated or damaged") from error


def _read_bands(read: Callable[..., Any], dataset: Any, **options: Any) -> Any:
    """Read bands, one by one if their dtypes differ, as rasterio can't read these at once."""
    bands, shape = _bands_of(dataset, options), options.get("out_shape")
    if len({dataset.dtypes[band - 1] for band in bands}) == 1:
        return read(**options)
    place = {} if shape is None else {"out_shape": tuple(shape[-2:])}
    return np.stack([read(**{**options, "indexes": band, **place}) for band in bands])


def _bands_of(dataset: Any, options: dict[str, Any]) -> Sequence[int]:
    """Return the bands that `dataset.read` would read."""
    bands = options.get("indexes")
    return [bands] if isinstance(bands, int) else bands or dataset.indexes


def reason_of(error: BaseException) -> str:
    """Return the innermost cause of a rasterio error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, UnicodeEncodeError):
        return "its name is not UTF-8, which GDAL needs; rename it"
    message = getattr(error, "errmsg", None) or getattr(error, "strerror", None) or str(error)
    return " ".join(message.split()).rstrip(".")


def crs_name(crs: Any) -> str:
    """Return a short name of a CRS for messages, such as `EPSG:32637`."""
    if crs is None:
        return "no CRS"
    code = crs.to_epsg()
    return f"EPSG:{code}" if code else str(crs.to_wkt()).split('"')[1]
