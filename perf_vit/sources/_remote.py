"""Remote files: GDAL settings and retries."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, TypeVar

import rasterio
from rasterio.env import getenv, hasenv

from perf_vit.errors import DamagedDataError, InputError, UnreachableError

__all__ = ["is_decoding_error", "is_remote", "network_limits", "with_remote_settings", "with_retries"]

T = TypeVar("T")

_VSI = ("vsicurl", "vsis3", "vsigs", "vsiaz", "vsiadls", "vsioss", "vsiswift", "vsihdfs", "vsiwebhdfs")
_MARKS = ("http://", "https://", "ftp://", "s3://", "gs://", "az://", *(f"/{name}" for name in _VSI))

_LIMITS = {
    # Without limits (seconds, bytes per second) GDAL waits forever for a silent server. Silence counts as low speed,
    # which GDAL doesn't retry, unlike timeouts.
    "GDAL_HTTP_CONNECTTIMEOUT": "10",
    "GDAL_HTTP_LOW_SPEED_TIME": "10",
    "GDAL_HTTP_LOW_SPEED_LIMIT": "100",
    "GDAL_HTTP_TIMEOUT": "120",
    # Delays roughly double.
    "GDAL_HTTP_MAX_RETRY": "3",
    "GDAL_HTTP_RETRY_DELAY": "0.5",
    # GDAL's threads for members of a VRT or tile index don't have the settings of the calling thread.
    "VRT_NUM_THREADS": "1",
    "GTI_NUM_THREADS": "1",
}

_OPENING = {
    # No search for side-car files, which lists the bucket or requests each name at every opening.
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    # Enough for most headers in the first request.
    "GDAL_INGESTED_BYTES_AT_OPEN": "32768",
    "VSI_CACHE": "TRUE",
    "VSI_CACHE_SIZE": "16777216",
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "GDAL_HTTP_MULTIPLEX": "YES",
}

# GDAL caches failed requests (partial blocks or "no such file"); files opened with this option are requested again.
# As a rasterio.Env of the main thread it would persist in the threads below.
_ANEW = {"CPL_VSIL_CURL_NON_CACHED": ":".join(f"/{name}/" for name in _VSI)}
_anew: ContextVar[Mapping[str, str]] = ContextVar("anew", default=MappingProxyType({}))

# Seconds to wait before a failed read is repeated, once for each.
_WAITS_S = (1.0, 3.0)

# libtiff's errors for complete blocks that can't be decoded.
_DECODING = re.compile(r"^(\w*Decode\w*|JPEGLib):")


def is_remote(path: str) -> bool:
    """Return whether a path, or the text of a VRT, refers to a server."""
    return any(mark in path for mark in _MARKS)


def network_limits() -> dict[str, Any]:
    """Return GDAL's timeouts and retries for remote files, except those set by the user."""
    return _unless_set({**_LIMITS, **_anew.get()})


def is_decoding_error(reason: str) -> bool:
    """Return whether GDAL's error says that all bytes arrived but are damaged.

    For other errors, such as a short block, it is unknown whether the server failed or the file is truncated.
    """
    return _DECODING.match(reason) is not None


def with_retries(read: Callable[[], T], close: Callable[[], None]) -> T:
    """Call a reading function, again after a delay if a server fails.

    Args:
        read: Function that reads, and opens the file if necessary.
        close: Function that closes the file; called after every failure.

    Raises:
        DamagedDataError: The pixels arrived, but are damaged.
        UnreachableError: All attempts failed; the error of the first one.
    """
    try:
        return _try_again(read, close)
    except InputError:
        # GDAL caches blocks that it failed to read, and would return their zeros as data.
        close()
        raise


def _try_again(read: Callable[[], T], close: Callable[[], None]) -> T:
    try:
        return read()
    except UnreachableError as error:
        failure = error
    for wait_s in _WAITS_S:
        time.sleep(wait_s)
        close()
        token = _anew.set(_ANEW)
        try:
            return read()
        except DamagedDataError:
            raise
        except InputError:
            # Files opened without a response are "not recognised", so the first error says more.
            continue
        finally:
            _anew.reset(token)
    raise failure


def with_remote_settings(open_file: Callable[[], T], further: Mapping[str, str]) -> T:
    """Call a function that opens a remote file, with suitable GDAL settings.

    Environment variables and the caller's `rasterio.Env` take precedence. GDAL keeps the settings with the opened file.

    Args:
        open_file: Function that opens the file.
        further: Settings that always apply.
    """
    settings = {**(getenv() if hasenv() else {}), **_unless_set({**_LIMITS, **_OPENING, **_anew.get()}), **further}
    # Settings made in the main thread apply to the whole process, where they would hide the side-car files
    # of a local raster opened by another thread; in other threads they are local to the thread.
    return _threads(os.getpid()).submit(_call, open_file, settings).result()


def _unless_set(settings: dict[str, str]) -> dict[str, Any]:
    """Return the settings that neither the environment nor the caller's `rasterio.Env` sets."""
    given = {*os.environ, *(getenv() if hasenv() else ())}
    return {name: value for name, value in settings.items() if name not in given}


@functools.lru_cache(maxsize=1)
def _threads(pid: int) -> ThreadPoolExecutor:
    """Return threads of this process that never end: an ending one briefly holds a PROJ lock, which forks inherit."""
    return ThreadPoolExecutor(16, thread_name_prefix=f"open-url-{pid}")


def _call(open_file: Callable[[], T], settings: dict[str, Any]) -> T:
    with rasterio.Env(**settings):
        return open_file()
